"""The tensors of a model folder, read from safetensors a few rows at a time: no tensor is ever held whole twice.

The header of a file is JSON and the data lie behind it, so neither torch nor a memory map of gigabytes is needed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from orpo_lite.base import weight_files
from orpo_lite.errors import ModelError

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
BLOCK = 1 << 23  # numbers read at a time: 32 MiB in float32
HEADER = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    name: str
    dtype: str
    """F32, F16 or BF16."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the file."""


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder by name; nothing of their data is read.

    Raises:
        ModelError: a file that is missing, broken or cut short, or a tensor of another kind of number.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        for name, (dtype, shape, start) in _header(file).items():
            found[name] = Stored(file, name, dtype, shape, start)
    return found


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    tensors = {}
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(HEADER, size - 8):
                raise ValueError("its header does not fit into it")
            header: dict[str, Any] = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in BYTES:
                raise ValueError(f"{name} is of type {dtype}, not of F32, F16 or BF16")
            if start < 0 or end - start != prod(shape) * BYTES[dtype] or 8 + length + end > size:
                raise ValueError(f"{name} does not fit into it")
            tensors[name] = (dtype, shape, 8 + length + start)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(str(file), f"cannot be read: {error}", "weights in safetensors, 16 or 32 bit") from None
    return tensors


def read_rows(tensor: Stored, multiple: int = 1) -> Iterator[np.ndarray]:
    """Yield the tensor in float32, a multiple of ``multiple`` rows at a time; one of one dimension as one row."""
    columns = tensor.shape[-1]
    rows = prod(tensor.shape[:-1])
    step = rows if len(tensor.shape) == 1 else max(1, BLOCK // max(1, columns) // multiple) * multiple
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = stream.read(count * columns * BYTES[tensor.dtype])
            yield _to_float32(data, tensor.dtype).reshape(count, columns)


def _to_float32(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32)
