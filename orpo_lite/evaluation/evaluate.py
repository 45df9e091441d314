"""Evaluate runs and models: score the same pairs with each of them, and compare the scores."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.data.prepare import find_sources
from orpo_lite.data.sources.source import TEST_SPLIT, noted_split
from orpo_lite.errors import (
    CheckpointError,
    Command,
    OrpoLiteError,
    Overrides,
    RecipeError,
)
from orpo_lite.evaluation.compare import Evaluation, compare, name_pairs
from orpo_lite.evaluation.open_run import (
    FoundModel,
    OpenRun,
    explain_out_of_memory,
    find_model,
    load_model,
)
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.model.adapter import read_adapter, set_adapter
from orpo_lite.ops.outputs import PairScores
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.atomic import sha256, to_json, write_text
from orpo_lite.runs.inputs import Inputs, prepare_inputs
from orpo_lite.runs.lock import refuse_other_pairs
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update, attempt, failure, run_to_end, with_torch_defaults

EVAL = "eval.json"
BASE = "base"
DATASET = "data.dataset_name"
OF_MODEL = ("chat_template", "chat_template_kwargs")  # keys of data that each model keeps
# Keys of data that describe one dataset. They return to their defaults if the dataset is replaced.
OF_DATASET = (
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "format",
    "column_map",
    "max_samples",
)


def evaluate(
    *models: str | Path,
    data: Sequence[str] = (),
    against: str | Path | None = None,
    base_path: str | Path | None = None,
) -> Evaluation:
    """Score pairs with runs or models, and compare each model with its base or another model.

    Writes ``eval.json`` into each run.

    Args:
        models: run folders, merged folders, other model folders of transformers, or hub names.
        data: texts ``"data.key=value"`` that choose other pairs. Default: the pairs that the first
            run held out. If ``data.dataset_name`` is given, the held-out split of this dataset is
            scored. If it has no such split, all of its rows are scored.
        against: the model to compare with: a name as in ``models``, or ``"base"`` for the base of
            each run. None: each run is compared with its base. Reward models and models
            without an adapter are only scored.
        base_path: where the base of the runs is now, if its folder was moved.

    Raises:
        RecipeError: there are no pairs to score, or a text in ``data`` is not ``data.key=value``.
        CheckpointError: a run is not finished, the data of a run changed, no pair fits all models,
            or ``against`` is ``"base"`` although a model has no adapter.
        FitError: the GPU has too little memory.
        OrpoLiteError: a model or the data cannot be read.
    """
    updates = evaluate_events(*models, data=data, against=against, base_path=base_path)
    return run_to_end(updates, lambda _: None)


@with_torch_defaults
def evaluate_events(
    *models: str | Path,
    data: Sequence[str] = (),
    against: str | Path | None = None,
    base_path: str | Path | None = None,
) -> Generator[Update, None, Evaluation]:
    """Evaluate as :func:`evaluate` does; yield its progress and return its result."""
    if not models:
        raise RecipeError(
            where="orpo-lite eval",
            found="no model to score",
            expected="the name of a run folder, of a merged folder or of a hub model",
            fix=Command("orpo-lite eval runs/demo"),
        )
    changed = data_values(data)
    other = None if against in (None, BASE) else str(against)
    names = [*dict.fromkeys([*map(str, models), *([other] if other else [])])]
    yield Update("stage", f"finding {', '.join(names)}")
    found = {name: find_model(name, base_path=base_path) for name in names}
    if against == BASE:
        _refuse_without_adapter(found.values())
    pairs_of, data_name, held_out = yield from _find_pairs(found, changed)
    bases = {} if other else _base_names(found)
    scores = yield from _score_all(found, pairs_of, bases)
    against_of = {name: other or bases.get(name) for name in map(str, models)}
    is_itself = len(found) == 1
    compared = [(name, to) for name, to in against_of.items() if to and (to != name or is_itself)]
    evaluation = compare(
        pairs_of[names[0]].pairs,
        scores,
        compared,
        held_out=held_out,
        data=data_name,
    )
    for name in dict.fromkeys(map(str, models)):
        model = found[name]
        if model.run and model.adapter:
            # The report shows only what is about this run and its present adapter.
            about = {"run": name, "adapter": sha256(model.adapter / ADAPTER_WEIGHTS)}
            file, text = model.run / EVAL, to_json(evaluation.to_json() | about)
            yield from attempt(f"{file} is not written", write_text, file, text)
    return evaluation


def data_values(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of ``data.key=value`` texts. Raise RecipeError if a text is wrong."""
    for text in texts:
        if not text.startswith("data.") or "=" not in text:
            raise RecipeError(
                where=f"argument {text!r}",
                found="is not data.KEY=VALUE",
                expected="a run folder, a merged folder, a hub name, or data.KEY=VALUE",
                fix=Overrides({DATASET: text}) if Path(text).expanduser().is_file() else "",
            )
    recipe = load_recipe("demo", texts)  # any recipe will do, because it only checks the texts
    given = {key for key, source in recipe.sources.items() if source == "command line"}
    return {key: value for key, value in recipe.items() if key in given}


