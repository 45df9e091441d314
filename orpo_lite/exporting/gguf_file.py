"""A GGUF file written as it is read: header, keys and tensor list by the gguf library, then one block after another."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo_lite.base.blocks import in_blocks, read_rows, read_tensor
from orpo_lite.errors import ModelError
from orpo_lite.exporting.gguf_family import Description, Target

# What --outtype calls it -> the number that a file of mostly that type carries (llama.cpp's ftype).
OUTTYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int


def write_gguf(
    file: Path, made: Description, keys: Mapping[str, Any], targets: list[Target], outtype: str
) -> Iterator[tuple[int, int]]:
    """Write a GGUF file; a few rows of one tensor are in memory at a time.

    Matrices become ``outtype``, where their rows are a multiple of q8_0's 32 (else f16); norms, biases and rotary
    factors stay f32, as everywhere in llama.cpp.

    Yields:
        (tensors done, tensors in all).

    Raises:
        ModelError: numbers that f16 cannot hold.
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
        _entry(target.name, target.stored.shape, _kind(target, outtype), GGML_QUANT_SIZES)
        for target in targets
    ]
    for entry in entries:
        raw = GGMLQuantizationType[entry.kind.upper()]
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
    # bool before int, which it is
    kinds = ((bool, "bool"), (str, "string"), (int, "uint32"), (float, "float32"))
    kind = next(name for type_, name in kinds if isinstance(value, type_))
    getattr(writer, f"add_{kind}")(key, value)


def _kind(target: Target, outtype: str) -> str:
    if not target.is_matrix:
        return "f32"
    return "f16" if outtype == "q8_0" and target.stored.shape[-1] % 32 else outtype


def _entry(
    name: str, shape: tuple[int, ...], kind: str, sizes: Mapping[Any, tuple[int, int]]
) -> _Entry:
    numbers, nbytes = next(size for key, size in sizes.items() if key.name == kind.upper())
    return _Entry(name, shape, kind, math.prod(shape) // numbers * nbytes)


def _blocks(source: np.ndarray | Target) -> Iterator[np.ndarray]:
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
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    block = np.ascontiguousarray(block, np.float32)
    if entry.kind == "f16" and block.size and np.abs(block).max() > LARGEST_F16:
        raise ModelError(
            where=str(file),
            found=f"{entry.name} holds numbers that f16 cannot",
            expected="up to 65504",
            fix="--outtype bf16",
        )
    return np.asarray(quantize(block, GGMLQuantizationType[entry.kind.upper()]))
