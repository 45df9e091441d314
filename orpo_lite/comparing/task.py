"""Check the arguments of a comparison, and record them in its folder.

A folder belongs to the arguments with which it began, so that its table never mixes two
comparisons.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from orpo_lite import __version__
from orpo_lite.base.find import find_base
from orpo_lite.comparing.arms import ARMS as ARMS_BY_NAME
from orpo_lite.comparing.arms import (
    JUDGE_ARM,
    OWN_REWARD,
    REWARD_ARM,
    REWARD_KEY,
    SFT,
    Arm,
    Words,
    arm_recipe,
    choose_arms,
    name_arm,
    read_words,
    trained_arms,
)
from orpo_lite.comparing.split import ARMS, JUDGE, part_settings
from orpo_lite.errors import OrpoLiteError, RecipeError
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.commands import quoted
from orpo_lite.runs.inputs import with_absolute_paths
from orpo_lite.runs.records import read_json

FILE = "compare.json"
ADAPTER_KEY = "model.adapter_name_or_path"
BASE_KEY = "model.model_name_or_path"
SHOWN = 5  # differences in one message


@dataclass(frozen=True)
class Run:
    """A training of a comparison."""

    name: str
    """The name of its folder, such as dpo-seed42."""
    arm: Arm
    seed: int
    path: Path


@dataclass(frozen=True)
class Task:
    """The arguments of a comparison, after their checks."""

    recipe: Recipe
    """The recipe with the words for all arms. ``training.output_dir`` is the comparison's folder,
    so a built-in base is next to it."""
    name: str
    """The name or path of the recipe."""
    words: Words
    arms: Sequence[Arm]
    """The arms to compare."""
    seeds: int
    rounds: int
    prompts: int | None
    max_new_tokens: int
    folder: Path

    @property
    def data(self) -> Path:
        """The folder of the divided pairs."""
        return self.folder / "data"

    @property
    def seed(self) -> int:
        """The first seed."""
        return self.recipe.training.seed

    @cached_property
    def judge(self) -> Run:
        """The training of the judge."""
        return Run(JUDGE, JUDGE_ARM, self.seed, self.folder / "runs" / JUDGE)

    @property
    def base(self) -> str:
        """The base of all arms, as the recipe names it."""
        return self.recipe.model.model_name_or_path

    @cached_property
    def judge_recipe(self) -> Recipe:
        """The recipe of the judge, without the data and the folders of the comparison."""
        return with_absolute_paths(arm_recipe(self.name, self.words, JUDGE_ARM, self.seed))

    @property
    def judge_base(self) -> str:
        """The base of the judge: that of the arms, unless a word names another."""
        return self.judge_recipe.model.model_name_or_path

    def runs_of(self, arm: Arm) -> list[Run]:
        """Return the trainings of an arm, one for each seed."""
        return [
            Run(name, arm, seed, self.folder / "runs" / name)
            for seed in range(self.seed, self.seed + self.seeds)
            for name in [f"{arm.name}-seed{seed}"]
        ]

    @cached_property
    def runs(self) -> list[Run]:
        """All trainings, in an order in which each finds the adapter that it starts from."""
        return [self.judge, *(run for arm in trained_arms(self.arms) for run in self.runs_of(arm))]

    @property
    def reward_runs(self) -> list[Run]:
        """The trainings of PPO's reward models, one for each seed; [] if ppo is no arm."""
        return self.runs_of(REWARD_ARM) if REWARD_ARM in trained_arms(self.arms) else []

    def read_by(self, run: Run) -> dict[str, Run]:
        """Return the runs whose adapters a run reads: the key that names the adapter -> its run."""
        found = {ADAPTER_KEY: ARMS_BY_NAME[SFT]} if run.arm.after_sft else {}
        if REWARD_KEY in run.arm.settings:
            found[REWARD_KEY] = REWARD_ARM
        place = run.seed - self.seed
        return {key: self.runs_of(arm)[place] for key, arm in found.items()}

    def run_recipe(self, run: Run, base: Path | str, pairs: int) -> Recipe:
        """Return the recipe of a run.

        Args:
            run: the run.
            base: the base model.
            pairs: number of pairs to train on.
        """
        recipe = arm_recipe(self.name, self.words, run.arm, run.seed)
        values = part_settings(self.data.absolute(), JUDGE if run is self.judge else ARMS)
        values["training.output_dir"] = str(run.path)
        own = run is self.judge and self.judge_base != self.base
        values["model.model_name_or_path"] = self.judge_base if own else str(base)
        values["output.push_to_hub"] = False
        # The comparison has a report and answers of its own.
        defaults = {"output.report": False, "output.samples": 0}
        values |= {k: v for k, v in defaults.items() if recipe.sources[k] == "default"}
        given = dict(recipe.items())
        for key, read in self.read_by(run).items():
            if key == ADAPTER_KEY or given[key] == OWN_REWARD:
                values[key] = str(read.path.absolute() / "adapter")
        steps = recipe.training.max_steps
        if run.arm.one_epoch and steps > math.ceil(pairs / recipe.training.global_batch_size):
            values["training.max_steps"] = -1  # num_train_epochs decides
        return recipe.override(values)

    def arguments(self) -> dict[str, Any]:
        """Return what determines the result, as JSON values: the content of compare.json."""
        recipes = {}
        for arm in (JUDGE_ARM, *trained_arms(self.arms)):
            values = dict(
                with_absolute_paths(arm_recipe(self.name, self.words, arm, self.seed)).items()
            )
            values.pop("training.output_dir")
            recipes[arm.name] = values
        return {
            "--arms": [arm.name for arm in self.arms],
            "--seeds": self.seeds,
            "--rounds": self.rounds,
            "--prompts": self.prompts,
            "--max-new-tokens": self.max_new_tokens,
            "recipes": json.loads(json.dumps(recipes)),
        }


