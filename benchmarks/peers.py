"""TRL's ORPOTrainer without its loop: its own model preparation, tokens in its own collator, its own loss.

Its code runs unchanged; this file only hands it batches. TRL's defaults are kept where a user would keep them: bf16,
gradient checkpointing, paged 8-bit AdamW.
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
    """An ORPOTrainer on a 4-bit model, ready for :func:`train_step`; accelerate wraps its forward as when it trains."""
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
    rows = Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    )  # its batches come from us
    trainer = ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare_model(
        trainer.model.train()
    )  # bf16 inside, float32 logits
    return trainer


def train_step(trainer: Any, pairs: Sequence[TokenizedPair]) -> float:
    """Forward, backward, clipping and the optimizer's step on one batch; the loss."""
    loss = backward(trainer, pairs)
    update(trainer)
    return loss


def backward(trainer: Any, pairs: Sequence[TokenizedPair], share: float = 1.0) -> float:
    """Forward and backward of a micro-batch that is this share of its step; the loss."""
    trainer.current_gradient_accumulation_steps = 1 / share
    return float(
        trainer.training_step(
            trainer.model_wrapped, trainer.data_collator([_row(pair) for pair in pairs])
        )
    )


def update(trainer: Any) -> None:
    """Clipping and the optimizer's step."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def _row(pair: TokenizedPair) -> dict[str, Any]:
    """What TRL's tokenize_row makes of a pair."""
    row: dict[str, Any] = {}
    for side, ids, start in (
        ("chosen", pair.chosen_ids, pair.chosen_start),
        ("rejected", pair.rejected_ids, pair.rejected_start),
    ):
        tokens = [int(token) for token in ids]
        row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = tokens, [1] * len(tokens)
        row[f"{side}_labels"] = [-100] * start + tokens[start:]
    row["prompt_input_ids"] = row["chosen_input_ids"][: pair.chosen_start]
    row["prompt_attention_mask"] = [1] * pair.chosen_start
    return row


# --- on the meta device


def meta_model(model: Any, lora: LoraConfig) -> Any:
    """peft's model with its checkpointing, on meta; in one dtype throughout, which counts less than TRL really holds.

    TRL's preparation for 4-bit training copies norms, embeddings and head to float32; there is no autocast on meta, so
    that is left out here, to TRL's advantage.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.forward = convert_outputs_to_fp32(
        model.forward
    )  # as accelerate does under mixed precision
    return model.train()


def meta_loss(model: Any, pairs: Sequence[TokenizedPair]) -> torch.Tensor:
    """TRL's own forward pass and loss; its metrics read values, which meta tensors have none of."""
    width = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)
    rows = torch.zeros(len(pairs), width, dtype=torch.long, device="meta")
    sides = ("chosen", "rejected")
    batch = {
        f"{side}_{name}": rows
        for side in sides
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
    chosen, rejected, _, _, nll = ORPOTrainer.concatenated_forward(trainer, model, batch)  # type: ignore[arg-type]
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
    return nll - losses.mean()
