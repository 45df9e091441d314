"""Merge: the adapter's product added to the base's weights, block by block, as a plain transformers folder."""

import math
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from orpo_lite.base.blocks import (
    Rows,
    Stored,
    ahead,
    in_blocks,
    read_rows,
    shards,
    stored_tensors,
    write_model,
)
from orpo_lite.base.download import check_disk
from orpo_lite.base.find import Base, load_tokenizer
from orpo_lite.errors import CheckpointError, Command, FitError, ModelError, RecipeError, first_line
from orpo_lite.merging.deltas import forget
from orpo_lite.merging.plan import Plan, make_plan
from orpo_lite.recipe.schema import QuantizationSection
from orpo_lite.recipe.text import read_bytes
from orpo_lite.runs.atomic import new_folder, to_json, write_text
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, resume_command
from orpo_lite.runs.folder import (
    adapter_sha256,
    find_finished_adapter,
    find_trained_base,
    locked,
    merged_folder,
)
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

SHARD = 5 * 10**9  # bytes of a file; transformers' max_shard_size has long been so


class UnchangedError(ModelError):
    """The merged model would be the base."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model on disk."""

    folder: Path
    base: Base
    weights: Weights
    bytes: int
    changed: int
    """Matrices that the adapter changed."""
    targets: int
    """Matrices that it is trained for."""


def merge(
    run_folder: str | Path,
    *,
    weights: Weights = "original",
    max_shard_size: int | str = SHARD,
    base_path: str | Path | None = None,
) -> MergeResult:
    """Merge the adapter of a run into the base it was trained on; writes ``RUN/merged``, whole or not at all.

    No more of a model is held than some blocks of a tensor. The sum is made in float32 and rounded once, to the dtype
    of the base, never to 4 bit: that loses the adapter.

    Args:
        run_folder: of a training that has ended.
        weights: see :data:`orpo_lite.runs.commands.Weights`; ``dequantized`` is written to ``RUN/merged-dequantized``.
        max_shard_size: bytes of a file, unless one tensor is larger; or a size such as 5GB.
        base_path: where the base lies now, if it is a folder that was moved.

    Raises:
        CheckpointError: no finished run there.
        ModelError: the base is not the one that was trained on, the adapter fits nothing or changes nothing.
        FitError: not enough disk space or memory.
        HubError: the base cannot be fetched.
    """
    updates = merge_events(
        run_folder, weights=weights, max_shard_size=max_shard_size, base_path=base_path
    )
    return run_to_end(updates, lambda _: None)


@with_torch_defaults
def merge_events(
    run_folder: str | Path,
    *,
    weights: Weights = "original",
    max_shard_size: int | str = SHARD,
    base_path: str | Path | None = None,
) -> Generator[Update, None, MergeResult]:
    """:func:`merge` as a generator of what is being done."""
    path = Path(run_folder).expanduser()
    folder, most = path / merged_folder(weights), _shard_size(max_shard_size)
    recipe, adapter = trained_recipe(path), find_finished_adapter(path)
    try:
        load_tokenizer(adapter)  # it goes with the weights
    except ModelError as error:
        error.fix = Command(resume_command(path).line, ", which writes it again")
        raise
    base = find_trained_base(path, base_path)
    yield Update("stage", f"merging {adapter} into its base")
    if weights == "dequantized" and not recipe.quantization.load_in_4bit:
        found = "this run was trained on 16-bit weights"
        raise CheckpointError(
            where=f"run {path}",
            found=found,
            expected="quantization.load_in_4bit",
            fix="merge onto the original ones",
        )
    stored = stored_tensors(base.path)
    check_disk(path, sum(tensor.nbytes for tensor in stored.values()), f"merging {path}")
    with locked(path) as notes, new_folder(folder) as temporary, _enough_memory(path):
        for note in notes:
            yield Update("note", note)
        lock = read_lock(path)
        plan = make_plan(base, adapter, stored, recipe, weights, lock.get("not_quantised", []))
        dtype = getattr(
            torch, lock.get("dtype", "float32")
        )  # which runs of an older version did not note
        changed = yield from _stream(plan, temporary, most, dtype)
        config = read_json(base.path / "config.json")
        config.pop(
            "_name_or_path", None
        )  # where the base once lay, which an older transformers noted
        write_text(temporary / "config.json", to_json(config))
        if not changed:
            found = f"changes nothing: none of its {plan.targets} matrices differs after rounding"
            raise UnchangedError(
                where=f"adapter {adapter}",
                found=found,
                expected="an adapter that has learnt something",
            )
        _copy_texts(base.path, adapter, temporary)
        record = {
            "weights": weights,
            "base": base.name
            if base.revision
            else None,  # where a folder of somebody's lies is their business
            "revision": base.revision,
            "fingerprint": base.fingerprint,
            "adapter_sha256": adapter_sha256(adapter),
            "changed": changed,
            "targets": plan.targets,
        }
        write_text(temporary / "merge.json", to_json(record))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return MergeResult(folder, base, weights, size, changed, plan.targets)


