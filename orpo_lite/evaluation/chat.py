"""Hold a conversation with a model. A base and its tuned model can both answer each turn."""

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

RESERVED = 0.25  # at most this share of the model's positions is kept free for an answer


@dataclass
class Speaker:
    """A model that answers in the conversation: the tuned model, or its base."""

    name: str
    adapter: bool
    history: list[Message] = field(default_factory=list)
    """The turns so far, without the system text. The answers in it are this speaker's own."""


class Chat(AbstractContextManager["Chat"]):
    """A conversation: keeps the history and streams the answers. Use it as a context manager.

    With ``compare``, each turn of the user gets two answers: the first from the base, the second
    from the tuned model. The weights are loaded once. The base does not see the earlier answers of
    the tuned model, and the tuned model does not see the earlier answers of the base.

    Args:
        opened: the model.
        compare: let the base answer too.
        system: the system text; "" for none.
        decoding: how the tokens of an answer are chosen. The same turn after the same history gets
            the same answer.

    Raises:
        RecipeError: ``compare`` is set, but the model has no adapter.
    """

    def __init__(
        self, opened: OpenRun, decoding: Decoding, *, compare: bool = False, system: str = ""
    ) -> None:
        if compare and not opened.adapter:
            raise RecipeError(
                where="--compare",
                found=f"{opened.name} has no adapter to switch off",
                expected="the folder of a run",
                fix="remove --compare",
            )
        self.opened, self.decoding, self.system = opened, decoding, system
        self.tokenizer = opened.prompt_tokenizer()
        self.answerer = opened.answerer(self.tokenizer.end_id)
        tuned = Speaker("tuned", adapter=True)
        self.speakers = [Speaker("base", adapter=False), tuned] if compare else [tuned]

    def __exit__(self, *error: Any) -> None:
        self.tokenizer.__exit__(*error)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns. If ``system`` is given, also replace the system text."""
        self.system = self.system if system is None else system
        for speaker in self.speakers:
            speaker.history.clear()

    def prompt(self, speaker: Speaker, text: str) -> tuple[list[int], int]:
        """Return the tokens of a prompt with the turn ``text``, and the number of removed turns.

        ``text`` is the new turn of the user. If there is too little room for an answer, the oldest
        turns of the user and their answers are removed from the history.

        Raises:
            DataError: the template cannot render the turns, or ``text`` alone is too long.
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
            found=f"has {len(ids):,} tokens",
            expected=f"fewer than the model's {self.answerer.positions:,} positions",
        )

    def answer(self, speaker: Speaker, text: str, ids: Sequence[int]) -> Generator[str, None, None]:
        """Yield an answer piece by piece. ``ids`` are the tokens from :meth:`prompt`.

        If the generator is closed or interrupted, the part that was yielded stays in the history.
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
        """Write the conversation as JSON. Raise CheckpointError or FitError if this fails."""
        turns = {speaker.name: self._messages(speaker) for speaker in self.speakers}
        settings = {"model": self.opened.name, "temperature": self.decoding.temperature}
        write_text(file, to_json({**settings, "conversations": turns}))

    def _messages(self, speaker: Speaker, text: str | None = None) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = [] if text is None else [{"role": "user", "content": text}]
        return [*system, *speaker.history, *user]
