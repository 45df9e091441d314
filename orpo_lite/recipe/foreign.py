"""Keys of other tools, answered with ours."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from orpo_lite.errors import RecipeError
from orpo_lite.recipe.schema import HOMES, KEYS
from orpo_lite.recipe.text import Written

# What other tools call our keys: {their key: (ours or "", what to know)}. Sources: TrainingArguments, TRL's ORPOConfig,
# LLaMA-Factory's and Axolotl's documented options.
FOREIGN: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size": (
        "training.global_batch_size",
        "it counts pairs per optimizer step over all devices",
    ),
    "gradient_accumulation_steps": (
        "training.global_batch_size",
        "it counts pairs per optimizer step over all devices",
    ),
    "micro_batch_size": (
        "memory.micro_batch_size",
        "pairs in one forward pass; training.global_batch_size sets the step",
    ),
    "per_device_eval_batch_size": (
        "memory.micro_batch_size",
        "evaluation uses the same forward pass",
    ),
    "batch_size": (
        "training.global_batch_size",
        "it counts pairs per optimizer step over all devices",
    ),
    "warmup_ratio": ("training.warmup_steps", "a value below 1 is a share of all steps"),
    "gradient_checkpointing": (
        "memory.activation_checkpointing",
        "all, none, or a number of layers",
    ),
    "activation_offloading": ("memory.checkpoint_offload", ""),
    "padding_free": ("memory.packing", "on by default: pairs end to end, without padding"),
    "sample_packing": ("memory.packing", "on by default: pairs end to end, without padding"),
    "use_liger_kernel": ("memory.head_chunk", "auto by default: logits are never held"),
    "lora_r": ("lora.r", ""),
    "lora_rank": ("lora.r", ""),
    "lora.rank": ("lora.r", ""),
    "lora.alpha": ("lora.lora_alpha", ""),
    "lora.dropout": ("lora.lora_dropout", ""),
    "lora_target": ("lora.target_modules", "all-linear, or a list of module names"),
    "lora_target_modules": ("lora.target_modules", "all-linear, or a list of module names"),
    "lora_target_linear": ("lora.target_modules", "write all-linear"),
    "exclude_modules": (
        "lora.target_modules",
        "the modules to adapt; only an adapter on disk may exclude some",
    ),
    "layers_to_transform": (
        "lora.target_modules",
        "whole names choose layers: model.layers.0.self_attn.q_proj",
    ),
    "target_parameters": (
        "",
        "only an adapter on disk may adapt experts in one tensor; leave the line out",
    ),
    "base_model": ("model.model_name_or_path", ""),
    "revision": ("model.model_revision", ""),
    "load_in_8bit": ("quantization.load_in_4bit", "4 bit or none"),
    "quantization_bit": ("quantization.load_in_4bit", "true for 4 bit"),
    "bf16": ("model.dtype", "bfloat16, float16, float32 or auto"),
    "fp16": ("model.dtype", "bfloat16, float16, float32 or auto"),
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
    "orpo_alpha": ("loss.beta", "λ in the paper"),
    "orpo_lambda": ("loss.beta", "λ in the paper"),
    "pref_beta": ("loss.beta", "λ in the paper"),
    "alpha": ("loss.beta", "λ in the paper; the adapter's alpha is lora.lora_alpha"),
    "pref_loss": ("loss.type", ""),
    "rl": ("loss.type", ""),
    "lr": ("training.learning_rate", ""),
    "num_epochs": ("training.num_train_epochs", ""),
    "epochs": ("training.num_train_epochs", ""),
    "optimizer": ("training.optim", ""),
    "lr_scheduler": ("training.lr_scheduler_type", ""),
    "save_steps": ("training.eval_steps", "each evaluation saves a checkpoint"),
    "save_strategy": ("training.eval_steps", "each evaluation saves a checkpoint"),
    "eval_strategy": ("training.eval_steps", "a share of all steps, or a number"),
    "evaluation_strategy": ("training.eval_steps", "a share of all steps, or a number"),
    "evals_per_epoch": ("training.eval_steps", "a share of all steps, or a number"),
    "logging_steps": ("", "every step is logged to metrics.jsonl; leave the line out"),
    "report_to": ("", "metrics.jsonl in the run folder holds every step; leave the line out"),
    "export_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_organization": ("output.hub_model_id", "owner/name"),
    "hub_private": ("output.hub_private_repo", ""),
    "hub_strategy": ("", "what is pushed is the result, once, at the end; leave the line out"),
    "hub_always_push": ("", "what is pushed is the result, once, at the end; leave the line out"),
    "hf_use_auth_token": (
        "",
        "the token is that of `hf auth login`, or of HF_TOKEN; leave the line out",
    ),
    "trust_remote_code": ("", "code from the hub is never run; leave the line out"),
    "resume_from_checkpoint": (
        "",
        "`orpo-lite train --resume` with the run's folder goes on with it; leave the line out",
    ),
    "overwrite_output_dir": (
        "",
        "a run folder is never overwritten: choose another training.output_dir",
    ),
    "do_train": ("", "that is what `orpo-lite train` does; leave the line out"),
    "do_eval": ("training.eval_steps", "a share of all steps, or a number"),
    "deepspeed": (
        "",
        "a base in 4 bit is held whole by each GPU, and nothing is sharded; leave the line out",
    ),
    "fsdp": (
        "",
        "a base in 4 bit is held whole by each GPU, and nothing is sharded; leave the line out",
    ),
    "fsdp_config": (
        "",
        "a base in 4 bit is held whole by each GPU, and nothing is sharded; leave the line out",
    ),
    "modules_to_save": (
        "",
        "LoRA alone is trained: embeddings and head stay as they are; leave the line out",
    ),
    "additional_target": (
        "",
        "LoRA alone is trained: embeddings and head stay as they are; leave the line out",
    ),
    "lora_modules_to_save": (
        "",
        "LoRA alone is trained: embeddings and head stay as they are; leave the line out",
    ),
    "adapter": (
        "",
        "a LoRA adapter is what is trained; quantization.load_in_4bit says on what; leave the line out",
    ),
    "finetuning_type": ("", "a LoRA adapter is what is trained; leave the line out"),
    "stage": ("loss.type", ""),
    "logging_dir": ("", "metrics.jsonl in the run folder holds every step; leave the line out"),
    "run_name": ("training.output_dir", "the run folder"),
    "save_total_limit": (
        "",
        "the newest checkpoints and the best one are kept; leave the line out",
    ),
    "dataloader_num_workers": ("", "tokens are read from a file; leave the line out"),
    "ref_model": ("", "ORPO needs no reference model; leave the line out"),
    "remove_unused_columns": ("", "unused columns are ignored; leave the line out"),
}


def answer_unknown(written: dict[str, Written]) -> Iterator[RecipeError]:
    """Unknown keys, answered by meaning where another tool's key is known, else by the nearest name."""
    batch = [f"{section}{key}" for section in ("", "training.") for key in BATCH_KEYS]
    product = _batch_product([written[key].value for key in batch if key in written])
    for key in [key for key in written if key not in _all_keys()]:
        entry, bare = written.pop(key), key.rsplit(".", 1)[-1]
        name = key if key in FOREIGN else bare
        ours, remark = FOREIGN.get(name, ("", ""))
        remark = f" ({remark})" if remark and ours else remark
        if key in batch and product:
            fix = f"training.global_batch_size: {product}{remark}"
        elif name in FOREIGN:
            fix = f"{ours}{remark}"
        elif bare in HOMES:
            fix = " or ".join(HOMES[bare])
        else:
            section, _, _ = key.rpartition(".")
            near = difflib.get_close_matches(
                bare, KEYS.get(section) or list(HOMES), n=1, cutoff=0.6
            )
            near = near or difflib.get_close_matches(bare, list(HOMES), n=1, cutoff=0.6)
            near_section = difflib.get_close_matches(section or bare, list(KEYS), n=1)
            fix = (
                HOMES[near[0]][0]
                if near
                else (f"section {near_section[0]}" if near_section else "")
            )
            fix = f"did you mean {fix}?" if fix else f"the sections are {', '.join(KEYS)}"
            yield RecipeError(
                where=entry.where,
                found=f"unknown key {key}",
                expected="a key of `orpo-lite recipes show NAME`",
                fix=fix,
            )
            continue
        yield RecipeError(
            where=entry.where,
            found=f"unknown key {key}",
            fix=f"write {fix}" if ours or bare in HOMES else fix,
        )


BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _batch_product(values: Sequence[Any]) -> int:
    """Their two keys multiplied: what global_batch_size is on one device. 0 when they are not numbers."""
    numbers = [int(value) for value in values if str(value).isdigit()]
    product = 1
    for number in numbers:
        product *= number
    return product if len(numbers) == len(values) > 0 else 0


def _all_keys() -> set[str]:
    return {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