def prepare_task(
    name: str,
    words: Sequence[str],
    *,
    arms: str,
    seeds: int,
    rounds: int,
    prompts: int | None,
    max_new_tokens: int,
    out: str | Path | None,
) -> Task:
    """Return a task whose arguments are checked. Nothing is written.

    The recipes of all arms are built, and a base that only the judge has is found. So their errors
    come before any data are read.

    For the arguments see :func:`orpo_lite.comparing.compare.compare`.

    Raises:
        RecipeError: an argument is wrong, or ``out`` is the folder of another comparison.
        OrpoLiteError: the judge's own base cannot be used.
    """
    for option, value in (("--seeds", seeds), ("--rounds", rounds), ("--prompts", prompts)):
        if value is not None and value < 1:
            raise RecipeError(
                where=option, found=f"{value}", expected="1 or more", fix=f"{option} 1"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            where="orpo-lite compare",
            found="was started by a launcher of several processes",
            expected="one process, which trains one arm after another",
            fix="start the command without accelerate launch or torchrun",
        )
    chosen = choose_arms(arms)
    divided = read_words(words, chosen)
    recipe = load_recipe(name, divided.common)
    folder = Path(out).expanduser() if out else Path(f"{recipe.training.output_dir}-compare")
    recipe = with_absolute_paths(recipe).override({"training.output_dir": str(folder)})
    defaults = _answer_length(recipe, max_new_tokens) | _judge_limits(name, divided, recipe)
    divided = replace(divided, defaults=defaults)
    task = Task(recipe, name, divided, chosen, seeds, rounds, prompts, max_new_tokens, folder)
    _refuse_other(task, task.arguments())
    return task


def _answer_length(recipe: Recipe, max_new_tokens: int) -> dict[str, list[str]]:
    """Return the default of PPO's largest answer: that of the comparison, if it fits.

    A value in the recipe's file is kept.
    """
    key = "loss.response_length"
    if recipe.sources[key] != "default":
        return {}
    free = recipe.data.max_length - recipe.data.prompt_limit
    return {"ppo": [f"{key}={min(max_new_tokens, free)}"]}


