"""Report unknown keys of a recipe, with the key of this package that was probably meant."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from orpo_lite.errors import RecipeError
from orpo_lite.recipe.schema import FULL_KEYS, KEYS
from orpo_lite.recipe.text import Written

# Remarks that several keys share.
PAIRS_PER_STEP = "it counts pairs per optimizer step over all devices"
PACKED = "on by default: pairs end to end, without padding"
MODULES = "all-linear, or a list of module names"
DTYPES = "bfloat16, float16, float32 or auto"
LAMBDA = "λ in the paper"
EACH_SAVES = "each evaluation saves a checkpoint"
SHARE_OR_NUMBER = "a share of all steps, or a number"
LOGGED = "metrics.jsonl in the run folder has every step; leave the line out"
PUSHED_ONCE = "the result is pushed once, at the end; leave the line out"
NOT_SHARDED = "each GPU holds the whole base in 4 bit, and nothing is sharded; leave the line out"
ONLY_LORA = "only LoRA is trained: embeddings and head do not change; leave the line out"

FOREIGN: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size": ("training.global_batch_size", PAIRS_PER_STEP),
    "gradient_accumulation_steps": ("training.global_batch_size", PAIRS_PER_STEP),
    "micro_batch_size": (
        "memory.micro_batch_size",
        "pairs in one forward pass; training.global_batch_size sets the step",
    ),
    "per_device_eval_batch_size": (
        "memory.micro_batch_size",
        "evaluation uses the same forward pass",
    ),
    "batch_size": ("training.global_batch_size", PAIRS_PER_STEP),
    "warmup_ratio": ("training.warmup_steps", "a value below 1 is a share of all steps"),
    "gradient_checkpointing": (
        "memory.activation_checkpointing",
        "all, none, or a number of layers",
    ),
    "activation_offloading": ("memory.checkpoint_offload", ""),
    "padding_free": ("memory.packing", PACKED),
    "sample_packing": ("memory.packing", PACKED),
    "use_liger_kernel": ("memory.head_chunk", "auto by default: never all logits at once"),
    "lora_r": ("lora.r", ""),
    "lora_rank": ("lora.r", ""),
    "lora.rank": ("lora.r", ""),
    "lora.alpha": ("lora.lora_alpha", ""),
    "lora.dropout": ("lora.lora_dropout", ""),
    "lora_target": ("lora.target_modules", MODULES),
    "lora_target_modules": ("lora.target_modules", MODULES),
    "lora_target_linear": ("lora.target_modules", "write all-linear"),
    "exclude_modules": (
        "lora.target_modules",
        "list the modules to adapt; only an adapter on disk can exclude some",
    ),
    "layers_to_transform": (
        "lora.target_modules",
        "full names select layers: model.layers.0.self_attn.q_proj",
    ),
    "target_parameters": (
        "",
        "only an adapter on disk can adapt experts that are one tensor; leave the line out",
    ),
    "base_model": ("model.model_name_or_path", ""),
    "revision": ("model.model_revision", ""),
    "load_in_8bit": ("quantization.load_in_4bit", "4 bit or none"),
    "quantization_bit": ("quantization.load_in_4bit", "true for 4 bit"),
    "bf16": ("model.dtype", DTYPES),
    "fp16": ("model.dtype", DTYPES),
    "torch_dtype": ("model.dtype", ""),
    "flash_attn": ("model.attn_implementation", "flash_attention_2"),
    "flash_attention": ("model.attn_implementation", "flash_attention_2"),
    "dataset": ("data.dataset_name", ""),
    "datasets": ("data.dataset_name", "a name or file, or a list of them"),
    "dataset_split": ("data.dataset_train_split", ""),
    "val_set_size": ("data.test_split_size", "split by prompt"),
    "val_size": ("data.test_split_size", "split by prompt"),
    "cutoff_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_completion_length": ("data.max_length", "it limits prompt and response together"),
    "template": ("data.chat_template", "auto, none or a .jinja file"),
    "orpo_alpha": ("loss.beta", LAMBDA),
    "orpo_lambda": ("loss.beta", LAMBDA),
    "pref_beta": ("loss.beta", LAMBDA),
    "alpha": ("loss.beta", "λ in the paper; the adapter's alpha is lora.lora_alpha"),
    "pref_loss": ("loss.type", ""),
    "rl": ("loss.type", ""),
    "lr": ("training.learning_rate", ""),
    "num_epochs": ("training.num_train_epochs", ""),
    "epochs": ("training.num_train_epochs", ""),
    "optimizer": ("training.optim", ""),
    "lr_scheduler": ("training.lr_scheduler_type", ""),
    "save_steps": ("training.eval_steps", EACH_SAVES),
    "save_strategy": ("training.eval_steps", EACH_SAVES),
    "eval_strategy": ("training.eval_steps", SHARE_OR_NUMBER),
    "evaluation_strategy": ("training.eval_steps", SHARE_OR_NUMBER),
    "evals_per_epoch": ("training.eval_steps", SHARE_OR_NUMBER),
    "logging_steps": ("", LOGGED),
    "report_to": ("training.report_to", "tensorboard, wandb, trackio or none"),
    "log_with": ("training.report_to", "tensorboard, wandb, trackio or none"),
    "wandb_project": ("training.report_to", "wandb; its project is the variable WANDB_PROJECT"),
    "export_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_organization": ("output.hub_model_id", "owner/name"),
    "hub_private": ("output.hub_private_repo", ""),
    "hub_strategy": ("", PUSHED_ONCE),
    "hub_always_push": ("", PUSHED_ONCE),
    "hf_use_auth_token": (
        "",
        "the token comes from `hf auth login` or HF_TOKEN; leave the line out",
    ),
    "trust_remote_code": ("", "code from the hub is never run; leave the line out"),
    "resume_from_checkpoint": (
        "",
        "`orpo-lite train --resume RUN` resumes a run; leave the line out",
    ),
    "overwrite_output_dir": (
        "",
        "a run folder is never overwritten: choose another training.output_dir",
    ),
    "do_train": ("", "`orpo-lite train` trains; leave the line out"),
    "do_eval": ("training.eval_steps", SHARE_OR_NUMBER),
    "deepspeed": ("", NOT_SHARDED),
    "fsdp": ("", NOT_SHARDED),
    "fsdp_config": ("", NOT_SHARDED),
    "modules_to_save": ("", ONLY_LORA),
    "additional_target": ("", ONLY_LORA),
    "lora_modules_to_save": ("", ONLY_LORA),
    "adapter": (
        "",
        "a LoRA adapter is trained, on a 4-bit base with quantization.load_in_4bit; "
        "leave the line out",
    ),
    "finetuning_type": ("", "a LoRA adapter is trained; leave the line out"),
    "stage": ("loss.type", ""),
    "logging_dir": ("", LOGGED),
    "run_name": ("training.output_dir", "the run folder"),
    "save_total_limit": (
        "",
        "the newest checkpoints and the best one are kept; leave the line out",
    ),
    "dataloader_num_workers": ("", "tokens are read from a file; leave the line out"),
    "ref_model": ("", "ORPO needs no reference model; leave the line out"),
    "remove_unused_columns": ("", "unused columns are ignored; leave the line out"),
}
"""Key of another tool -> (our key or "", a remark).

