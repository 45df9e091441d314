"""Score the replies of a dataset with a reward model, and write a reward for each reply.

The rewards are written block by block to a hidden file next to the result. If a command was
stopped, the same command scores only the rest.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from orpo_lite.data.dataset import PromptTokenizer, whole_text
from orpo_lite.data.formats.text import LONE_SURROGATE
from orpo_lite.data.pair import Pair, TokenizedPair
from orpo_lite.data.pairs import Drops
from orpo_lite.data.prepare import find_sources
from orpo_lite.data.replies import COLUMNS, Replies, read_replies
from orpo_lite.errors import DataError, ModelError, RecipeError
from orpo_lite.evaluation.evaluate import DATASET, OF_DATASET, data_values
from orpo_lite.evaluation.open_run import (
    FoundModel,
    OpenRun,
    explain_out_of_memory,
    find_model,
    load_model,
)
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.model.score_head import is_classifier
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.atomic import explain_write_errors, write_text
from orpo_lite.runs.commands import quoted
from orpo_lite.runs.folder import adapter_sha256
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

BLOCK = 64  # rows that are scored together


@dataclass(frozen=True)
class Rewards:
    """The result of scoring a dataset."""

    file: Path
    """A jsonl file with one line for each row of the dataset."""
    replies: int
    """Number of replies with a reward."""
    mean: float
    """Mean reward of these replies."""
    pairs: int
    """Number of rows with a chosen and a rejected reply."""
    accuracy: float | None
    """Share of these pairs whose chosen reply has the higher reward. None: there are none."""


def score(
    name: str | Path,
    data: str,
    *,
    to: str | Path | None = None,
    settings: Sequence[str] = (),
    base_path: str | Path | None = None,
) -> Rewards:
    """Score the replies of a dataset with a reward model, and write the rewards as jsonl.

    A row of the result has the columns of the dataset's row, and ``reward`` or ``rewards``. A pair
    has ``where`` (the place of its row), ``prompt``, ``chosen``, ``rejected``, ``reward_chosen``
    and ``reward_rejected``. If a reply cannot be scored, its reward is null, and ``reason`` says
    why. Pairs that a training would leave out are left out here too.

    Args:
        name: the folder of a run with ``loss.type=reward``, its merged folder, or another reward
            model of transformers.
        data: a file, a folder or a hub dataset with pairs or with replies: see
            :mod:`orpo_lite.data.replies`.
        to: the file to write. None: a file in ``RUN/rewards``.
        settings: texts ``"data.key=value"`` for the dataset, such as its split.
        base_path: where the base of the run is now, if its folder was moved.

    Raises:
        ModelError: the model is not a reward model.
        RecipeError: a text in ``settings`` is wrong, ``to`` exists, or ``to`` is None and the model
            is not a run.
        DataError: no reply can be scored, or the data has a column with the name of a result.
        OrpoLiteError: the model or the data cannot be read.
    """
    updates = score_events(name, data, to=to, settings=settings, base_path=base_path)
    return run_to_end(updates, lambda _: None)


@with_torch_defaults
def score_events(
    name: str | Path,
    data: str,
    *,
    to: str | Path | None = None,
    settings: Sequence[str] = (),
    base_path: str | Path | None = None,
) -> Generator[Update, None, Rewards]:
    """Score as :func:`score` does; yield its progress and return its result."""
    changed = data_values(settings) | {DATASET: data}
    found = find_model(name, base_path=base_path, command="score")
    if not found.recipe.loss.trains_reward_model:
        raise ModelError(
            where="orpo-lite score",
            found=f"{found.name} is not a reward model",
            expected="a run with loss.type=reward, or another reward model of transformers",
            fix=""
            if is_classifier(found.base.config)
            else f"orpo-lite eval {quoted(Path(found.name))} scores pairs with a language model",
        )
    recipe = _recipe(found, changed)
    sources = find_sources(recipe.data)[0]
    target = _target(found, to, data)
    weights = adapter_sha256(found.adapter) if found.adapter else found.base.fingerprint
    rows = [source.fingerprint() for source in sources]
    key = {
        "data": [sha256 for sha256, _ in rows],
        "settings": recipe.data.model_dump(mode="json"),
        "weights": weights,
    }
    progress = _Progress(target, key)
    yield Update("stage", f"loading {found.name}")
    opened = load_model(found)
    _check_reading(opened)
    task, drops = f"scoring the replies of {data}", Drops()
    with (
        reply_tokenizer(opened) as tokenizer,
        explain_out_of_memory(task, "enough memory for one reply at a time"),
    ):
        scorer = _Scorer(opened, tokenizer, recipe)
        total, done = sum(count for _, count in rows), 0
        replies = read_replies(recipe.data, sources, drops)
        while block := _next(replies, data, is_first=not done):
            yield Update("stage", task, done, max(total, done))
            if not progress.has(done + len(block)):
                progress.add(done, scorer.lines(block))
            done += len(block)
    for reason, count in drops.counts.items():
        yield Update("note", f"left out: {count:,} {reason} (first {drops.places[reason][0]})")
    for reason, count in progress.reasons.items():
        yield Update("note", f"rows with a reply that has no reward: {count:,} ({reason})")
    return progress.finish(data)


def _next(replies: Iterator[Replies], data: str, *, is_first: bool) -> list[Replies]:
    """Return the next block of rows.

    Raises:
        DataError: rows cannot be read. If the first ones have no known columns, the error names the
            columns that are read here, and not settings of a training.
    """
    try:
        return list(islice(replies, BLOCK))
    except DataError as fault:
        if not is_first or "data." not in f"{fault.where} {fault.fix}":
            raise
        raise DataError(
            where=data,
            found=f"has no replies that can be scored ({fault.found})",
            expected=f"rows with {COLUMNS}",
            fix="rename the columns of the data",
        ) from None


def _check_reading(opened: OpenRun) -> None:
    """Raise ModelError if transformers reads the reward of a model at another token.

    The score head of a run was trained at the token that ends a reply. transformers reads it at the
    last token that is not the pad token.
    """
    if opened.run:
        return
    text_config, tokenizer = opened.base.config.get_text_config(), opened.tokenizer
    found = ""
    with opened.prompt_tokenizer() as prompts:
        end_id = prompts.end_id
        end = tokenizer.convert_ids_to_tokens(end_id)
        if not prompts.template.text:
            found = "its tokenizer has no chat template"
        elif getattr(text_config, "pad_token_id", None) == end_id:
            found = f"its pad token is {end}, the token that ends a reply"
        elif not whole_text(prompts).endswith(end):
            found = f"its chat template does not end a conversation with {end}"
    if found:
        raise ModelError(
            where=f"model {opened.name}",
            found=f"{found}, so the reward would be read at another token than in its training",
            expected="a reward model that was trained or merged by orpo-lite, or a model whose "
            "template ends a conversation with the token that ends a reply",
        )


def _recipe(found: FoundModel, changed: Mapping[str, Any]) -> Recipe:
    """Return the model's recipe with the dataset to score, and without the run's own dataset."""
    defaults = DataSection(dataset_name="any")
    values = {f"data.{key}": getattr(defaults, key) for key in OF_DATASET}
    return found.recipe.override({**values, "data.test_split_size": 0, **changed})


def _target(found: FoundModel, to: str | Path | None, data: str) -> Path:
    """Return the file to write. Raise RecipeError if it exists or is not given."""
    if to is None and found.run is None:
        raise RecipeError(
            where="--to",
            found=f"is not given, and {found.name} is not a run",
            expected="the name of the file to write",
            fix="--to rewards.jsonl",
        )
    name = f"{Path(data.rstrip('/')).name.split('.')[0]}.jsonl"
    target = Path(to).expanduser() if to else (found.run or Path()) / "rewards" / name
    if target.exists():
        raise RecipeError(
            where=f"--to {target}",
            found="exists already",
            expected="a new file",
            fix=f"--to {target.with_stem(f'{target.stem}-2')}, or remove {target}",
        )
    return target


def reply_tokenizer(opened: OpenRun) -> PromptTokenizer:
    """Return a tokenizer with the run's template. It cuts a reply at the model's positions."""
    tokenizer = opened.prompt_tokenizer()
    positions = getattr(opened.base.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        limits = {"max_length": positions, "max_prompt_length": positions}
        tokenizer.data = tokenizer.data.model_copy(update=limits)
    return tokenizer


@dataclass(frozen=True)
class _Line:
    """A line of the result, and what it adds to the figures."""

    row: Mapping[str, Any]
    rewards: Sequence[float | None]
    """The rewards of the replies. None: the reply cannot be scored."""
    is_pair: bool
    reason: str
    """Why a reply cannot be scored; "" if all replies have a reward."""


@dataclass
class _Scorer:
    """A loaded reward model."""

    opened: OpenRun
    tokenizer: PromptTokenizer
    recipe: Recipe
    longest: int = 0
    """Number of tokens of the longest sequence for which the model was probed."""

    def lines(self, block: Sequence[Replies]) -> list[_Line]:
        """Return a line of the result for each row of a block."""
        rewards: list[list[float | None]] = [[None] * len(row.texts) for row in block]
        reasons = [[row.reason] if row.reason else [] for row in block]
        pairs = [
            (number, Pair(row.messages, row.texts[0], row.texts[1], row.where, row.prompt_text))
            for number, row in enumerate(block)
            if row.kind == "pair"
        ]
        # The replies of a pair share the tokens of their prompt.
        for number, found in self._score(pairs):
            if not isinstance(found, str):
                rewards[number] = [*found]
        # If one reply of a pair cannot be scored, the other one is scored alone.
        single = [
            (number, place)
            for number, row in enumerate(block)
            for place, reward in enumerate(rewards[number])
            if reward is None and not row.reason
        ]
        alone = [
            Pair(row.messages, row.texts[place], "", row.where, row.prompt_text)
            for row, place in ((block[number], place) for number, place in single)
        ]
        for index, found in self._score(list(enumerate(alone))):
            number, place = single[index]
            if isinstance(found, str):
                reasons[number].append(found)
            else:
                rewards[number][place] = found[0]
        return [
            _Line(
                _merged(row, rewards[number], reasons[number]),
                rewards[number],
                row.kind == "pair",
                "; ".join(dict.fromkeys(reasons[number])),
            )
            for number, row in enumerate(block)
        ]

    def _score(
        self, pairs: Sequence[tuple[int, Pair]]
    ) -> Iterator[tuple[int, tuple[float, float] | str]]:
        """Yield each pair's number with its two rewards, or with the reason why it has none.

        If the rejected reply is "", only the first reward has a meaning.
        """
        tokens: dict[int, TokenizedPair] = {}
        for number, found in self._tokens(pairs):
            if isinstance(found, str):
                yield number, found
            else:
                tokens[number] = found
        if not tokens:
            return
        chosen = [*tokens.values()]
        longest = max(len(ids) for pair in chosen for ids in (pair.chosen_ids, pair.rejected_ids))
        route = self.opened.model.route if longest <= self.longest else None
        self.longest = max(longest, self.longest)
        task = score_pairs(self.opened.model, chosen, self.recipe, "", route)
        scores = run_to_end(task, lambda _: None)
        columns = zip(scores.chosen_P.tolist(), scores.rejected_P.tolist(), strict=True)
        yield from zip(tokens, columns, strict=True)

    def _tokens(
        self, pairs: Sequence[tuple[int, Pair]]
    ) -> Iterator[tuple[int, TokenizedPair | str]]:
        """Yield each pair's number with its tokens, or with the reason why it cannot be scored."""
        number_of = {id(pair): number for number, pair in pairs}
        whole = []
        for number, pair in pairs:
            texts = [pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages)]
            if LONE_SURROGATE.search("".join(texts)):
                yield number, "the text is not valid Unicode"
            elif not pair.chosen.strip():
                yield number, "a reply is empty or no text"
            else:
                whole.append(pair)
        limit = self.tokenizer.data.max_length
        for pair, found in self.tokenizer.pairs(whole):
            number = number_of[id(pair)]
            if isinstance(found, str):
                yield number, found
            elif found.chosen_cut or found.rejected_cut:
                yield number, f"longer than the model's {limit:,} positions"
            elif pair.rejected:
                yield number, found
            else:  # the other sequence is only the prompt
                yield number, replace(found, rejected_ids=[], rejected_start=0)


