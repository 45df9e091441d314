"""Add an adapter to the weights of its base, block by block, and write the merged model."""

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
    compute_ahead,
    in_blocks,
    read_rows,
    split_into_files,
    stored_tensors,
    write_model,
)
from orpo_lite.base.download import check_disk
from orpo_lite.base.find import Base, load_tokenizer
from orpo_lite.errors import CheckpointError, Command, FitError, ModelError, RecipeError, first_line
from orpo_lite.merging.deltas import clear_cache
from orpo_lite.merging.plan import Plan, make_plan
from orpo_lite.model.score_head import merged_reward_config
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

MAX_SHARD_BYTES = 5 * 10**9  # bytes per file; a former default of max_shard_size in transformers


class UnchangedError(ModelError):
    """The adapter changes no weight: the merged model would be equal to the base."""


@dataclass(frozen=True)
class MergeResult:
    """The folder of a merged model, and figures of the merge."""

    folder: Path
    base: Base
    weights: Weights
    bytes: int
    """Size of all files."""
    changed: int
    """Number of matrices that the adapter changed."""
    targets: int
    """Number of matrices that have an adapter."""


def merge(
    run_folder: str | Path,
    *,
    weights: Weights = "original",
    max_shard_size: int | str = MAX_SHARD_BYTES,
    base_path: str | Path | None = None,
) -> MergeResult:
    """Merge the adapter of a run into its base, and write the merged model to ``RUN/merged``.

    If the merge fails, ``RUN/merged`` stays as it was.

    Most tensors are merged block by block, so that only a few blocks are in memory. The sum of
    weight and delta is computed in float32 and rounded once, to the dtype of the base. The sum is
    never rounded to 4 bit, because such a rounding would lose the adapter's small changes.

    Args:
        run_folder: the folder of a finished training.
        weights: the weights that the adapter is added to
            (:data:`orpo_lite.runs.commands.Weights`). If ``weights`` is "dequantized", the folder
            of the merged model is ``RUN/merged-dequantized``, not ``RUN/merged``.
        max_shard_size: the largest size of a weight file, in bytes or as a text such as 5GB. A
            file with only one tensor may be larger.
        base_path: the folder of the base, if the base was moved after the training.

    Raises:
        CheckpointError: there is no finished run in this folder.
        ModelError: the base differs from the base of the training, the adapter does not fit the
            base, or the adapter changes no weight.
        FitError: there is not enough disk space or memory.
        HubError: the base cannot be downloaded.
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
    max_shard_size: int | str = MAX_SHARD_BYTES,
    base_path: str | Path | None = None,
) -> Generator[Update, None, MergeResult]:
    """Yield the progress of :func:`merge`; finally return its result."""
    path = Path(run_folder).expanduser()
    folder, max_bytes = path / merged_folder(weights), _read_shard_size(max_shard_size)
    recipe, adapter = trained_recipe(path), find_finished_adapter(path)
    try:
        load_tokenizer(adapter)  # it will be copied to the merged model
    except ModelError as error:
        error.fix = Command(resume_command(path).line, ", which writes the tokenizer again")
        raise
    base = find_trained_base(path, base_path)
    yield Update("stage", f"merging {adapter} into its base")
    if weights == "dequantized" and not recipe.quantization.load_in_4bit:
        raise CheckpointError(
            where=f"run {path}",
            found="the run was trained on 16-bit weights, so there is nothing to dequantize",
            expected="a run with quantization.load_in_4bit=true",
            fix="merge onto the original weights (--base original)",
        )
    stored = stored_tensors(base.path)
    check_disk(path, sum(tensor.nbytes for tensor in stored.values()), f"merging {path}")
    with locked(path) as notes, new_folder(folder) as temporary, _enough_memory(path):
        for note in notes:
            yield Update("note", note)
        lock = read_lock(path)
        plan = make_plan(base, adapter, stored, recipe, weights, lock.get("not_quantised", []))
        # Runs of an older version did not record the dtype.
        trained_in = getattr(torch, lock.get("dtype", "float32"))
        changed = yield from _write_merged(plan, temporary, max_bytes, trained_in)
        config = read_json(base.path / "config.json")
        config.pop("_name_or_path", None)  # older transformers wrote a local path here
        if recipe.loss.trains_reward_model:
            config |= merged_reward_config(base.config, load_tokenizer(adapter).pad_token_id)
        write_text(temporary / "config.json", to_json(config))
        if not changed:
            raise UnchangedError(
                where=f"adapter {adapter}",
                found=f"changes nothing: after rounding, {plan.targets} of {plan.targets} adapted "
                "matrices are equal to the base's",
                expected="an adapter that changes the weights; it may need more training steps",
            )
        _copy_side_files(base.path, adapter, temporary)
        record = {
            "weights": weights,
            "base": base.name if base.revision else None,  # a local path is private
            "revision": base.revision,
            "fingerprint": base.fingerprint,
            "adapter_sha256": adapter_sha256(adapter),
            "changed": changed,
            "targets": plan.targets,
        }
        write_text(temporary / "merge.json", to_json(record))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return MergeResult(folder, base, weights, size, changed, plan.targets)


def _read_shard_size(given: int | str) -> int:
    """Return a size in bytes. Raise RecipeError if it is not a positive size."""
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
    """Turn an error of torch or Python about missing memory into a FitError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise FitError(
            where=f"merging {path}",
            found=f"memory ran out ({first_line(error)})",
            fix="close other programs, or raise the memory limit of this process",
        ) from error