def _judge_limits(name: str, words: Words, recipe: Recipe) -> dict[str, list[str]]:
    """Find the judge's own base, if it has one. Return the limits that its positions demand.

    The judge reads texts, so it may cut them earlier than the arms do.

    Raises:
        RecipeError: a word gives the judge a data.max_length above the positions of its base.
        OrpoLiteError: the base cannot be used.
    """
    judge = with_absolute_paths(arm_recipe(name, words, JUDGE_ARM, recipe.training.seed))
    if judge.model.model_name_or_path == recipe.model.model_name_or_path:
        return {}
    try:
        base = find_base(judge.model.model_name_or_path, judge.model.model_revision)
    except OrpoLiteError as error:
        name_arm(error, JUDGE, JUDGE)
        written = next(word for word in words.of_arm[JUDGE] if word.startswith(BASE_KEY))
        error.fix = error.fix or (
            f"leave out {JUDGE}:{written}, so that the judge has the base of the arms, or name "
            f"another: {JUDGE}:{BASE_KEY}=NAME"
        )
        raise
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    limit, prompt_limit = judge.data.max_length, judge.data.prompt_limit
    if positions is None or limit <= positions:
        return {}
    limits = [f"data.max_length={positions}"]
    if prompt_limit >= positions:
        limits.append("data.max_prompt_length=auto")
    if words.sets(JUDGE, "data.max_length"):
        raise RecipeError(
            where="command line",
            found=f"{JUDGE}:data.max_length is {limit:,}, but {base.name} has {positions:,} "
            "positions (max_position_embeddings)",
            expected=f"at most {positions:,} tokens",
            fix=" ".join(f"{JUDGE}:{word}" for word in limits),
        )
    return {JUDGE: limits}


def _refuse_other(task: Task, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`RecipeError` if the folder holds anything but this comparison."""
    folder, file = task.folder, task.folder / FILE
    new = next(
        path
        for number in count(2)
        if not (path := folder.with_name(f"{folder.name}-{number}")).exists()
    )
    if file.is_file():
        differences = _differences(read_json(file), arguments)
        if differences and any((folder / "runs").glob("*/recipe.yaml")):
            more = len(differences) - SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise RecipeError(
                where=f"--out {folder}",
                found="holds a comparison with other arguments: "
                f"{'; '.join(differences[:SHOWN])}{rest}",
                expected="the arguments with which the comparison began, or a new folder",
                fix=f"--out {quoted(new)}",
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):
        raise RecipeError(
            where=f"--out {folder}",
            found="exists and is not a comparison",
            expected="a new folder",
            fix=f"--out {quoted(new)}",
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a text for each argument that differs, such as ``--rounds: 3 -> 2``."""
    found = []
    for key, value in now.items():
        if key != "recipes" and before.get(key) != value:
            found.append(f"{key}: {_text(before.get(key))} -> {_text(value)}")
    known = before.get("recipes", {})
    for arm, values in now["recipes"].items():
        if arm not in known:
            continue  # --arms differs, too
        for key, value in values.items():
            if key in known[arm] and known[arm][key] != value:
                found.append(f"{arm}:{key}: {to_text(known[arm][key])} -> {to_text(value)}")
    return found


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else to_text(value)


def record(task: Task) -> None:
    """Create the folder of a comparison, and write compare.json.

    If the folder holds a comparison with other arguments, of which no training has begun, its pairs
    are removed.
    """
    arguments = task.arguments()
    if (file := task.folder / FILE).is_file():
        if not _differences(read_json(file), arguments):
            return
        shutil.rmtree(task.data, ignore_errors=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    write_text(file, to_json({"orpo_lite": __version__, **arguments}))


def is_recorded(task: Task) -> bool:
    """Return whether the folder of a comparison has its compare.json and the divided pairs."""
    file = task.folder / FILE
    return (
        file.is_file()
        and task.data.is_dir()
        and not _differences(read_json(file), task.arguments())
    )
