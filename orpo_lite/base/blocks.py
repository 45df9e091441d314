"""Read and write safetensors files in blocks of rows. Only a few blocks are in memory at a time.

Files are read with ``readinto``, not with a memory map. Each page that is read through a memory map
counts as memory of the process, so a memory limit could end the process.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from orpo_lite.base.find import weight_files
from orpo_lite.errors import NO_SYNC, ModelError

Job = TypeVar("Job")
Made = TypeVar("Made")

BLOCK = 4 << 20  # bytes in a block, which is read, computed and written as a whole
BLOCKS_AHEAD = 2  # number of blocks read in advance, and of blocks that wait to be written
LONGEST_HEADER = 100_000_000  # bytes, a limit of the safetensors format
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """The offset, dtype and shape of a tensor in a safetensors file. Its values are not read."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of the tensor's first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Return the number of rows: the length of the first axis, or 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Return the size of a row in bytes."""
        return self.nbytes // max(self.rows, 1)


@dataclass(frozen=True)
class Rows:
    """The rows ``start`` to ``stop - 1`` of a tensor in a file. The object holds no values."""

    stored: Stored
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return tensor name -> :class:`Stored` for all weight files of a model folder, file by file.

    Raises:
        ModelError: a file is missing or damaged, or a tensor has an unknown dtype.
    """
    return {stored.name: stored for file in weight_files(folder) for stored in read_header(file)}


def read_header(file: Path) -> list[Stored]:
    """Return a :class:`Stored` for each tensor of a safetensors file, sorted by offset.

    Only the header of the file is read.

    The format is described in https://github.com/huggingface/safetensors, section "Format".

    Raises:
        ModelError: the file is missing, truncated or in another format, or a tensor has an unknown
            dtype.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(LONGEST_HEADER, file.stat().st_size):
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            stored = Stored(name, file, dtype, shape, 8 + length + begin)
            is_beyond = begin < 0 or 8 + length + end > file.stat().st_size
            if stored.nbytes != end - begin or is_beyond:
                raise ValueError(f"{name} is truncated")
            found.append(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            where=str(file),
            found=f"cannot be read: {error!r}",
            expected="a complete safetensors file",
        ) from error
    return sorted(found, key=lambda stored: stored.start)


def in_blocks(stored: Stored, multiple: int | None = None) -> Iterator[Rows]:
    """Split the rows of a tensor into blocks of about 4 MiB (BLOCK), and yield the blocks.

    An empty tensor gives one block. The number of rows of each block, except the last, is divisible
    by ``multiple``. The default of ``multiple`` is 64 for a matrix, else 1. bitsandbytes quantises
    groups of 64 elements. If ``multiple`` is 64, each group is inside one block.
    """
    if multiple is None:
        multiple = 64 if len(stored.shape) == 2 else 1  # a row of a 3-D tensor is a whole expert
    count = max(multiple, BLOCK // max(stored.row_bytes, 1) // multiple * multiple)
    for start in range(0, max(stored.rows, 1), count):
        yield Rows(stored, start, min(start + count, stored.rows))


def read_rows(rows: Rows) -> Tensor:
    """Read rows into a new tensor. Raise :class:`ModelError` if the file lacks some rows."""
    stored = rows.stored
    count = (rows.stop - rows.start) * stored.row_bytes
    data = torch.empty(count, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start + rows.start * stored.row_bytes)
        _fill(stream, data, stored)
    shape = (rows.stop - rows.start, *stored.shape[1:]) if stored.shape else ()
    return data.view(stored.dtype).view(shape)


def read_tensor(stored: Stored) -> Tensor:
    """Read all rows of a tensor. Raises the same errors as :func:`read_rows`."""
    return read_rows(Rows(stored, 0, stored.rows))


def _fill(stream: BinaryIO, data: Tensor, stored: Stored) -> None:
    view: memoryview = data.numpy().data
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(
                where=str(stored.file),
                found="became shorter while it was read",
                expected="a complete safetensors file",
            )
        view = view[count:]


def compute_ahead(function: Callable[[Job], Made], jobs: Iterable[Job]) -> Iterator[Made]:
    """Yield ``function(job)`` for each job, in the order of the jobs.

    Another thread computes the next two results (BLOCKS_AHEAD) in advance.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Made]] = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > BLOCKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def split_into_files(tensors: Iterable[Stored], most: int) -> list[list[Stored]]:
    """Distribute tensors over files of at most ``most`` bytes. Return one list for each file.

    The order of the tensors is kept. A tensor of more than ``most`` bytes gets its own file.
    """
    files: list[list[Stored]] = []
    left = 0
    for stored in tensors:
        if not files or stored.nbytes > left:
            files.append([])
            left = most
        files[-1].append(stored)
        left -= stored.nbytes
    return files


def write_model(
    folder: Path, files: Sequence[Sequence[Stored]], blocks: Iterator[Tensor]
) -> Iterator[int]:
    """Write tensors to safetensors files. Name the files as transformers does.

    If there are several files, write an index file too. While a file is flushed to the disk, the
    next blocks can already be computed.

    Args:
        folder: an empty folder.
        files: the tensors of each file. Only their names, dtypes and shapes are used.
        blocks: the contents of all tensors of all files, in order. A block may have any size, but
            it must not contain data of two files.

    Yields:
        The number of bytes written so far, after each block.
    """
    names = [_file_name(number, len(files)) for number in range(len(files))]
    total = 0
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[None]] = deque()

        def later(function: Callable[..., None], *args: object) -> None:
            waiting.append(pool.submit(function, *args))
            if len(waiting) > BLOCKS_AHEAD:
                waiting.popleft().result()

        for name, held in zip(names, files, strict=True):
            stream = (folder / name).open("wb", buffering=0)
            try:
                later(_write, stream, _header(held))
                left = sum(stored.nbytes for stored in held)
                while left > 0:
                    block = next(blocks)
                    left, total = left - block.nbytes, total + block.nbytes
                    later(_write, stream, _bytes(block))
                    yield total
                later(_sync, stream.fileno())
                while waiting:
                    waiting.popleft().result()
            finally:
                stream.close()
    if len(files) > 1:
        index: Mapping[str, object] = {
            "metadata": {"total_size": total},
            "weight_map": {
                stored.name: name
                for name, held in zip(names, files, strict=True)
                for stored in held
            },
        }
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def _sync(descriptor: int) -> None:
    """Flush a file to the disk. Do nothing if the file system cannot flush (FUSE, SMB).

    For such a file system, ``orpo_lite.runs.folder.locked`` yields a warning.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _header(tensors: Sequence[Stored]) -> memoryview:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for stored in tensors:
        offsets = [place, place + stored.nbytes]
        entries[stored.name] = {
            "dtype": CODES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": offsets,
        }
        place = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(block: Tensor) -> memoryview:
    data: memoryview = block.contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _write(stream: BinaryIO, view: memoryview) -> None:
    while view:
        view = view[stream.write(view) :]
