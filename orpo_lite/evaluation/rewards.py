"""Score the replies of a dataset with a reward model, and write a reward for each reply.

The rewards are written block by block to a hidden file next to the result. If a command was
stopped, the same command scores only the rest.
"""

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from orpo_lite.data.dataset import PromptTokenizer
from orpo_lite.data.formats.text import LONE_SURROGATE
from orpo_lite.data.pair import Pair, TokenizedPair
from orpo_lite.data.pairs import Drops
from orpo_lite.data.prepare import find_sources
from orpo_lite.data.replies import Replies, read_replies
from orpo_lite.errors import ModelError, RecipeError
from orpo_lite.evaluation.evaluate import DATASET, OF_DATASET, data_values
from orpo_lite.evaluation.open_run import (
    FoundModel,
    OpenRun,
    explain_out_of_memory,
    find_model,
    load_model,
)
from orpo_lite.evaluation.score import score_pairs
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.atomic import explain_write_errors, write_text
from orpo_lite.runs.commands import quoted
from orpo_lite.runs.folder import adapter_sha256
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

BLOCK = 256  # rows that are scored together


@dataclass(frozen=True)
class Rewards:
    """The result of scoring a dataset."""

    file: Path
    """A jsonl file with one line for each row of the dataset."""
    replies: int
    """Number of replies with a reward."""
    mean: float | None
    """Mean reward of these replies. None: there are none."""
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
    and ``reward_rejected``. If a reply cannot be scored, its reward is null and ``reason`` says
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
            fix=f"orpo-lite eval {quoted(Path(found.name))} scores pairs with a language model",
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
    task = f"scoring the replies of {data}"
    drops = Drops()
    with (
        reply_tokenizer(opened) as tokenizer,
        explain_out_of_memory(task, "enough memory for one reply at a time"),
    ):
        scorer = _Scorer(opened, tokenizer, recipe)
        total, done = sum(count for _, count in rows), 0
        replies = read_replies(recipe.data, sources, drops)
        while block := list(islice(replies, BLOCK)):
            yield Update("stage", task, done, total)
            if not progress.has(done, len(block)):
                progress.add(done, (yield from scorer.lines(block, task)))
            done += len(block)
    for reason, count in drops.counts.items():
        yield Update("note", f"left out: {count:,} {reason} (first {drops.places[reason][0]})")
    result, reasons = progress.finish()
    for reason, count in reasons.items():
        yield Update("note", f"without a reward: {count:,} ({reason})")
    return result


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


