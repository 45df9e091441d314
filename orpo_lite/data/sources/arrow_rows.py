"""Rows of parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orpo_lite.data.pair import RowError
from orpo_lite.data.sources.csv_rows import refuse_same_names
from orpo_lite.data.sources.json_rows import DECODER
from orpo_lite.data.sources.lines import File, Place
from orpo_lite.errors import DataError

BATCH = 1024  # rows that are Python objects at a time

Decoder = Callable[[Any], Any]


def arrow_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield the rows with maps as dictionaries, and with what cells of type JSON hold."""
    with arrow_table(file) as (schema, batches, _):
        refuse_same_names(schema.names, file.label)
        decoders = {field.name: decode for field in schema if (decode := _decoder(field.type))}
        slices = (batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH))
        rows = (row for part in slices for row in part.to_pylist(maps_as_pydicts="strict"))
        for i, row in enumerate(rows):
            where = f"{file.label}[{i}]"
            try:
                for name, decode in decoders.items():
                    row[name] = decode(row[name])
            except (ValueError, RecursionError):
                found, expected = "broken JSON in a column of type JSON", "plain JSON with each key once"
                fix = "correct or remove the row"
                faults.append(RowError(where=f"{where}, field {name}", found=found, expected=expected, fix=fix))
            else:
                yield where, row


@contextmanager
def arrow_table(file: File) -> Iterator[tuple[Any, Iterator[Any], int]]:
    """Open a table: its schema, its batches, and the number of its rows, 0 where that is not known."""
    from pyarrow import ArrowException, ipc, memory_map  # type: ignore[import-untyped] # it comes with datasets
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        start = file.start
        if start.startswith(b"PAR1"):
            with ParquetFile(file.path) as table:
                yield table.schema_arrow, table.iter_batches(BATCH), table.metadata.num_rows
        else:
            with memory_map(str(file.path)) as raw:
                is_file = start.startswith(b"ARROW1")
                table = ipc.open_file(raw) if is_file else ipc.open_stream(raw)
                batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)
                yield table.schema, batches, 0
    except (OSError, ValueError, KeyError, ArrowException) as error:  # a key: twice in one map
        kind = file.kind[1:]
        raise DataError(
            where=file.label, found=f"broken {kind}: {error}", expected=f"a whole {kind} file", fix="copy it again"
        ) from None


def _decoder(kind: Any) -> Decoder | None:
    """Return the function that decodes the JSON in a value of an Arrow type, or None for a type without JSON."""
    from pyarrow import BaseExtensionType, JsonType, types

    if isinstance(kind, JsonType):
        return _unless_null(DECODER.decode)
    if isinstance(kind, BaseExtensionType):
        return _decoder(kind.storage_type)
    if types.is_dictionary(kind):
        return _decoder(kind.value_type)
    inside = {field.name: field.type for field in map(kind.field, range(kind.num_fields))}
    types_by_name = {"": kind.item_type} if types.is_map(kind) else inside
    inner = {name: decode for name, inner_type in types_by_name.items() if (decode := _decoder(inner_type))}
    if not inner:
        return None
    if types.is_struct(kind):
        return _unless_null(lambda row: row | {name: inner[name](row[name]) for name in inner})
    decode = next(iter(inner.values()))
    if types.is_map(kind):
        return _unless_null(lambda pairs: {key: decode(value) for key, value in pairs.items()})
    return _unless_null(lambda items: [decode(item) for item in items])


def _unless_null(decode: Decoder) -> Decoder:
    return lambda value: None if value is None else decode(value)
