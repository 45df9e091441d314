"""Tell how the reward models of a comparison were trained: the judge, and the model of PPO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orpo_lite.comparing.task import Run
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import RESULT, read_json, readable_metrics

FEW_STEPS = 10
"""With fewer steps, the learning rate is hardly the fault: most of them are the warm-up."""


@dataclass(frozen=True)
class RewardTraining:
    """The training of one reward model."""

    name: str
    """The name of its run, such as judge or reward-seed42."""
    pairs: int
    """Number of pairs that it was trained on."""
    part_pairs: int
    """Number of pairs of its part of the data. Those that are too long for it are left out."""
    steps: int
    kept_step: int
    """The step whose adapter was kept. 0: no step was better than the start."""
    learning_rate: float
    num_train_epochs: float
    max_steps: int
    """-1: ``num_train_epochs`` determines the number of steps."""
    accuracy: float | None
    """Share of the validation pairs whose chosen reply has the higher reward, at the kept step.
    None: it was not measured. The adapter was chosen by the loss on the same pairs."""
    validation_pairs: int


def training_of(run: Run, part_pairs: int) -> RewardTraining:
    """Return how the reward model of a finished run was trained.

    Args:
        run: the run.
        part_pairs: number of pairs of its part of the data.

    Raises:
        CheckpointError: a file of the run is missing or damaged.
    """
    recipe = read_recipe(run.path)
    counts = read_json(run.path / "data.json", {"train_pairs": int, "held_out_pairs": int})
    ended = read_json(run.path / RESULT, {"steps": int, "kept_step": int})
    evaluations = [
        row["eval_accuracy"]
        for row in readable_metrics(run.path)[0]
        if row["step"] == ended["kept_step"] and "eval_accuracy" in row
    ]
    return RewardTraining(
        name=run.name,
        pairs=counts["train_pairs"],
        part_pairs=part_pairs,
        steps=ended["steps"],
        kept_step=ended["kept_step"],
        learning_rate=recipe.training.learning_rate,
        num_train_epochs=recipe.training.num_train_epochs,
        max_steps=recipe.training.max_steps,
        accuracy=evaluations[-1] if evaluations else None,
        validation_pairs=counts["held_out_pairs"],
    )


def advice(arm: str, training: RewardTraining) -> str:
    """Return how a reward model could become better.

    An untrained one with enough steps needs a lower learning rate. Any other needs more pairs or
    more steps.

    Args:
        arm: judge or reward, for the words that set a key.
        training: how it was trained.
    """
    if training.kept_step == 0 and training.steps >= FEW_STEPS:
        rate = f"{training.learning_rate / 10:.2g}"
        return f"try a lower learning rate, such as {arm}:training.learning_rate={rate}"
    if training.max_steps > 0:  # then the number of epochs has no effect
        steps = max(2 * FEW_STEPS, 3 * training.max_steps)
        return f"give it more pairs, or more steps, such as {arm}:training.max_steps={steps}"
    epochs = 3 * training.num_train_epochs
    if training.steps < FEW_STEPS:
        wanted = training.num_train_epochs * 2 * FEW_STEPS / max(1, training.steps)
        epochs = max(epochs, math.ceil(wanted))
    return f"give it more pairs, or more epochs, such as {arm}:training.num_train_epochs={epochs:g}"


def verdict_on(trainings: Sequence[RewardTraining]) -> list[str]:
    """Return a sentence about the reward models of PPO, one for each seed; [] if there are none."""
    if not trainings:
        return []
    shares = ["an unknown share" if t.accuracy is None else f"{t.accuracy:.1%}" for t in trainings]
    models = "model ranks" if len(trainings) == 1 else "models rank"
    text = f"ppo's reward {models} {', '.join(shares)} of {trainings[0].validation_pairs:,} "
    text += "validation pairs correctly"
    untrained = [training for training in trainings if training.kept_step == 0]
    if untrained:
        names = ", ".join(training.name for training in untrained)
        text += f"; {names} kept step 0, so it is untrained and ppo learned from random rewards; "
        text += advice("reward", untrained[0])
    return [text]
