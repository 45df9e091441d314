"""The trainings that the experiments share: their recipes, their run folders and their scores."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from orpo_lite.api import train_events
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.errors import DataError, ModelError, RecipeError
from orpo_lite.evaluation.open_run import open_run
from orpo_lite.model.held_out import score
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.inputs import prepare_inputs
from orpo_lite.runs.records import RESULT, read_json, read_scores
from orpo_lite.updates import run_to_end, staged

SHARED = Path(__file__).parents[3] / "shared"
MODELS, DATA = SHARED / "models", SHARED / "data"
PAIRS = "hh-rlhf-harmless.jsonl"

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"type": "sft"},
    "orpo-0.1": {"type": "orpo", "beta": 0.1},
    "orpo-0.5": {"type": "orpo", "beta": 0.5},
    "orpo-1": {"type": "orpo", "beta": 1.0},
    "orpo-5": {"type": "orpo", "beta": 5.0},
    "pr-mean": {"type": "probability_ratio", "beta": 1.0, "ratio_of": "mean"},
    "pr-sum": {"type": "probability_ratio", "beta": 1.0, "ratio_of": "sum"},
}
"""Name of an arm -> its section ``loss``. Everything else is the same in all arms."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Base:
    """A base model, and the longest pairs that it is trained on."""

    name: str
    max_length: int
    max_prompt_length: int


MAIN = Base("stories260k", 512, 320)
SECOND = Base("babyllama1m", 256, 160)


@dataclass(frozen=True)
class Scores:
    """Mean log-probabilities of P pairs: of the chosen and of the rejected replies, in nats."""

    chosen_P: Array
    rejected_P: Array

    @property
    def margin_P(self) -> Array:  # noqa: N802 - its shape
        """Return how much more likely the chosen reply is, in nats a token."""
        return self.chosen_P - self.rejected_P


@dataclass(frozen=True)
class Run:
    """A finished training, with the scores of its pairs."""

    name: str
    held_out: Mapping[int, Scores]
    """Step -> scores of the held-out pairs, from step 0 to the last one."""
    training: Mapping[str, Scores]
    """``start`` and ``end`` -> scores of the training pairs."""
    prompts: Mapping[str, Sequence[bytes]]
    """``held-out`` and ``training`` -> the hash of the prompt of each pair."""

    def scores(self, pairs: str, when: str) -> Scores:
        """Return the scores of ``held-out`` or ``training`` pairs at the ``start`` or ``end``."""
        if pairs == "training":
            return self.training[when]
        return self.held_out[max(self.held_out) if when == "end" else 0]