Sources: TrainingArguments, TRL's ORPOConfig, LLaMA-Factory's and Axolotl's documented options.
"""


BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def answer_unknown(written: dict[str, Written]) -> Iterator[RecipeError]:
    """Remove unknown keys from ``written`` and yield an error for each one.

    The error names our key of the same meaning if the key is another tool's, else the most similar
    key.
    """
    known = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    batch = [f"{section}{key}" for section in ("", "training.") for key in BATCH_KEYS]
    product = _batch_product([written[key].value for key in batch if key in written])
    for key in [key for key in written if key not in known]:
        entry, bare = written.pop(key), key.rsplit(".", 1)[-1]
        name = key if key in FOREIGN else bare
        expected = ""
        if key in batch and product:
            ours, remark = FOREIGN[name]
            fix = f"write {ours}: {product} ({remark})"
        elif name in FOREIGN:
            fix = _write_ours(*FOREIGN[name])
        elif bare in FULL_KEYS:
            fix = f"write {' or '.join(FULL_KEYS[bare])}"
        else:
            fix = _suggest_similar(key)
            expected = "a key of `orpo-lite recipes show NAME`"
        yield RecipeError(where=entry.where, found=f"unknown key {key}", expected=expected, fix=fix)


def _write_ours(ours: str, remark: str) -> str:
    if not ours:
        return remark
    return f"write {ours} ({remark})" if remark else f"write {ours}"


def _suggest_similar(key: str) -> str:
    """Suggest the most similar key, first of the same section; else the most similar section."""
    section, _, bare = key.rpartition(".")
    for keys in (KEYS.get(section, []), list(FULL_KEYS)):
        if similar := difflib.get_close_matches(bare, keys, n=1, cutoff=0.6):
            return f"did you mean {FULL_KEYS[similar[0]][0]}?"
    if sections := difflib.get_close_matches(section or bare, list(KEYS), n=1):
        return f"did you mean section {sections[0]}?"
    return f"the sections are {', '.join(KEYS)}"


def _batch_product(values: Sequence[Any]) -> int:
    """Return the product of the given batch keys: global_batch_size on one device.

    It is 0 if there are none, or if one of them is not a number.
    """
    if not values or not all(str(value).isdigit() for value in values):
        return 0
    return math.prod(int(value) for value in values)
