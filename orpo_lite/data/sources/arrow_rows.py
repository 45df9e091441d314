"""Rows of parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orpo_lite.data.pair import RowError
from orpo_lite.data.sources.csv_rows import refuse_same_names
from orpo_lite.data.sources.json_rows import DECODER
from orpo_lite.data.sources.lines import File, Place
from orpo_lite.errors import DataError

BATCH = 1024  # rows that are Python objects at a time


def arrow_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield the rows with maps as dictionaries, and with what cells of type JSON hold."""
    with arrow_table(file) as (schema, batches, _):
        refuse_same_names(schema.names, file.label)
        with_json = [field for field in schema if "extension<arrow.json>" in str(field.type)]
        slices = (
            batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH)
        )
        rows = (row for part in slices for row in part.to_pylist(maps_as_pydicts="strict"))
        for i, row in enumerate(rows):
            where = f"{file.label}[{i}]"
            try:
                for field in with_json:
                    row[field.name] = _decoded(row[field.name], field.type)
            except (ValueError, RecursionError):
                found, expected = (
                    "broken JSON in a column of type JSON",
                    "plain JSON with each key once",
                )
                fix = "correct or remove the row"
                faults.append(
                    RowError(
                        where=f"{where}, field {field.name}",
                        found=found,
                        expected=expected,
                        fix=fix,
                    )
                )
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
                batches = (
                    map(table.get_batch, range(table.num_record_batches))
                    if is_file
                    else iter(table)
                )
                yield table.schema, batches, 0
    except (OSError, ValueError, KeyError, ArrowException) as error:  # a key: twice in one map
        kind = file.kind[1:]
        raise DataError(
            where=file.label,
            found=f"broken {kind}: {error}",
            expected=f"a whole {kind} file",
            fix="copy it again",
        ) from None


def _decoded(value: Any, kind: Any) -> Any:
    """Return a value of an Arrow type with what the JSON in it holds. Raises ValueError for broken JSON."""
    from pyarrow import BaseExtensionType, JsonType, types

    if value is None:
        return None
    if isinstance(kind, JsonType):
        return DECODER.decode(value)
    if isinstance(kind, BaseExtensionType):
        return _decoded(value, kind.storage_type)
    if types.is_map(kind):
        return {key: _decoded(item, kind.item_type) for key, item in value.items()}
    if types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if isinstance(value, list):
        return [_decoded(item, kind.value_type) for item in value]
    return _decoded(value, kind.value_type) if types.is_dictionary(kind) else value