def _shard_size(given: int | str) -> int:
    try:
        size = read_bytes(given) if isinstance(given, str) else given
    except ValueError:
        size = 0
    if size < 1:
        raise RecipeError(
            where="--max-shard-size",
            found=str(given),
            expected="a number and a unit: KB, MB, GB, KiB, MiB or GiB",
            fix="5GB",
        )
    return size


@contextmanager
def _enough_memory(path: Path) -> Iterator[None]:
    """Memory that runs out is the machine's fault: FitError instead of a traceback."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise FitError(
            where=f"merging {path}",
            found=f"memory ran out ({first_line(error)})",
            fix="close other programs, or raise the limit",
        ) from error


def _stream(
    plan: Plan, folder: Path, most: int, trained_in: torch.dtype
) -> Generator[Update, None, int]:
    """Write the merged tensors; returns how many the adapter has changed."""
    files = shards(plan.stored.values(), most)
    total = sum(stored.nbytes for stored in plan.stored.values())
    changed: set[str] = set()
    try:
        for done in write_model(folder, files, _merged_blocks(plan, files, changed, trained_in)):
            yield Update("stage", "MiB merged", done >> 20, max(total >> 20, 1))
    finally:
        forget()
    return len(changed)


def _merged_blocks(
    plan: Plan, files: Iterable[Iterable[Stored]], changed: set[str], trained_in: torch.dtype
) -> Iterator[Tensor]:
    """The contents of all files, in order; names of adapted parameters that differ go to ``changed``."""
    order = [stored for held in files for stored in held]
    reads = ahead(read_rows, (rows for stored in order for rows in in_blocks(stored)))
    for stored in order:
        pieces: Iterator[tuple[Rows, Tensor]] = zip(in_blocks(stored), reads)  # noqa: B905 - reads go on
        turned = stored.name in plan.transposed
        if turned:
            pieces = _turned(pieces)
        if stored.name in plan.quantised:
            pieces = dequantized(pieces, plan.settings, trained_in)
        delta = plan.deltas.get(stored.name)
        added = delta.load() if delta else None
        for rows, block in pieces:
            if delta is None or added is None:
                yield (block.t() if turned else block).to(stored.dtype)
                continue
            merged = added(block, rows.start)
            if not changed.issuperset(delta.parameters) and not _same(merged, block, stored.dtype):
                changed.update(delta.parameters)
            out = (
                block
                if block.dtype == stored.dtype
                else torch.empty(block.shape, dtype=stored.dtype)
            )
            out.copy_(
                merged
            )  # in the place of what was read: memory that is new to a process costs time
            if stored.dtype == torch.float16 and not out.isfinite().all():
                raise ModelError(
                    where="merge",
                    found=f"{stored.name} overflows float16 with the adapter",
                    fix="a base whose weights are bfloat16 or float32",
                )
            yield out.t() if turned else out


def _turned(pieces: Iterable[tuple[Rows, Tensor]]) -> Iterator[tuple[Rows, Tensor]]:
    """All of a matrix that is stored as (inputs, outputs), as (outputs, inputs)."""
    rows, blocks = zip(*pieces, strict=True)
    yield rows[0], torch.cat(blocks).t().contiguous()


def _same(merged: Tensor, block: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(merged.to(dtype), block.to(dtype))


def dequantized(
    pieces: Iterable[tuple[Rows, Tensor]], settings: QuantizationSection, trained_in: torch.dtype
) -> Iterator[tuple[Rows, Tensor]]:
    """A matrix's blocks of rows as 4 bit leaves them, in float32.

    They are quantised from ``trained_in``, as in the training: a base that is stored in float16 and trained in bfloat16
    has other scales and other codes than one that is quantised as it is stored.

    The double quantisation rounds all of the matrix's scales together, so its codes, a quarter of its bytes, wait until
    the last block is read (``bitsandbytes.functional.quantize_4bit``).
    """
    from bitsandbytes import functional

    codes, scales = [], []
    for rows, block in pieces:
        packed, state = functional.quantize_4bit(
            block.to(trained_in), quant_type=settings.bnb_4bit_quant_type, compress_statistics=False
        )
        codes.append((rows, packed, state))
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    if settings.bnb_4bit_use_double_quant:
        offset = absmax.mean()
        nested = functional.quantize_blockwise(absmax - offset, blocksize=256)
        absmax = functional.dequantize_blockwise(*nested) + offset
    parts = torch.split(absmax, [len(part) for part in scales])
    for (rows, packed, state), part in zip(codes, parts, strict=True):
        shape = state.shape
        # As one row: bitsandbytes' kernel for CPUs (0.50) errs on rows of an odd multiple of 32 elements.
        state.absmax, state.dtype, state.shape = part, torch.float32, torch.Size([math.prod(shape)])
        yield rows, functional.dequantize_4bit(packed, state).view(shape)


def _copy_texts(base: Path, adapter: Path, folder: Path) -> None:
    """The adapter's tokenizer, template and generation config, and what a base that sees has for its pictures."""
    for file in adapter.rglob("*"):
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            place = folder / file.relative_to(adapter)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    for file in base.glob("*processor*.json"):
        shutil.copyfile(file, folder / file.name)
    load_tokenizer(folder)