@dataclass(frozen=True)
class Study:
    """Where the models, the data and the runs are, and how much is trained."""

    models: Path = MODELS
    data: Path = DATA
    judge: Path | None = None
    """The base of the judge of E5: a folder with a chat model. None: the base of the arms."""
    folder: Path = Path("runs/paper")
    seeds: tuple[int, ...] = (42, 43)
    """The seeds of E1 to E4. The others have the first one."""
    epochs: float = 3
    rows: int | None = None
    """Number of rows to read of the data; None: all."""

    def __post_init__(self) -> None:
        for base in (MAIN, SECOND):
            if not (self.models / base.name / "config.json").is_file():
                raise ModelError(
                    where=f"--models {self.models}",
                    found=f"has no model {base.name}",
                    expected=f"a folder with the models {MAIN.name} and {SECOND.name}",
                    fix="--models FOLDER",
                )
        if self.judge and not (self.judge / "config.json").is_file():
            raise ModelError(
                where=f"--judge {self.judge}",
                found="has no model",
                expected="a folder with a chat model, such as SmolLM2-135M-Instruct",
                fix="--judge FOLDER",
            )
        if not self.pairs.is_file():
            raise DataError(
                where=f"--data {self.data}",
                found=f"has no file {PAIRS}",
                expected="a folder with pairs of HH-RLHF and the prompts of the graders",
                fix="--data FOLDER",
            )

    @property
    def pairs(self) -> Path:
        """The file of preference pairs."""
        return self.data / PAIRS

    def recipe(self, base: Base, arm: str, seed: int) -> Recipe:
        """Return the recipe of one training."""
        tree = {
            "model": {
                "model_name_or_path": str((self.models / base.name).resolve()),
                "device": "cpu",
            },
            "quantization": {"load_in_4bit": False},
            # The rank is the width of the smaller model: its square matrices can change freely.
            "lora": {"r": 64, "lora_alpha": 64},
            "data": {
                "dataset_name": str(self.pairs.resolve()),
                "max_length": base.max_length,
                "max_prompt_length": base.max_prompt_length,
                "test_split_size": 0.2,
                "max_samples": self.rows,
            },
            # Eq. 1 and 6: the NLL of the reply, in SFT as in ORPO.
            "loss": {**ARMS[arm], "completion_only_loss": True},
            "training": {
                "output_dir": str(self.path(base, arm, seed).absolute()),
                "learning_rate": 3e-3,
                "global_batch_size": 16,
                "num_train_epochs": self.epochs,
                "optim": "adamw_torch",
                "eval_steps": 0.25,
                "load_best_model_at_end": False,
                "seed": seed,
            },
            "memory": {"activation_checkpointing": "none", "micro_batch_tokens": 4096},
            "output": {"merge": False, "report": False, "samples": 0},
        }
        return Recipe.model_validate(tree)

    def path(self, base: Base, arm: str, seed: int) -> Path:
        """Return the run folder of one training."""
        return self.folder / base.name / f"{arm}-seed{seed}"

    def run(self, arm: str, seed: int, base: Base = MAIN) -> Run:
        """Return a training, which is trained, or trained further, if it is not finished."""
        path, recipe = self.path(base, arm, seed), self.recipe(base, arm, seed)
        began = time.monotonic()
        is_begun = (path / "recipe.yaml").is_file()
        if is_begun:
            _refuse_other(path, recipe)
        if not (path / RESULT).is_file():
            print(f"training {base.name} {arm} seed {seed}", flush=True)
            run_to_end(train_events(recipe, resume=is_begun), lambda _: None)
        scored = path / "training_scores.json"
        train, test = read_pairs(recipe)
        if not scored.is_file():
            # Without the adapter, all arms of a seed have the same scores.
            start = path.with_name(f"start-seed{seed}.json")
            found = _score_training(path, train, recipe, start)
            write_text(scored, to_json(found | {"seconds": time.monotonic() - began}))
        known = read_json(scored)
        return Run(
            name=f"{base.name} {arm} seed {seed}",
            held_out={row["step"]: _scores(row) for row in read_scores(path)},
            training={when: _scores(known[when]) for when in ("start", "end")},
            prompts={"held-out": test.prompts(), "training": train.prompts()},
        )

    def runs(self, arm: str, base: Base = MAIN) -> list[Run]:
        """Return the trainings of an arm, one for each seed."""
        return [self.run(arm, seed, base) for seed in self.seeds]

    def trainings(self) -> list[dict[str, Any]]:
        """Return what is known of each finished training in the folder: its size and its time."""
        found = []
        for file in sorted(self.folder.glob("*/*/training_scores.json")):
            path, known = file.parent, read_json(file)
            rows = read_scores(path)
            found.append(
                {
                    "base": path.parent.name,
                    "arm": path.name.partition("-seed")[0],
                    "seed": int(path.name.partition("-seed")[2]),
                    "pairs": len(known["end"]["chosen"]),
                    "held_out": len(rows[-1]["chosen"]),
                    "steps": rows[-1]["step"],
                    "seconds": round(known["seconds"], 1),
                }
            )
        return found


def _refuse_other(path: Path, recipe: Recipe) -> None:
    """Raise :class:`RecipeError` if the run in ``path`` was not trained with ``recipe``."""
    before = dict(load_recipe(str(path / "recipe.yaml")).items())
    other = sorted(key for key, value in recipe.items() if before[key] != value)
    if other:
        raise RecipeError(
            where=f"run {path}",
            found=f"was trained with another value of {', '.join(other)}",
            expected="a run of this study",
            fix="--folder OTHER, or remove the run",
        )


def read_pairs(recipe: Recipe) -> tuple[TokenizedPairs, TokenizedPairs]:
    """Return the training and the held-out pairs of a training."""
    # The pairs depend on neither the loss nor the name of the run.
    plain = {"loss.type": "orpo", "loss.beta": 0.1, "loss.ratio_of": "mean"}
    return _prepared(recipe.override(plain | {"training.output_dir": "none"}).to_yaml())


@lru_cache
def _prepared(recipe: str) -> tuple[TokenizedPairs, TokenizedPairs]:
    inputs = run_to_end(
        prepare_inputs(Recipe.model_validate(yaml.safe_load(recipe))), lambda _: None
    )
    return inputs.train, inputs.test


def _score_training(
    path: Path, pairs: TokenizedPairs, recipe: Recipe, known: Path
) -> dict[str, Any]:
    """Return the scores of the training pairs without the adapter and with it.

    ``known`` is a file with the scores without it, which is written if it does not exist.
    """
    opened = run_to_end(open_run(path), lambda _: None)

    def scored() -> dict[str, list[float]]:
        found = run_to_end(staged("scoring", score(opened.model, pairs, recipe)), lambda _: None)
        return {"chosen": found.chosen_P.tolist(), "rejected": found.rejected_P.tolist()}

    if not known.is_file():
        with opened.model.without_adapter():
            write_text(known, to_json(scored()))
    return {"start": read_json(known), "end": scored()}


def _scores(row: Mapping[str, Any]) -> Scores:
    return Scores(np.array(row["chosen"], np.float64), np.array(row["rejected"], np.float64))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
