"""TRL's ORPOTrainer as the oracle: the same tokens, ten steps, the same losses, gradients and weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama, tiny_opt, write_pairs
from datasets import load_dataset
from test_step import lora_model
from torch.utils.data import SequentialSampler

from orpo_lite.data.chat_template import set_chat_template
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.data.pairs import PairReader
from orpo_lite.data.render_process import Renderer
from orpo_lite.data.split import training_sources
from orpo_lite.data.tokenize import tokenize_pairs
from orpo_lite.model.optimizer import lr_factor, make_optimizer
from orpo_lite.model.parallel import Processes
from orpo_lite.objectives.objective import find_objective
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.training.step import accumulate, update

trl = pytest.importorskip(
    "trl.experimental.orpo", reason="TRL, the oracle, comes with the extra `bench`"
)

STEPS, BATCH, LEARNING_RATE = 10, 4, 1e-2
TRAINER: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "max_length": 256,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
FIGURES = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "logps/chosen",
    "logps/rejected",
)
FIGURES += ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def flat_gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [p.grad.detach().flatten().clone() for p in model.parameters() if p.requires_grad]
    )  # type: ignore[union-attr]


def flat_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def run_trl(
    model: Any, pairs: Path, folder: Path
) -> tuple[list[dict[str, float]], list[torch.Tensor], Any]:
    """Ten steps of TRL on the pairs in file order; what it computed at each, and its tokens."""
    figures, gradients = [], []

    class Oracle(trl.ORPOTrainer):  # type: ignore[misc,name-defined]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def get_batch_loss_metrics(self, *args: Any, **kwargs: Any) -> Any:
            loss, metrics = super().get_batch_loss_metrics(*args, **kwargs)
            figures.append({"loss": loss.item(), **metrics})
            return loss, metrics

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            gradients.append(flat_gradients(self.model))
            return loss

    settings = trl.ORPOConfig(
        output_dir=str(folder),
        beta=0.1,
        learning_rate=LEARNING_RATE,
        **TRAINER,
    )
    rows = load_dataset(
        "json", data_files=str(pairs), split="train", cache_dir=str(folder / "cache")
    )
    oracle = Oracle(
        model=model, args=settings, train_dataset=rows, processing_class=byte_tokenizer()
    )
    oracle.train()
    return figures, gradients, oracle.train_dataset


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_ten_steps_equal_trl(make: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ours = lora_model(make(len(tokenizer)), torch.float32)
    theirs = copy.deepcopy(ours)
    file = write_pairs(tmp_path / "pairs.jsonl", STEPS * BATCH)
    figures, gradients, tokens = run_trl(theirs.model, file, tmp_path / "trl")

    recipe = load_recipe(
        "mistral-qlora",
        [
            f"data.dataset_name={file}",
            "data.test_split_size=0",
            "data.chat_template=none",
            "data.max_length=256",
            "data.max_prompt_length=200",
            "loss.beta=0.1",
            "training.optim=adamw_torch",
            f"memory.micro_batch_size={BATCH}",
            f"training.learning_rate={LEARNING_RATE}",
            "training.lr_scheduler_type=constant",
            "training.warmup_steps=0",
        ],
    )
    renderer = Renderer(set_chat_template(tokenizer, recipe.data))
    reader = PairReader(recipe.data, training_sources(recipe.data))
    found = [pair for _, pair in tokenize_pairs(reader, renderer, tokenizer, recipe.data)]
    pairs = [pair for pair in found if isinstance(pair, TokenizedPair)]
    assert len(pairs) == len(found)
    for pair, row in zip(pairs, tokens, strict=True):
        assert list(pair.chosen_ids) == row["chosen_input_ids"]
        assert list(pair.rejected_ids) == row["rejected_input_ids"]
        assert row["chosen_labels"][: pair.chosen_start] == [-100] * pair.chosen_start
        assert row["chosen_labels"][pair.chosen_start] != -100

    trained = [parameter for _, parameter in ours.trained()]
    optimizer, scaler = make_optimizer(recipe, trained), torch.amp.GradScaler("cpu", enabled=False)
    batching, objective = ours.batching(recipe, tokenizer.pad_token_id), find_objective(recipe.loss)
    factor, processes = lr_factor(recipe, optimizer, STEPS), Processes(cpu=True)
    for step in range(STEPS):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor(step)
        parts = accumulate(
            ours,
            objective,
            batch,
            batching,
            step=step,
            seed=recipe.training.seed,
            processes=processes,
            scaler=scaler,
        )
        found = objective.metrics(parts)
        for name in FIGURES:
            assert found[name] == pytest.approx(figures[step][name], rel=1e-5, abs=1e-5), (
                step,
                name,
            )
        difference = (flat_gradients(ours) - gradients[step]).norm() / gradients[step].norm()
        assert difference < 1e-5, step
        update(trained, optimizer, scaler, found["loss"], recipe.training.max_grad_norm)
    assert (flat_weights(ours) - flat_weights(theirs)).norm() / flat_weights(theirs).norm() < 1e-4
    assert (
        figures[-1]["loss"] < figures[0]["loss"] - 0.1
    )  # they learnt; equality was not that of standing still
