"""A conversation with a model, or with a base and its tuned model side by side."""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_lite.data.pair import Message
from orpo_lite.errors import DataError, RecipeError
from orpo_lite.evaluation.open_run import OpenRun
from orpo_lite.model.generate import Decoding
from orpo_lite.runs.atomic import to_json, write_text

RESERVED = 0.25  # of the model's positions at most are kept free for an answer


@dataclass
class Speaker:
    """One side of a conversation: the tuned model, or its base."""

    name: str
    adapter: bool
    history: list[Message] = field(default_factory=list)
    """The turns so far, without the system text. Each speaker has its own answers in it."""


class Chat(AbstractContextManager["Chat"]):
    """Keeps the history and streams the answers. Use it as a context manager.

    With ``compare`` base and tuned model answer each turn of the user, by one set of weights. Each
    of them sees its own earlier answers only.

    Args:
        opened: the model.
        compare: also let the base answer, before the tuned model.
        system: the system text; "" for none.
        decoding: how answers are chosen. The same conversation has the same answers.

    Raises:
        RecipeError: ``compare`` for a model without an adapter.
    """

    def __init__(
        self, opened: OpenRun, decoding: Decoding, *, compare: bool = False, system: str = ""
    ) -> None:
        if compare and not opened.adapter:
            raise RecipeError(
                where="--compare",
                found=f"{opened.name} has no adapter to switch off",
                expected="the folder of a run",
                fix="leave --compare out",
            )
        self.opened, self.decoding, self.system = opened, decoding, system
        self.tokenizer = opened.prompt_tokenizer()
        self.answerer = opened.answerer(self.tokenizer.end_id)
        tuned = Speaker("tuned", adapter=True)
        self.speakers = [Speaker("base", adapter=False), tuned] if compare else [tuned]

    def __exit__(self, *error: Any) -> None:
        self.tokenizer.__exit__(*error)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns; with ``system`` also replace the system text."""
        self.system = self.system if system is None else system
        for speaker in self.speakers:
            speaker.history.clear()

    def prompt(self, speaker: Speaker, text: str) -> tuple[list[int], int]:
        """Return the tokens that a turn of the user leads to, and how many old turns were dropped.

        The oldest turns, each with its answer, leave the history for good when there would be no
        room for an answer.

        Raises:
            DataError: the template cannot render the turns, or this turn alone is too long.
        """
        free = min(self.decoding.max_new_tokens, int(RESERVED * self.answerer.positions))
        dropped = 0
        while True:
            (ids,) = self.tokenizer.ids([self._messages(speaker, text)])
            if isinstance(ids, str):
                raise DataError(where="this turn", found=ids, expected="another text, or /reset")
            if self.answerer.room(ids) >= free:
                return ids, dropped
            if not speaker.history:
                break
            del speaker.history[:2]
            dropped += 1
        if self.answerer.room(ids) > 0:
            return ids, dropped
        raise DataError(
            where="this turn",
            found=f"it has {len(ids):,} tokens",
            expected=f"fewer than the model's {self.answerer.positions:,} positions",
        )

    def answer(self, speaker: Speaker, text: str, ids: Sequence[int]) -> Generator[str, None, None]:
        """Yield an answer piece by piece; ``ids`` are from :meth:`prompt`.

        The part before the generator is closed or interrupted stays in the history.
        """
        pieces = []
        try:
            for piece in self.answerer.stream(
                ids, self.decoding, self.opened.tokenizer, adapter=speaker.adapter
            ):
                pieces.append(piece)
                yield piece
        finally:
            speaker.history += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "".join(pieces).strip()},
            ]

    def save(self, file: Path) -> None:
        """Write the conversation as JSON. Raises CheckpointError, FitError."""
        turns = {speaker.name: self._messages(speaker) for speaker in self.speakers}
        settings = {"model": self.opened.name, "temperature": self.decoding.temperature}
        write_text(file, to_json({**settings, "conversations": turns}))

    def _messages(self, speaker: Speaker, text: str | None = None) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = [] if text is None else [{"role": "user", "content": text}]
        return [*system, *speaker.history, *user]
