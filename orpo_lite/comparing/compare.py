"""Compare objectives on a person's data: which gives the best answers, and at what cost."""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import numpy as np

from orpo_lite import demo
from orpo_lite.comparing.answers import TEMPERATURE, Rounds, judge_all, sample_all
from orpo_lite.comparing.arms import DEFAULT_ARMS
from orpo_lite.comparing.cost import cost_of
from orpo_lite.comparing.diversity import (
    BASE,
    SENTENCES,
    Diversity,
    Embed,
    base_states,
    diversity,
    load_sentence_model,
    mean_diversity,
    sentence_model,
)
from orpo_lite.comparing.page import write_page
from orpo_lite.comparing.reward_models import training_of
from orpo_lite.comparing.split import (
    ARMS,
    JUDGE,
    part_sizes,
    read_judge_pairs,
    read_parts,
    read_questions,
    write_parts,
)
from orpo_lite.comparing.table import Comparison, judge_quality, make_comparison
from orpo_lite.comparing.task import Run, Task, is_recorded, prepare_task, record
from orpo_lite.comparing.trainings import train_all
from orpo_lite.evaluation.open_run import find_model, load_model
from orpo_lite.runs.atomic import to_json, write_text
from orpo_lite.runs.folder import locked
from orpo_lite.runs.records import RESULT
from orpo_lite.updates import Update, run_to_end, with_torch_defaults


def compare(
    recipe: str,
    settings: Sequence[str] = (),
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 1,
    rounds: int = 3,
    prompts: int | None = None,
    max_new_tokens: int = 128,
    out: str | Path | None = None,
) -> Comparison:
    """Train each arm and a judge, sample answers, and compare them by the rewards of the judge.

    The folder gets the divided pairs (``data``), an ordinary run folder for each training
    (``runs``), ``answers``, ``rewards``, result.json and compare.html. If the comparison was
    stopped, the same call continues it.

    Args:
        recipe: the name or path of a recipe.
        settings: texts ``"section.key=value"`` for all arms, or ``"ARM:section.key=value"`` for one
            arm or for the judge, such as ``"dpo:loss.beta=0.2"``.
        arms: names of :data:`orpo_lite.comparing.arms.ARMS`.
        seeds: number of trainings of each arm. The seeds follow ``training.seed``.
        rounds: number of answers to each prompt.
        prompts: number of held-out prompts to answer. None: 64, or fewer if the data have few.
        max_new_tokens: largest number of tokens in an answer.
        out: the folder. None: ``training.output_dir`` with ``-compare`` at its end.

    Raises:
        OrpoLiteError: an error that the person can fix.
    """
    updates = compare_events(
        recipe,
        settings,
        arms=",".join(arms),
        seeds=seeds,
        rounds=rounds,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        out=out,
    )
    return run_to_end(updates, lambda _: None)


@with_torch_defaults
def compare_events(
    recipe: str,
    settings: Sequence[str] = (),
    *,
    arms: str = ",".join(DEFAULT_ARMS),
    seeds: int = 1,
    rounds: int = 3,
    prompts: int | None = None,
    max_new_tokens: int = 128,
    out: str | Path | None = None,
) -> Generator[Update, None, Comparison]:
    """Compare as :func:`compare` does. Yield its progress, and return its result."""
    task = prepare_task(
        recipe,
        settings,
        arms=arms,
        seeds=seeds,
        rounds=rounds,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        out=out,
    )
    for done, total in demo.make_builtin(task.recipe):
        yield Update("stage", "training the built-in base", done, total)
    resolved = demo.resolve_builtin(task.recipe)
    parts = {}
    if not is_recorded(task):
        parts = yield from read_parts(resolved, task.prompts)
        record(task)
    with locked(task.folder) as notes:
        for note in notes:
            yield Update("note", note)
        if parts:
            write_parts(parts, task.data, resolved.data)
        sizes, questions = part_sizes(task.data), read_questions(resolved, task.data)
        counts = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
        yield Update("note", f"pairs: {counts}; prompts to answer: {len(questions):,}")
        if (limit := task.judge_recipe.data.max_length) < resolved.data.max_length:
            yield Update("note", f"the judge reads at most {limit:,} tokens of prompt and reply")
        base = Path(resolved.model.model_name_or_path)
        name = str(base.absolute()) if base.is_dir() else resolved.model.model_name_or_path
        yield from train_all(task, name, sizes)
        runs = [run for arm in task.arms for run in task.runs_of(arm)]
        answers = yield from sample_all(task, runs, questions)
        pairs = read_judge_pairs(resolved, task.data)
        judged = yield from judge_all(task, answers, questions, pairs)
        judge = judge_quality(judged.pairs, pairs, training_of(task.judge, sizes[JUDGE]))
        found = yield from _diversity(task, answers)
        result = make_comparison(
            task,
            questions,
            answers,
            judged,
            judge,
            found,
            {arm.name: cost_of(task.runs_of(arm), _before(task, arm.name)) for arm in task.arms},
            temperature=TEMPERATURE,
            remark=demo.builtin_remark(task.recipe),
            reward_models=[training_of(run, sizes[ARMS]) for run in task.reward_runs],
        )
        write_text(task.folder / RESULT, to_json(result.to_json()))
        yield Update("stage", "writing the report")
        write_page(task, result, questions, answers, judged)
    return result


def _before(task: Task, arm_name: str) -> list[Run]:
    """Return the runs whose adapters the runs of an arm read."""
    runs = [run for arm in task.arms if arm.name == arm_name for run in task.runs_of(arm)]
    return [read for run in runs for read in task.read_by(run).values()]


def _diversity(
    task: Task, answers: Mapping[str, Rounds]
) -> Generator[Update, None, tuple[str, dict[str, Diversity]]]:
    """Return the name of the embeddings, and the diversity of each arm."""
    yield Update("stage", "measuring the diversity of the answers")
    if folder := sentence_model():
        return SENTENCES, _of_arms(task, answers, load_sentence_model(folder))
    opened = load_model(find_model(task.runs_of(task.arms[0])[0].path))
    with base_states(opened) as embed:
        return BASE, _of_arms(task, answers, embed)


def _of_arms(task: Task, answers: Mapping[str, Rounds], embed: Embed) -> dict[str, Diversity]:
    texts = {
        name: [[row.text for row in rows if row.text is not None] for rows in rounds]
        for name, rounds in answers.items()
    }
    # Equal texts get the same embedding, because each is embedded only once.
    unique = [*dict.fromkeys(text for rounds in texts.values() for row in rounds for text in row)]
    vectors = dict(zip(unique, embed(unique), strict=True)) if unique else {}
    return {
        arm.name: mean_diversity(
            [
                diversity(np.array([[vectors[text] for text in row] for row in texts[run.name]]))
                for run in task.runs_of(arm)
            ]
        )
        for arm in task.arms
    }