def _merged(
    row: Replies, rewards: Sequence[float | None], reasons: Sequence[str]
) -> dict[str, Any]:
    """Return a row of the data with its rewards, and with the reason if one is missing.

    Raises:
        DataError: the data has a column with the name of a result.
    """
    if row.kind == "pair":
        added: dict[str, Any] = dict(
            zip(("reward_chosen", "reward_rejected"), rewards, strict=True)
        )
    elif row.kind == "list":
        added = {"rewards": [*rewards]}
    else:
        added = {"reward": rewards[0] if rewards else None}
    if reasons:
        added["reason"] = "; ".join(dict.fromkeys(reasons))
    if taken := added.keys() & row.row.keys():
        name = min(taken)
        raise DataError(
            where=row.where,
            found=f"has a column {name} already",
            expected="no column with the name of a result: reward, rewards or reason",
            fix=f"rename the column {name}, for example to old_{name}",
        )
    return {**row.row, **added}


class _Progress:
    """The lines so far, in a hidden file next to the result."""

    def __init__(self, target: Path, key: Mapping[str, Any]) -> None:
        self.target, self.file = target, target.with_name(f".{target.name}.progress")
        self.lines: list[_Line] = []
        head = json.dumps(key, sort_keys=True, ensure_ascii=False)
        known = self.file.read_text("utf-8").split("\n")[:-1] if self.file.is_file() else []
        if known[:1] == [head]:
            self.lines = [_Line(*json.loads(line)) for line in known[1:]]
        with explain_write_errors(self.file, self.file):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Write the file again, without an incomplete last line.
            self.file.write_text(f"{head}\n{self._texts(self.lines)}", "utf-8")

    def has(self, count: int) -> bool:
        """Return whether the first ``count`` lines are known."""
        return len(self.lines) >= count

    def add(self, start: int, lines: Sequence[_Line]) -> None:
        """Add the lines from ``start`` on that are not known yet."""
        new = lines[len(self.lines) - start :]
        with (
            explain_write_errors(self.file, self.file),
            self.file.open("a", encoding="utf-8") as out,
        ):
            out.write(self._texts(new))
        self.lines += new

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> the number of rows with a reply that cannot be scored."""
        return Counter(line.reason for line in self.lines if line.reason)

    def finish(self, data: str) -> Rewards:
        """Write the result, and remove the hidden file.

        Raises:
            DataError: no reply has a reward. ``data`` is the dataset's name.
        """
        rewards = [one for line in self.lines for one in line.rewards if one is not None]
        if not rewards:
            self.file.unlink()
            reasons = ", ".join(f"{count:,} {text}" for text, count in self.reasons.items())
            raise DataError(
                where=data,
                found=f"no reply can be scored: {reasons or 'there are no rows'}",
                expected=f"rows with {COLUMNS}",
            )
        text = "".join(_to_json(line.row) + "\n" for line in self.lines)
        write_text(self.target, text)
        self.file.unlink()
        pairs = [line.rewards for line in self.lines if line.is_pair and None not in line.rewards]
        right = sum(chosen > rejected for chosen, rejected in pairs)  # type: ignore[operator]
        return Rewards(
            self.target,
            len(rewards),
            sum(rewards) / len(rewards),
            len(pairs),
            right / len(pairs) if pairs else None,
        )

    @staticmethod
    def _texts(lines: Sequence[_Line]) -> str:
        rows = ([line.row, line.rewards, line.is_pair, line.reason] for line in lines)
        return "".join(_to_json(row) + "\n" for row in rows)


def _to_json(value: Any) -> str:
    """Return a value as JSON. Only what has no UTF-8 form is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
