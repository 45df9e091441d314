"""Steps of TRL's ORPOTrainer: its own model preparation, collator and loss, without its loop.

TRL's code runs unchanged; this file only passes batches to it. The settings are those that a user
would keep: bf16, gradient checkpointing, paged 8-bit AdamW.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from orpo_lite.data.pair import TokenizedPair


def make_trainer(
    model: Any, tokenizer: PreTrainedTokenizerFast, lora: LoraConfig, folder: str, **changes: Any
) -> Any:
    """Return an ORPOTrainer on a 4-bit model, ready for :func:`train_step`.

    accelerate wraps the model's forward pass as it does in a training.
    """
    settings = {
        "bf16": True,
        "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit",
        "per_device_train_batch_size": 8,
        "beta": 0.1,
        "max_length": 2048,
        "learning_rate": 1e-4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    arguments = ORPOConfig(
        output_dir=folder, use_cpu=not torch.cuda.is_available(), **(settings | changes)
    )
    disable_progress_bars()
    # The trainer needs a dataset, but train_step passes its batches.
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.create_optimizer()
    # bf16 inside, float32 logits
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model.train())
    return trainer


def train_step(trainer: Any, pairs: Sequence[TokenizedPair]) -> float:
    """Take one optimizer step (forward, backward, clipping, update) and return its loss."""
    loss = backward(trainer, pairs)
    update(trainer)
    return loss


def backward(trainer: Any, pairs: Sequence[TokenizedPair], share: float = 1.0) -> float:
    """Run forward and backward of a micro-batch that is ``share`` of its step; return its loss."""
    trainer.current_gradient_accumulation_steps = 1 / share
    batch = trainer.data_collator([_row(pair) for pair in pairs])
    return float(trainer.training_step(trainer.model_wrapped, batch))


def update(trainer: Any) -> None:
    """Clip the gradients and take the optimizer's step."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def _row(pair: TokenizedPair) -> dict[str, Any]:
    """Return a pair as TRL's tokenize_row returns it."""
    row: dict[str, Any] = {}
    for reply, ids, start in (
        ("chosen", pair.chosen_ids, pair.chosen_start),
        ("rejected", pair.rejected_ids, pair.rejected_start),
    ):
        tokens = [int(token) for token in ids]
        row[f"{reply}_input_ids"] = tokens
        row[f"{reply}_attention_mask"] = [1] * len(tokens)
        row[f"{reply}_labels"] = [-100] * start + tokens[start:]
    row["prompt_input_ids"] = row["chosen_input_ids"][: pair.chosen_start]
    row["prompt_attention_mask"] = [1] * pair.chosen_start
    return row


# --- on the meta device


def meta_model(model: Any, lora: LoraConfig) -> Any:
    """Return peft's model with checkpointing on the meta device, all in one dtype.

    This counts less memory than TRL really takes: its preparation for 4-bit training copies norms,
    embeddings and head to float32. The meta device has no autocast, so the copies are left out.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    # accelerate does the same under mixed precision.
    model.forward = convert_outputs_to_fp32(model.forward)
    return model.train()


def meta_loss(model: Any, pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """Return TRL's loss, without its metrics: they read values, which meta tensors do not have."""
    width = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    rows = torch.zeros(len(pairs), width, dtype=torch.long, device="meta")
    batch = {
        f"{reply}_{name}": rows
        for reply in ("chosen", "rejected")
        for name in ("input_ids", "attention_mask", "labels")
    }
    trainer = SimpleNamespace(
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
        is_encoder_decoder=False,
        padding_value=0,
        aux_loss_enabled=False,
        beta=0.1,
        accelerator=SimpleNamespace(device=torch.device("meta")),
    )
    forward: Any = ORPOTrainer.concatenated_forward  # typed for a trainer, not for its stand-in
    chosen, rejected, _, _, nll = forward(trainer, model, batch)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
    return nll - losses.mean()
