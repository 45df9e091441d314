"""Report unknown keys of a recipe, and suggest the key that was probably meant."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from orpo_lite.errors import RecipeError
from orpo_lite.recipe.schema import FULL_KEYS, KEYS
from orpo_lite.recipe.text import Written

# Remarks that several keys share.
PAIRS_PER_STEP = "it counts the pairs of an optimizer step over all devices"
PACKED = "it is on by default; pairs are put end to end, without padding"
MODULES = "all-linear, or a list of module names"
DTYPES = "bfloat16, float16, float32 or auto"
LAMBDA = "λ in the paper"
EACH_SAVES = "each evaluation saves a checkpoint"
SHARE_OR_NUMBER = "a share of all steps, or a number of steps"
HELD_OUT = "all pairs of a prompt are in the same split"
LOGGED = "leave the line out; metrics.jsonl in the run folder has the metrics of each step"
PUSHED_ONCE = "leave the line out; the result is pushed once, at the end"
NOT_SHARDED = "leave the line out; each GPU holds the whole base in 4 bit, so nothing is sharded"
REFERENCE = "only for loss.type=dpo: another adapter on the same base, or base"
ONLY_LORA = "leave the line out; only LoRA is trained, so embeddings and head do not change"

FOREIGN: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size": ("training.global_batch_size", PAIRS_PER_STEP),
    "gradient_accumulation_steps": ("training.global_batch_size", PAIRS_PER_STEP),
    "micro_batch_size": (
        "memory.micro_batch_size",
        "it counts the pairs of a forward pass; training.global_batch_size counts the pairs of an "
        "optimizer step",
    ),
    "per_device_eval_batch_size": (
        "memory.micro_batch_size",
        "an evaluation has the same forward passes as the training",
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
    "use_liger_kernel": (
        "memory.head_chunk",
        "the default, auto, computes the logits of a few tokens at a time",
    ),
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
        "list the modules to adapt; only an existing adapter may have exclude_modules",
    ),
    "layers_to_transform": (
        "lora.target_modules",
        "to select layers, write full names such as model.layers.0.self_attn.q_proj",
    ),
    "target_parameters": (
        "",
        "leave the line out; only an existing adapter may have target_parameters",
    ),
    "base_model": ("model.model_name_or_path", ""),
    "revision": ("model.model_revision", ""),
    "load_in_8bit": ("quantization.load_in_4bit", "true: 4 bit; false: no quantisation"),
    "quantization_bit": ("quantization.load_in_4bit", "true: 4 bit; false: no quantisation"),
    "bf16": ("model.dtype", DTYPES),
    "fp16": ("model.dtype", DTYPES),
    "torch_dtype": ("model.dtype", ""),
    "flash_attn": ("model.attn_implementation", "with the value flash_attention_2"),
    "flash_attention": ("model.attn_implementation", "with the value flash_attention_2"),
    "dataset": ("data.dataset_name", ""),
    "datasets": ("data.dataset_name", "a name, a file, or a list of names and files"),
    "dataset_split": ("data.dataset_train_split", ""),
    "val_set_size": ("data.test_split_size", HELD_OUT),
    "val_size": ("data.test_split_size", HELD_OUT),
    "cutoff_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_completion_length": ("data.max_length", "it limits prompt and response together"),
    "template": ("data.chat_template", "auto, none or the path of a .jinja file"),
    "orpo_alpha": ("loss.beta", LAMBDA),
    "orpo_lambda": ("loss.beta", LAMBDA),
    "pref_beta": ("loss.beta", LAMBDA),
    "alpha": ("loss.beta", "λ in the paper; for the alpha of LoRA, write lora.lora_alpha"),
    "pref_loss": ("loss.type", ""),
    "rl": ("loss.type", ""),
    "reward_model": ("loss.type", "loss.type=reward trains a reward model"),
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
    "wandb_project": (
        "training.report_to",
        "with the value wandb; the environment variable WANDB_PROJECT names the project",
    ),
    "export_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_organization": ("output.hub_model_id", "owner/name"),
    "hub_private": ("output.hub_private_repo", ""),
    "hub_strategy": ("", PUSHED_ONCE),
    "hub_always_push": ("", PUSHED_ONCE),
    "hf_use_auth_token": (
        "",
        "leave the line out; `hf auth login` or HF_TOKEN provides the token",
    ),
    "trust_remote_code": ("", "leave the line out; code from the hub is never run"),
    "resume_from_checkpoint": (
        "",
        "leave the line out; `orpo-lite train --resume RUN` resumes a run",
    ),
    "overwrite_output_dir": (
        "",
        "choose another training.output_dir; a run folder is never overwritten",
    ),
    "do_train": ("", "leave the line out; `orpo-lite train` always trains"),
    "do_eval": ("training.eval_steps", SHARE_OR_NUMBER),
    "deepspeed": ("", NOT_SHARDED),
    "fsdp": ("", NOT_SHARDED),
    "fsdp_config": ("", NOT_SHARDED),
    "modules_to_save": ("", ONLY_LORA),
    "additional_target": ("", ONLY_LORA),
    "lora_modules_to_save": ("", ONLY_LORA),
    "adapter": (
        "",
        "leave the line out; a LoRA adapter is always trained, and quantization.load_in_4bit "
        "decides whether the base is in 4 bit",
    ),
    "finetuning_type": ("", "leave the line out; a LoRA adapter is always trained"),
    "stage": ("loss.type", "rm is called reward here"),
    "logging_dir": ("", LOGGED),
    "run_name": ("training.output_dir", "the run folder"),
    "save_total_limit": (
        "",
        "leave the line out; the newest two checkpoints and the best one are kept",
    ),
    "dataloader_num_workers": ("", "leave the line out; tokens are read from a file"),
    "ref_model": ("loss.reference_adapter_name_or_path", REFERENCE),
    "model_ref": ("loss.reference_adapter_name_or_path", REFERENCE),
    "loss_type": ("loss.type", "for DPO, loss.dpo_loss_type chooses sigmoid, ipo or hinge"),
    "pref_ftx": ("loss.rpo_alpha", "with loss.type=dpo"),
    "remove_unused_columns": ("", "leave the line out; unused columns are ignored"),
}
"""Key of another tool -> (our key, remark). Our key is "" if we have no such key.

