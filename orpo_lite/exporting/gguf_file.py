"""Write a GGUF file. The gguf library writes the header. This module writes the tensors."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo_lite.base.blocks import in_blocks, read_rows, read_tensor
from orpo_lite.errors import ModelError
from orpo_lite.exporting.gguf_family import Description, Target

# Value of --outtype -> llama.cpp's ftype: the number for files whose tensors mostly have that type.
OUTTYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def write_gguf(
    file: Path, made: Description, keys: Mapping[str, Any], targets: list[Target], outtype: str
) -> Iterator[tuple[int, int]]:
    """Write a GGUF file. Only a few rows of one tensor are in memory at a time.

    Matrices are stored as ``outtype``. With q8_0, a matrix whose row length is not a multiple of 32
    is stored as f16. Norms, biases and rotary factors are always stored as f32, as in llama.cpp.

    Yields:
        The progress: (tensors written, number of tensors).

    Raises:
        ModelError: a weight is too large for f16.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, made.family.arch)
    keys = {**keys, "general.file_type": OUTTYPES[outtype], "general.quantization_version": 2}
    for key, value in keys.items():
        _add_key(writer, key, value)
    entries = [
        _entry(name, factor.shape, "f32", GGML_QUANT_SIZES) for name, factor in made.factors.items()
    ]
    entries += [
        _entry(target.name, target.stored.shape, _stored_type(target, outtype), GGML_QUANT_SIZES)
        for target in targets
    ]
    for entry in entries:
        raw = GGMLQuantizationType[entry.dtype.upper()]
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=raw
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    sources: list[np.ndarray | Target] = [*made.factors.values(), *targets]
    with file.open("ab") as stream:
        for done, (entry, source) in enumerate(zip(entries, sources, strict=True), start=1):
            stream.write(bytes(-stream.tell() % writer.data_alignment))
            for block in _blocks(source):
                stream.write(_encode(block, entry, file).tobytes())
            yield done, len(entries)
        stream.write(bytes(-stream.tell() % writer.data_alignment))


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    if isinstance(value, bool):  # tested before int, because a bool is an int too
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _stored_type(target: Target, outtype: str) -> str:
    """Return the type in which the GGUF file stores a tensor."""
    if not target.is_matrix:
        return "f32"
    if outtype == "q8_0" and target.stored.shape[-1] % 32:
        return "f16"
    return outtype


def _entry(
    name: str, shape: tuple[int, ...], dtype: str, sizes: Mapping[Any, tuple[int, int]]
) -> _Entry:
    from gguf import GGMLQuantizationType

    block_size, block_bytes = sizes[GGMLQuantizationType[dtype.upper()]]
    return _Entry(name, shape, dtype, math.prod(shape) // block_size * block_bytes)


def _blocks(source: np.ndarray | Target) -> Iterator[np.ndarray]:
    """Yield a tensor's converted rows in blocks, as float32."""
    if isinstance(source, np.ndarray):
        yield source
        return
    stored = source.stored
    if len(stored.shape) == 1:
        yield source.convert(read_tensor(stored).float().numpy()[None])
        return
    for rows in in_blocks(stored, source.head_dim or 1):
        yield source.convert(read_rows(rows).float().numpy())


def _encode(block: np.ndarray, entry: _Entry, file: Path) -> np.ndarray:
    """Convert a block to its tensor's type. Raise ModelError if a value is too large for f16."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    block = np.ascontiguousarray(block, np.float32)
    if entry.dtype == "f16" and np.abs(block).max(initial=0) > LARGEST_F16:
        raise ModelError(
            where=str(file),
            found=f"the tensor {entry.name} has values that are too large for f16",
            expected="values from -65504 to 65504",
            fix="use --outtype bf16",
        )
    return np.asarray(quantize(block, GGMLQuantizationType[entry.dtype.upper()]))
