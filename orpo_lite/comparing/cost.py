"""Tell what the training of an arm cost: sequences through the model, time and memory (§ 7.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_lite.comparing.task import Run
from orpo_lite.objectives.objective import find_objective
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.lock import read_recipe
from orpo_lite.runs.records import RESULT, read_json, readable_metrics


@dataclass(frozen=True)
class Cost:
    """The cost of one arm: means over its seeds. Of each arm alone, without the SFT before it."""

    trained_sequences: int
    """Sequences of a pair that go forward and backward through the model: 2, or 1 for SFT."""
    reference_sequences: int
    """Sequences of a pair that only go forward: through the reference model, once before the
    training; or, if ``samples``, of each sampled answer through policy, reference model, reward
    model and value model, in each step."""
    samples: bool
    """True: a step samples an answer to each prompt, and trains on it instead of the pair."""
    steps: float
    kept_step: float
    """The step whose adapter was kept. 0: no step was better than the start."""
    pairs: float
    """Number of pairs in all steps. A pair of a later epoch is counted again."""
    seconds: float
    """Time of all optimizer steps, without loading, evaluations and the reference pass."""
    memory_gib: float
    """Peak memory: of the tensors on a GPU, of the whole process on a CPU."""
    starts_from: str
    """The trainings that come before, such as "sft and reward"; "" if there are none."""
    learning_rate: float
    before_seconds: float = 0.0
    """Time of the steps of ``starts_from``."""


def sequences_of(recipe: Recipe) -> tuple[int, int]:
    """Return how many sequences go forward and backward, and how many only forward.

    They are those of a pair, or of a sampled answer. See :class:`Cost`.
    """
    if recipe.loss.type == "ppo":  # policy and value model in each pass over the answers
        return 2 * recipe.loss.num_ppo_epochs, 4
    needs = find_objective(recipe.loss).needs
    trained = 2 if "rejected" in needs else 1
    return trained, 2 if "reference" in needs else 0


def cost_of(runs: Sequence[Run], before: Sequence[Run]) -> Cost:
    """Return the cost of the runs of an arm. ``before``: the runs that they start from."""
    steps, kept, pairs, seconds, memory = [], [], [], [], []
    for run in runs:
        recipe = read_recipe(run.path)
        rows = [row for row in readable_metrics(run.path)[0] if row.get("tokens_per_second")]
        steps.append(rows[-1]["step"] if rows else 0)
        kept.append(read_json(run.path / RESULT, {"kept_step": int})["kept_step"])
        train_pairs = read_json(run.path / "data.json", {"train_pairs": int})["train_pairs"]
        pairs.append(_pairs_in(steps[-1], train_pairs, recipe.training.global_batch_size))
        seconds.append(_seconds(rows))
        memory.append(max((row["memory_gib"] for row in rows), default=0.0))
    recipe = read_recipe(runs[0].path)
    earlier = [_seconds(readable_metrics(run.path)[0]) for run in before]
    trained, reference = sequences_of(recipe)
    return Cost(
        trained_sequences=trained,
        reference_sequences=reference,
        samples=recipe.loss.type == "ppo",
        steps=_mean(steps),
        kept_step=_mean(kept),
        pairs=_mean(pairs),
        seconds=_mean(seconds),
        memory_gib=max(memory),
        starts_from=" and ".join(dict.fromkeys(run.arm.name for run in before)),
        learning_rate=recipe.training.learning_rate,
        before_seconds=sum(earlier) / len(runs),
    )


def _pairs_in(steps: int, pairs: int, batch: int) -> int:
    """Return the number of pairs in the first steps. The last step of an epoch may have fewer."""
    epochs, rest = divmod(steps, -(-pairs // batch))
    return epochs * pairs + rest * batch


def _seconds(rows: Sequence[dict[str, float]]) -> float:
    """Return the time of all steps, from the tokens so far and the tokens per second of each."""
    total, before = 0.0, 0.0
    for row in rows:
        if row.get("tokens_per_second"):
            total += (row["num_tokens"] - before) / row["tokens_per_second"]
            before = row["num_tokens"]
    return total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