@dataclass
class _Scorer:
    """A loaded reward model."""

    opened: OpenRun
    tokenizer: PromptTokenizer
    recipe: Recipe
    longest: int = 0
    """Number of tokens of the longest sequence for which the model was probed."""

    def lines(
        self, block: Sequence[Replies], stage: str
    ) -> Generator[Update, None, list[dict[str, Any]]]:
        """Return a line of the result for each row of a block."""
        pairs_of = [[] if row.reason else row.pairs for row in block]
        tokens = self._tokens([pair for pairs in pairs_of for pair in pairs])
        scored = {key: found for key, found in tokens.items() if not isinstance(found, str)}
        rewards = yield from self._rewards(scored, stage)
        lines = []
        for row, pairs in zip(block, pairs_of, strict=True):
            reasons = [text for pair in pairs if isinstance(text := tokens[id(pair)], str)]
            found = [rewards.get(id(pair), (None, None)) for pair in pairs]
            lines.append(_line(row, found, row.reason or next(iter(reasons), "")))
        return lines

    def _tokens(self, pairs: Sequence[Pair]) -> dict[int, TokenizedPair | str]:
        """Return the id of each pair -> its tokens, or the reason why it cannot be scored."""
        tokens: dict[int, TokenizedPair | str] = {}
        for pair in pairs:
            texts = [pair.chosen, pair.rejected, *(turn["content"] for turn in pair.messages)]
            if LONE_SURROGATE.search("".join(texts)):
                tokens[id(pair)] = "the text is not valid Unicode"
        whole = [pair for pair in pairs if id(pair) not in tokens]
        for pair, found in self.tokenizer.pairs(whole):
            if not isinstance(found, str) and (found.chosen_cut or found.rejected_cut):
                limit = self.tokenizer.data.max_length
                tokens[id(pair)] = f"longer than the model's {limit:,} positions"
            elif isinstance(found, str) or pair.rejected:
                tokens[id(pair)] = found
            else:  # one reply: its other sequence is only the prompt
                tokens[id(pair)] = replace(found, rejected_ids=[], rejected_start=0)
        return tokens

    def _rewards(
        self, tokens: Mapping[int, TokenizedPair], stage: str
    ) -> Generator[Update, None, dict[int, tuple[float, float]]]:
        """Return the id of each pair -> the rewards of its two replies. NaN: it has only one."""
        if not tokens:
            return {}
        pairs = [*tokens.values()]
        longest = max(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
        route = self.opened.model.route if longest <= self.longest else None
        self.longest = max(longest, self.longest)
        scores = yield from score_pairs(self.opened.model, pairs, self.recipe, stage, route)
        columns = scores.chosen_P.tolist(), scores.rejected_P.tolist()
        return dict(zip(tokens, zip(*columns, strict=True), strict=True))


def _line(
    row: Replies, rewards: Sequence[tuple[float | None, float | None]], reason: str
) -> dict[str, Any]:
    """Return a line of the result: the row's columns, its rewards, and why one is missing."""
    first = [chosen for chosen, _ in rewards]
    if row.name == "pair":
        ((chosen, rejected),) = rewards
        added: dict[str, Any] = {"reward_chosen": chosen, "reward_rejected": rejected}
    elif row.name == "rewards":
        added = {"rewards": first}
    else:
        added = {"reward": first[0] if first else None}
    return {**row.row, **added, **({"reason": reason} if reason else {})}


class _Progress:
    """The lines so far, in a hidden file next to the result."""

    def __init__(self, target: Path, key: Mapping[str, Any]) -> None:
        self.target, self.file = target, target.with_name(f".{target.name}.progress")
        head = json.dumps(key, sort_keys=True, ensure_ascii=False)
        known = self.file.read_text("utf-8").split("\n")[:-1] if self.file.is_file() else []
        self.lines = known[1:] if known[:1] == [head] else []
        with explain_write_errors(self.file, self.file):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Write the file again, without an incomplete last line.
            self.file.write_text("\n".join([head, *self.lines]) + "\n", "utf-8")

    def has(self, start: int, count: int) -> bool:
        """Return whether the lines ``start`` to ``start + count - 1`` are known."""
        return len(self.lines) >= start + count

    def add(self, start: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the lines from ``start`` on that are not known yet."""
        texts = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        new = [_with_escapes(text) for text in texts[len(self.lines) - start :]]
        with (
            explain_write_errors(self.file, self.file),
            self.file.open("a", encoding="utf-8") as out,
        ):
            out.write("".join(f"{text}\n" for text in new))
        self.lines += new

    def finish(self) -> tuple[Rewards, Counter[str]]:
        """Write the result, and remove the hidden file.

        Return the result, and the number of rows without a reward by reason.
        """
        write_text(self.target, "".join(f"{line}\n" for line in self.lines))
        self.file.unlink()
        rows = [json.loads(line) for line in self.lines]
        rewards = [value for row in rows for value in _rewards_of(row)]
        pairs = [row for row in rows if row.get("reward_chosen") is not None]
        right = sum(row["reward_chosen"] > row["reward_rejected"] for row in pairs)
        result = Rewards(
            self.target,
            len(rewards),
            sum(rewards) / len(rewards) if rewards else None,
            len(pairs),
            right / len(pairs) if pairs else None,
        )
        return result, Counter(row["reason"] for row in rows if "reason" in row)


def _rewards_of(row: Mapping[str, Any]) -> list[float]:
    """Return the known rewards in a line of the result."""
    names = ("reward", "reward_chosen", "reward_rejected")
    values = [*(row.get(name) for name in names), *(row.get("rewards") or ())]
    return [value for value in values if value is not None]


def _with_escapes(text: str) -> str:
    """Return a JSON text in which only what has no UTF-8 form is escaped."""
    return LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
