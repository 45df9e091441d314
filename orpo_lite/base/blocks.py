"""Safetensors files, read and written by blocks of rows: of a model no more is held than the blocks at hand.

Files are read with ``readinto`` into buffers of ours. A memory map would count every page that was touched as memory of
this process, and a limit on its memory would end it.
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

BLOCK = 4 << 20  # bytes that are read, computed and written at a time
AHEAD = 2  # blocks that wait on either side of the arithmetic
LONGEST_HEADER = 100_000_000  # bytes; what the format allows
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Its length along the first axis; 1 where it has none."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // max(self.rows, 1)


@dataclass(frozen=True)
class Rows:
    """Rows ``start:stop`` of a stored tensor."""

    stored: Stored
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder by name, in the order of its files. Raises :class:`ModelError`."""
    return {stored.name: stored for file in weight_files(folder) for stored in read_header(file)}


def read_header(file: Path) -> list[Stored]:
    """What a safetensors file holds, in the order of its bytes (https://github.com/huggingface/safetensors, "Format").

    Raises:
        ModelError: missing, cut short, not of this format, or of a dtype that is not known here.
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
            stored = Stored(
                name,
                file,
                DTYPES[entry["dtype"]],
                tuple(map(int, entry["shape"])),
                8 + length + begin,
            )
            if stored.nbytes != end - begin or begin < 0 or 8 + length + end > file.stat().st_size:
                raise ValueError(f"{name} is cut short")
            found.append(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            where=str(file), found=f"cannot be read: {error!r}", expected="whole safetensors"
        ) from error
    return sorted(found, key=lambda stored: stored.start)


def in_blocks(stored: Stored, multiple: int | None = None) -> Iterator[Rows]:
    """All rows of a tensor, some BLOCK bytes at a time; a tensor without rows as one block.

    Blocks begin at a ``multiple`` of rows: by default, in a matrix, where one of bitsandbytes' blocks of 64 elements
    begins.
    """
    if multiple is None:
        multiple = 64 if len(stored.shape) == 2 else 1  # a row of a larger tensor is a whole expert
    count = max(multiple, BLOCK // max(stored.row_bytes, 1) // multiple * multiple)
    for start in range(0, max(stored.rows, 1), count):
        yield Rows(stored, start, min(start + count, stored.rows))


def read_rows(rows: Rows) -> Tensor:
    """These rows, in memory of their own. Raises :class:`ModelError` for a file that has become shorter."""
    stored = rows.stored
    count = (rows.stop - rows.start) * stored.row_bytes
    data = torch.empty(count, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start + rows.start * stored.row_bytes)
        _fill(stream, data, stored)
    shape = (rows.stop - rows.start, *stored.shape[1:]) if stored.shape else ()
    return data.view(stored.dtype).view(shape)


def read_tensor(stored: Stored) -> Tensor:
    """All of a tensor. Raises as :func:`read_rows`."""
    return read_rows(Rows(stored, 0, stored.rows))


def _fill(stream: BinaryIO, data: Tensor, stored: Stored) -> None:
    view: memoryview = data.numpy().data
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(
                where=str(stored.file),
                found="became shorter while it was read",
                expected="whole safetensors",
            )
        view = view[count:]


def ahead(function: Callable[[Job], Made], jobs: Iterable[Job]) -> Iterator[Made]:
    """``map`` on another thread, AHEAD results before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Made]] = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def shards(tensors: Iterable[Stored], most: int) -> list[list[Stored]]:
    """The tensors in their order, cut into files of at most ``most`` bytes, or of one tensor that is larger."""
    files: list[list[Stored]] = []
    room = 0
    for stored in tensors:
        if not files or stored.nbytes > room:
            files.append([])
            room = most
        files[-1].append(stored)
        room -= stored.nbytes
    return files


def write_model(
    folder: Path, files: Sequence[Sequence[Stored]], blocks: Iterator[Tensor]
) -> Iterator[int]:
    """Write the tensors of ``files`` under transformers' file names, with an index where there are several.

    Args:
        folder: an empty one.
        files: what each file holds: name, dtype and shape count.
        blocks: the contents, all tensors of all files one after the other, in pieces of any size.

    Yields:
        Bytes written so far, after each piece. Each file is flushed to the disk while the next ones are made.
    """
    names = [_file_name(number, len(files)) for number in range(len(files))]
    total = 0
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[None]] = deque()

        def later(function: Callable[..., None], *args: object) -> None:
            waiting.append(pool.submit(function, *args))
            if len(waiting) > AHEAD:
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
    """Make the contents durable, where the file system can (FUSE, SMB); whoever renames the folder notes that."""
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