def _write_merged(
    plan: Plan, folder: Path, max_bytes: int, trained_in: torch.dtype
) -> Generator[Update, None, int]:
    """Write the merged tensors, yield updates; finally return the number of changed parameters."""
    files = split_into_files(plan.stored.values(), max_bytes)
    total = sum(stored.nbytes for stored in plan.stored.values())
    changed: set[str] = set()
    try:
        for done in write_model(folder, files, _merged_blocks(plan, files, changed, trained_in)):
            yield Update("stage", "writing the merged model (MiB)", done >> 20, max(total >> 20, 1))
    finally:
        clear_cache()
    return len(changed)


def _merged_blocks(
    plan: Plan, files: Iterable[Iterable[Stored]], changed: set[str], trained_in: torch.dtype
) -> Iterator[Tensor]:
    """Yield the blocks of all merged tensors, in the order of the files.

    The names of parameters that differ from the base after the merge are added to ``changed``.
    """
    order = [stored for file in files for stored in file]
    reads = compute_ahead(read_rows, (rows for stored in order for rows in in_blocks(stored)))
    for stored in order:
        # Not strict: ``reads`` also holds the blocks of the next tensors.
        pieces: Iterator[tuple[Rows, Tensor]] = zip(in_blocks(stored), reads)  # noqa: B905
        is_transposed = stored.name in plan.transposed
        if is_transposed:
            pieces = _transpose(pieces)
        if stored.name in plan.quantised:
            pieces = round_to_4_bit(pieces, plan.settings, trained_in)
        delta = plan.deltas.get(stored.name)
        add_delta = delta.load() if delta else None
        for rows, block in pieces:
            if delta is None or add_delta is None:
                yield (block.t() if is_transposed else block).to(stored.dtype)
                continue
            merged = add_delta(block, rows.start)
            is_noted = changed.issuperset(delta.parameters)
            if not is_noted and not _is_equal(merged, block, stored.dtype):
                changed.update(delta.parameters)
            # The block that was read is overwritten, because allocating new memory is slow.
            out = block
            if block.dtype != stored.dtype:
                out = torch.empty(block.shape, dtype=stored.dtype)
            out.copy_(merged)
            if stored.dtype == torch.float16 and not out.isfinite().all():
                raise ModelError(
                    where="merge",
                    found=f"{stored.name} plus the adapter's delta overflows float16",
                    fix="use a base whose weights are bfloat16 or float32",
                )
            yield out.t() if is_transposed else out


def _transpose(pieces: Iterable[tuple[Rows, Tensor]]) -> Iterator[tuple[Rows, Tensor]]:
    """Join the blocks of an (inputs, outputs) matrix; yield one (outputs, inputs) block."""
    rows, blocks = zip(*pieces, strict=True)
    yield rows[0], torch.cat(blocks).t().contiguous()


def _is_equal(merged: Tensor, block: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(merged.to(dtype), block.to(dtype))


def round_to_4_bit(
    pieces: Iterable[tuple[Rows, Tensor]], settings: QuantizationSection, trained_in: torch.dtype
) -> Iterator[tuple[Rows, Tensor]]:
    """Quantise a matrix to 4 bit, dequantise it, and yield its blocks of rows in float32.

    Before the quantisation, the blocks are converted to ``trained_in``, the dtype of the training.
    Otherwise a base that is stored in float16 and was trained in bfloat16 would get other scales
    and codes than in the training.

    Double quantisation rounds all scales of the matrix together
    (``bitsandbytes.functional.quantize_4bit``). Therefore the codes of all blocks are kept until
    the last block is read. The codes take a quarter of the bytes of the matrix in 16 bit.
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
        # The block is dequantised as one row. bitsandbytes' CPU kernel (0.50) gives wrong values if
        # the length of a row is an odd multiple of 32.
        state.absmax, state.dtype, state.shape = part, torch.float32, torch.Size([math.prod(shape)])
        yield rows, functional.dequantize_4bit(packed, state).view(shape)


def _copy_side_files(base: Path, adapter: Path, folder: Path) -> None:
    """Copy the adapter's tokenizer, templates and generation config, and the base's processors.

    Bases that read images have processors.
    """
    for file in adapter.rglob("*"):
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            place = folder / file.relative_to(adapter)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
    for file in base.glob("*processor*.json"):
        shutil.copyfile(file, folder / file.name)
    load_tokenizer(folder)
