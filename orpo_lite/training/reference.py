"""Compute the log-probabilities of the pairs under the reference model, before the training.

The reference model is the base with another adapter or without one, so no second base is loaded.
The log-probabilities are kept in the cache of the tokens: see
:mod:`orpo_lite.data.reference_cache`.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orpo_lite.base.adapter import (
    REFERENCE,
    note_on_base,
    read_adapter_config,
    reference_folder,
)
from orpo_lite.data.cache import TokenizedPairs
from orpo_lite.data.packing import epoch_order
from orpo_lite.data.reference_cache import ReferenceCache
from orpo_lite.model.adapter import read_adapter, set_adapter
from orpo_lite.model.held_out import score
from orpo_lite.model.load import choose_dtype
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.devices import device_kind, dtype_name
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.folder import adapter_sha256
from orpo_lite.runs.interrupt import Interrupted
from orpo_lite.training.session import Session
from orpo_lite.updates import Update, failure, run_to_end, staged

NAME = "reference"  # of the adapter in peft
STAGE = "computing log-probabilities of the reference model"
Switch = Callable[[], AbstractContextManager[None]]
BLOCK = 64
"""Rows that are scored together. A block is written to the cache with one call. So a computation
that was killed repeats only whole blocks, and gives the same bits when it is resumed."""


def add_reference(session: Session) -> Generator[Update, None, None]:
    """Give the pairs of a session their log-probabilities under the reference model.

    Call it before the first step and before a checkpoint is read. Known log-probabilities are
    read from the cache; only the other ones are computed. Only pairs that the training or its
    evaluations use are computed.

    Raises:
        Interrupted: a signal was received. The computed log-probabilities are in the cache.
    """
    inputs, model = session.inputs, session.pair_model
    folder = reference_folder(session.recipe)
    if folder and session.recipe.loss.reference_adapter and session.processes.is_main:
        for note in note_on_base(folder, inputs.base.name, REFERENCE):
            yield Update("note", note)
    key = _key(session.recipe, inputs.base.fingerprint, folder, session.processes.device)
    wanted = {"train": _used_indices(session), "test": range(len(inputs.test))}
    views: dict[str, TokenizedPairs] = {}
    with _reference_model(model, folder) as use:
        for name, indices in wanted.items():
            pairs: TokenizedPairs = getattr(inputs, name)
            cache = ReferenceCache(pairs, key)
            yield from _fill(session, pairs.select(indices), cache, use)
            views[name] = pairs.with_reference(cache.values(pairs.rows.tolist()))
    session.inputs = replace(inputs, train=views["train"], test=views["test"])


def _key(recipe: Recipe, base: str, folder: Path | None, device: torch.device) -> str:
    """Return a hash of everything except the tokens that changes the log-probabilities."""
    parts = {
        "base": base,
        "adapter": adapter_sha256(folder) if folder else None,
        "quantization": recipe.quantization.model_dump(mode="json"),
        "dtype": dtype_name(choose_dtype(recipe.model.dtype, device_kind(device))),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _used_indices(session: Session) -> Sequence[int]:
    """Return the indices of the training pairs that the training uses, in increasing order."""
    count, size = len(session.inputs.train), session.recipe.training.global_batch_size
    if session.steps >= session.per_epoch:
        return range(count)
    order = epoch_order(count, seed=session.recipe.training.seed, epoch=0)
    return sorted(order[: session.steps * size])


def _fill(
    session: Session, pairs: TokenizedPairs, cache: ReferenceCache, use: Switch
) -> Generator[Update, None, None]:
    """Compute the log-probabilities of pairs that the cache does not hold, and add them to it."""
    rows = pairs.rows.tolist()
    missing = _missing_anywhere(session, cache, rows)
    done, total = len(rows) - len(missing), len(rows)
    place = {row: index for index, row in enumerate(rows)}
    for block in _blocks(missing):
        yield Update("stage", STAGE, done, total)
        if session.processes.any(bool(session.signals)):
            number = session.signals[0] if session.signals else signal.SIGTERM
            raise Interrupted(number, session.path, "the computed log-probabilities are saved")
        chosen = pairs.select([place[row] for row in block])
        task = score(
            session.pair_model,
            chosen,
            session.recipe,
            pad_id=session.inputs.pad_id,
            processes=session.processes,
        )
        with use():
            scores = run_to_end(staged(STAGE, task), lambda _: None)
        values = np.stack([scores.chosen_P.numpy(), scores.rejected_P.numpy()], 1)
        if fault := cache.add(block, values, write=session.processes.is_main):
            yield failure("the log-probabilities of the reference are not kept on disk", fault)
        done += len(block)


def _missing_anywhere(session: Session, cache: ReferenceCache, rows: Sequence[int]) -> list[int]:
    """Return the rows that the cache of at least one process does not hold.

    Every process must score the same blocks.
    """
    session.processes.wait()
    missing = set(cache.missing(rows))
    flags = torch.tensor([row in missing for row in rows], dtype=torch.float64)
    flags = session.processes.sum(flags.to(session.processes.device))
    return [row for row, flag in zip(rows, flags.tolist(), strict=True) if flag]


def _blocks(rows: Sequence[int]) -> Iterator[list[int]]:
    """Divide rows in increasing order into blocks: rows k * BLOCK to (k + 1) * BLOCK - 1."""
    block: list[int] = []
    for row in sorted(rows):
        if block and row // BLOCK != block[0] // BLOCK:
            yield block
            block = []
        block.append(row)
    if block:
        yield block


@contextmanager
def _reference_model(model: PairModel, folder: Path | None) -> Iterator[Switch]:
    """Load the reference's adapter for the ``with`` block, and yield a context that switches to it.

    In the yielded context, the model is the reference model.
    """
    if folder is None:
        yield model.without_adapter
        return
    wrapped: Any = model.model
    wrapped.add_adapter(NAME, read_adapter_config(folder))
    set_adapter(model, read_adapter(folder), NAME)

    @contextmanager
    def use() -> Iterator[None]:
        wrapped.set_adapter(NAME)
        try:
            yield
        finally:
            wrapped.set_adapter("default")

    try:
        yield use
    finally:
        wrapped.delete_adapter(NAME)
        wrapped.set_adapter("default")
