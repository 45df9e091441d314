"""TRL's trainers of the other objectives as oracles: ten steps with equal losses and gradients."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, in_float64, tiny_llama, write_pairs
from datasets import load_dataset
from peft import get_peft_model, set_peft_model_state_dict
from test_trl import BATCH, STEPS, TRAINER, flat_gradients, flat_weights
from test_trl_figures import FILE, LEARNING_RATE, our_model, our_steps
from torch.utils.data import SequentialSampler
from transformers import LlamaForSequenceClassification

from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.adapter import adapter_tensors
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.score_head import reward_config

pytest.importorskip("trl", reason="TRL, the oracle, comes with the extra `bench`")

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected")
# Trainer, its settings, the same settings of ours, and the metrics that both have.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Sequence[str]]] = {
    "orpo": ("ORPO", {"beta": 0.3}, {"type": "orpo", "beta": 0.3}, (*REWARDS, *LOGPS, "nll_loss")),
    "sft": ("SFT", {"completion_only_loss": True}, {"type": "sft"}, ()),
    "dpo": ("DPO", {"beta": 0.3}, {"type": "dpo", "beta": 0.3}, REWARDS + LOGPS),
    "ipo": ("DPO", {"loss_type": ["ipo"]}, {"type": "dpo", "dpo_loss_type": "ipo"}, REWARDS + LOGPS),
    "hinge": ("DPO", {"loss_type": ["hinge"]}, {"type": "dpo", "dpo_loss_type": "hinge"}, REWARDS + LOGPS),
    "rpo": (
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"type": "dpo", "rpo_alpha": 0.5},
        REWARDS + LOGPS,
    ),
    "cpo": ("CPO", {"label_smoothing": 0.1}, {"type": "cpo", "label_smoothing": 0.1}, (*REWARDS, *LOGPS, "nll_loss")),
    "simpo": (
        "CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7, "beta": 2.0},
        {"type": "simpo", "simpo_gamma": 0.7, "beta": 2},
        REWARDS + LOGPS,
    ),
    "reward": (
        "Reward",
        {"center_rewards_coefficient": 0.01},
        {"type": "reward", "center_rewards_coefficient": 0.01},
        ("accuracy", "margin", "mean_reward"),
    ),
}  # fmt: skip


def run_trl(kind: str, options: dict[str, Any], model: Any, file: Path) -> tuple[Any, ...]:
    """Ten steps of a trainer: the metrics and the gradient of each step, and the token sequences."""
    if kind == "CPO":
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    elif kind == "ORPO":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    elif kind == "Reward":
        from trl import RewardConfig as Config
        from trl import RewardTrainer as Trainer
    elif kind == "DPO":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    else:
        from trl import SFTConfig as Config
        from trl import SFTTrainer as Trainer
    metrics: list[dict[str, float]] = []
    gradients: list[torch.Tensor] = []

    class Oracle(Trainer):  # type: ignore[misc,valid-type]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def get_batch_loss_metrics(self, *args: Any, **kwargs: Any) -> Any:
            loss, found = super().get_batch_loss_metrics(*args, **kwargs)
            metrics.append(found)
            return loss, found

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if kind not in ("CPO", "ORPO"):
                metrics.append(
                    {name: values[-1] for name, values in self._metrics["train"].items()}
                )
            metrics[-1]["loss"] = loss.item()
            gradients.append(flat_gradients(self.model))
            return loss

    settings = Config(
        output_dir=str(file.parent / "trl"),
        learning_rate=LEARNING_RATE,
        **TRAINER,
        **options,
    )
    rows = load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(file.parent / "cache")
    )
    if kind == "SFT":
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    oracle = Oracle(
        model=model, args=settings, train_dataset=rows, processing_class=byte_tokenizer()
    )
    tokens = [pair_of(row) for row in oracle.train_dataset]
    oracle.train()
    return metrics, gradients, tokens


def classifier(model: PairModel) -> Any:
    """transformers' class for sequence classification with peft, with the weights of our reward model."""
    causal = tiny_llama(len(byte_tokenizer()))
    theirs = LlamaForSequenceClassification(reward_config(causal.config))
    theirs.model.load_state_dict(causal.model.state_dict())
    wrapped: Any = get_peft_model(theirs, copy.deepcopy(model.model.peft_config["default"]))
    set_peft_model_state_dict(wrapped, adapter_tensors(model))
    return in_float64(wrapped)


def pair_of(row: dict[str, Any]) -> TokenizedPair:
    """A trainer's row of tokens as a pair of ours."""
    if row.keys() >= {"chosen_ids", "rejected_ids"} and "prompt_ids" not in row:
        return TokenizedPair(row["chosen_ids"], row["rejected_ids"], 1, 1, "")
    if "labels" in row:
        return TokenizedPair(row["input_ids"], [], row["labels"].count(-100), 0, "")
    if "prompt_ids" in row:
        prompt = row["prompt_ids"]
        chosen, rejected = prompt + row["chosen_ids"], prompt + row["rejected_ids"]
        return TokenizedPair(chosen, rejected, len(prompt), len(prompt), "")
    starts = [row[f"{side}_labels"].count(-100) for side in ("chosen", "rejected")]
    return TokenizedPair(row["chosen_input_ids"], row["rejected_input_ids"], *starts, "")


# In each run, the stored figures of TRL (test_trl_figures.py) stand for it.
@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_ten_steps_equal_trl(case: str, tmp_path: Path) -> None:
    kind, options, loss, names = CASES[case]
    ours = our_model(loss)
    theirs = classifier(ours) if kind == "Reward" else copy.deepcopy(ours).model
    file = write_pairs(tmp_path / "pairs.jsonl", STEPS * BATCH)
    metrics, gradients, pairs = run_trl(kind, options, theirs, file)
    for step, found in enumerate(our_steps(ours, loss, pairs)):
        for name in ("loss", *names):
            expected = metrics[step][name]
            assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-5), (step, name)
        difference = (flat_gradients(ours) - gradients[step]).norm()
        assert difference <= 1e-5 * gradients[step].norm(), step  # hinge: both may be 0
    assert step == STEPS - 1
    assert (flat_weights(ours) - flat_weights(theirs)).norm() / flat_weights(theirs).norm() < 1e-4
    assert abs(metrics[-1]["loss"] - metrics[0]["loss"]) > 0.02


def write_figures(folder: Path) -> None:
    """Write the figures of the installed TRL to FILE, for the test that needs no TRL."""
    found = {}
    for case, (kind, options, loss, names) in CASES.items():
        ours = our_model(loss)
        theirs = classifier(ours) if kind == "Reward" else ours.model
        (folder / case).mkdir()
        file = write_pairs(folder / case / "pairs.jsonl", STEPS * BATCH)
        metrics, gradients, pairs = run_trl(kind, options, theirs, file)
        steps = [
            {name: float(row[name]) for name in ("loss", *names)}
            | {"norm of gradients": float(gradient.norm())}
            for row, gradient in zip(metrics, gradients, strict=True)
        ]
        rows = [
            [
                [*map(int, p.chosen_ids)],
                [*map(int, p.rejected_ids)],
                p.chosen_start,
                p.rejected_start,
            ]
            for p in pairs
        ]
        found[case] = {"loss": loss, "pairs": rows, "steps": steps}
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        write_figures(Path(name))