Sources: TrainingArguments, TRL's ORPOConfig, LLaMA-Factory's and Axolotl's documented options.
"""


BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def answer_unknown(written: dict[str, Written]) -> Iterator[RecipeError]:
    """Remove unknown keys from ``written``, and yield an error for each unknown key.

    If the key is from another tool (such as TRL), the error names this package's key for the same
    purpose, or explains why this package has no such key. For any other key, the error names the
    first of these that exists:

    - the key with its section: ``r`` -> ``lora.r``
    - a similar key
    - a similar section
    - the list of all sections
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
            expected = "a key that `orpo-lite recipes show NAME` prints"
        yield RecipeError(where=entry.where, found=f"unknown key {key}", expected=expected, fix=fix)


def _write_ours(ours: str, remark: str) -> str:
    if not ours:
        return remark
    return f"write {ours} ({remark})" if remark else f"write {ours}"


def _suggest_similar(key: str) -> str:
    """Return a suggestion for an unknown key.

    It is the most similar key of the same section, else of any section, else a similar section.
    """
    section, _, bare = key.rpartition(".")
    for keys in (KEYS.get(section, []), list(FULL_KEYS)):
        if similar := difflib.get_close_matches(bare, keys, n=1, cutoff=0.6):
            return f"did you mean {FULL_KEYS[similar[0]][0]}?"
    if sections := difflib.get_close_matches(section or bare, list(KEYS), n=1):
        return f"did you mean section {sections[0]}?"
    return f"the sections are {', '.join(KEYS)}"


def _batch_product(values: Sequence[Any]) -> int:
    """Multiply the values of another tool's batch keys. On one device, this is global_batch_size.

    Return 0 if there are no values, or if one of them is not a whole number.
    """
    if not values or not all(str(value).isdigit() for value in values):
        return 0
    return math.prod(int(value) for value in values)