def _refuse_without_adapter(found: Iterable[FoundModel]) -> None:
    for model in found:
        if not _has_base_scores(model):
            reason = "has no adapter to switch off"
            if model.adapter:
                reason = "is a reward model, and its base has no score head"
            raise CheckpointError(
                where=f"--against {BASE}",
                found=f"{model.name} {reason}",
                expected="the folder of a run that trained a language model",
                fix="--against MODEL, where MODEL is the folder or the hub name of the base",
            )


@dataclass(frozen=True)
class _Pairs:
    pairs: TokenizedPairs
    """The pairs in one model's tokens. All models have the same pairs in the same order."""
    recipe: Recipe
    """The recipe that says how the pairs are packed."""


def _find_pairs(
    found: Mapping[str, FoundModel], changed: Mapping[str, Any]
) -> Generator[Update, None, tuple[dict[str, _Pairs], str, bool]]:
    """Return each model's pairs, the name of the pairs, and whether they are held out.

    The pairs are held out if it is known that no run was trained on one of their prompts.
    """
    first = next((model for model in found.values() if model.run), None)
    if first is None and DATASET not in changed:
        raise RecipeError(
            where=", ".join(found),
            found="no pairs to score, because none of these models is a run with held-out pairs",
            expected="data.dataset_name=PAIRS",
            fix="add data.dataset_name=PAIRS, where PAIRS is a file, a folder or a hub dataset",
        )
    values = _chosen_data(first, changed)
    prepared: dict[str, tuple[Recipe, Inputs]] = {}
    for name, model in found.items():
        own = {
            key: value
            for key, value in values.items()
            if key in changed or model is first or key.removeprefix("data.") not in OF_MODEL
        }
        recipe = model.recipe.override(own)
        prepared[name] = recipe, (yield from _quietly(prepare_inputs(recipe)))
    if first and not changed:
        refuse_other_pairs(
            first.run or Path(),
            prepared[first.name][1],
            "restore the data, or choose other pairs with data.dataset_name=PAIRS",
        )
    chosen = {
        name: (recipe, inputs.test if len(inputs.test) else inputs.train)
        for name, (recipe, inputs) in prepared.items()
    }
    common = set.intersection(*(set(pairs.places()) for _, pairs in chosen.values()))
    if not common:
        raise CheckpointError(
            where=", ".join(found),
            found="each pair is too long for the data.max_length of at least one model",
            expected="at least one pair that all models can score",
            fix="choose other pairs with data.dataset_name, or a larger data.max_length",
        )
    pairs_of = {}
    for name, (recipe, pairs) in chosen.items():
        rows = [row for row, place in enumerate(pairs.places()) if place in common]
        pairs_of[name] = _Pairs(pairs.select(rows), recipe)
    recipe, inputs = next(iter(prepared.values()))
    yield from _notes(recipe, inputs, len(common), changed)
    held_out = yield from _compare_prompts(found, prepared, pairs_of, changed)
    return pairs_of, name_pairs(recipe.data, is_test=bool(len(inputs.test))), held_out


def _chosen_data(first: FoundModel | None, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe values that choose the pairs to score.

    They are the values of the first run, except for the keys in ``changed``.
    """
    values: dict[str, Any] = {}
    if first:
        values = {key: value for key, value in first.recipe.items() if key.startswith("data.")}
        values["training.seed"] = first.recipe.training.seed  # which pairs are held out
    if DATASET in changed:
        defaults = DataSection(dataset_name="any")
        values |= {f"data.{key}": getattr(defaults, key) for key in OF_DATASET}
        values["data.test_split_size"] = 0
    values |= changed
    if DATASET in changed and not changed.keys() & {TEST_SPLIT, "data.test_split_size"}:
        recipe = load_recipe("demo").override(values)
        splits = {noted_split(source.note) for source in find_sources(recipe.data)[0]}
        if len(splits) == 1:
            values[TEST_SPLIT] = splits.pop()
    return values


def _quietly(task: Generator[Update, None, Inputs]) -> Generator[Update, None, Inputs]:
    """Run a task without its notes, because its notes are about a training."""
    while True:
        try:
            update = next(task)
        except StopIteration as end:
            result: Inputs = end.value
            return result
        if update.kind != "note":
            yield update


def _notes(
    recipe: Recipe, inputs: Inputs, count: int, changed: Mapping[str, Any]
) -> Iterator[Update]:
    """Yield notes that say which pairs are scored."""
    data = recipe.data
    if changed:
        yield from (Update("note", sentence) for sentence in inputs.figures["format"] if sentence)
    if not len(inputs.test):
        which = "all pairs" if changed else "the run held out no pairs, so its training pairs"
    elif data.dataset_test_split:
        which = f"its held-out split {data.dataset_test_split}"
    else:
        which = "the pairs that the run held out" if not changed else "a held-out part"
    dropped = sum(drop["pairs"] for drop in inputs.figures["dropped"].values())
    left_out = f"; {dropped:,} pairs of the data were left out" if dropped else ""
    text = f"scoring {count:,} pairs of {', '.join(data.names)}: {which}{left_out}"
    yield Update("note", text)


def _compare_prompts(
    found: Mapping[str, FoundModel],
    prepared: Mapping[str, tuple[Recipe, Inputs]],
    pairs_of: Mapping[str, _Pairs],
    changed: Mapping[str, Any],
) -> Generator[Update, None, bool]:
    """Yield a note on each run that was trained on some of the prompts.

    Return True if it is known that no run was trained on any of these prompts. If no run is scored,
    this is not known.
    """
    is_held_out = any(model.run for model in found.values())
    for name, model in found.items():
        if model.run is None:
            continue
        try:
            inputs = prepared[name][1]
            if changed or prepared[name][0].data != model.recipe.data:
                inputs = yield from _quietly(prepare_inputs(model.recipe))
            refuse_other_pairs(model.run, inputs, "")
        except OrpoLiteError as error:
            yield failure(f"it is unknown whether {name} was trained on these pairs", error)
            is_held_out = False
            continue
        trained, prompts = set(inputs.train.prompts()), pairs_of[name].pairs.prompts()
        count = sum(prompt in trained for prompt in prompts)
        if count:
            text = f"{name} was trained on the prompts of {count:,} of the {len(prompts):,} pairs"
            yield Update("note", f"warning: {text}, so its results will look too good")
            is_held_out = False
    return is_held_out


def _base_names(found: Mapping[str, FoundModel]) -> dict[str, str]:
    """Return for each model with an adapter the name of its base in the table.

    The name is ``base`` if all models have the same base, else ``base of RUN``. The base of a
    reward model is left out, because without the adapter its score head has random weights.
    """
    adapted = {name: model for name, model in found.items() if _has_base_scores(model)}
    first: dict[tuple[Any, ...], str] = {}
    for name, model in adapted.items():
        first.setdefault(_base_key(model), name)
    is_one = len(first) == 1
    return {
        name: BASE if is_one else f"{BASE} of {first[_base_key(model)]}"
        for name, model in adapted.items()
    }


def _has_base_scores(model: FoundModel) -> bool:
    return model.adapter is not None and not model.recipe.loss.trains_reward_model


def _base_key(model: FoundModel) -> tuple[Any, ...]:
    """Return a key that is equal for models whose bases are loaded with equal weights."""
    return model.base.fingerprint, model.dtype, model.device, str(model.recipe.quantization)


def _score_all(
    found: Mapping[str, FoundModel], pairs_of: Mapping[str, _Pairs], bases: Mapping[str, str]
) -> Generator[Update, None, dict[str, PairScores]]:
    """Return the scores of each model and base, the bases first.

    If two models differ only in the weights of their adapters, the base is loaded once.
    """
    scores: dict[str, PairScores] = {}
    base_scores: dict[str, PairScores] = {}
    opened: OpenRun | None = None
    with explain_out_of_memory(
        f"evaluating {', '.join(found)}", "enough memory for one model at a time"
    ):
        for name, model in sorted(found.items(), key=lambda item: str(_base_key(item[1]))):
            pairs, recipe = pairs_of[name].pairs, pairs_of[name].recipe
            if opened and model.adapter and _fits_into(model, opened):
                set_adapter(opened.model, read_adapter(model.adapter))
            else:
                opened = None  # free the memory before the next model is loaded
                yield Update("stage", f"loading {name}")
                opened = load_model(model)
            task = f"scoring {len(pairs):,} pairs by"
            scores[name] = yield from score_pairs(opened.model, pairs, recipe, f"{task} {name}")
            base, route = bases.get(name), opened.model.route
            if base and base not in base_scores:
                with opened.model.without_adapter():
                    stage = f"{task} its base"
                    base_scores[base] = yield from score_pairs(
                        opened.model, pairs, recipe, stage, route
                    )
    return base_scores | {name: scores[name] for name in found}


def _fits_into(model: FoundModel, opened: OpenRun) -> bool:
    """Return True if a model differs from a loaded run only in the weights of its adapter."""
    adapters = [one.adapter for one in (model, opened) if one.adapter]
    if len(adapters) < 2 or _base_key(model) != _base_key(opened):
        return False
    unread = ("base_model_name_or_path", "revision")
    one, other = (
        {key: value for key, value in config.items() if key not in unread}
        for config in (read_json(adapter / "adapter_config.json") for adapter in adapters)
    )
    return one == other
