"""Read rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orpo_lite.data.pair import RowError
from orpo_lite.data.sources.csv_rows import refuse_same_names
from orpo_lite.data.sources.json_rows import DECODER
from orpo_lite.data.sources.lines import File, PlacedRow
from orpo_lite.errors import DataError

BATCH = 1024  # rows that are converted to Python objects at a time


def arrow_rows(file: File, faults: list[DataError]) -> Iterator[PlacedRow]:
    """Yield (place, row). Maps become dictionaries, and cells of type JSON are decoded.

    Errors of rows are added to ``faults``. Raises DataError for a broken file.
    """
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
                    row[field.name] = _decode_json(row[field.name], field.type)
            except (ValueError, RecursionError):
                fault = RowError(
                    where=f"{where}, field {field.name}",
                    found="broken JSON in a column of type JSON",
                    expected="valid JSON, with each key only once in an object",
                    fix="correct or remove the row",
                )
                faults.append(fault)
            else:
                yield where, row


@contextmanager
def arrow_table(file: File) -> Iterator[tuple[Any, Iterator[Any], int]]:
    """Open a table. Yield (schema, batches, number of rows).

    The number of rows is 0 if it is unknown. Raises DataError for a broken file.
    """
    # pyarrow comes with datasets.
    from pyarrow import ArrowException, ipc, memory_map  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        start = file.start
        if start.startswith(b"PAR1"):
            with ParquetFile(file.path) as table:
                yield table.schema_arrow, table.iter_batches(BATCH), table.metadata.num_rows
        else:
            with memory_map(str(file.path)) as raw:
                if start.startswith(b"ARROW1"):
                    table = ipc.open_file(raw)
                    batches = map(table.get_batch, range(table.num_record_batches))
                else:
                    table = ipc.open_stream(raw)
                    batches = iter(table)
                yield table.schema, batches, 0
    except (OSError, ValueError, KeyError, ArrowException) as error:  # KeyError: a key twice
        name = file.suffix[1:]
        raise DataError(
            where=file.label,
            found=f"broken {name}: {error}",
            expected=f"a complete {name} file",
            fix="copy the file again",
        ) from None


def _decode_json(value: Any, arrow_type: Any) -> Any:
    """Return the value after decoding all JSON texts in it. Raises ValueError for broken JSON."""
    from pyarrow import BaseExtensionType, JsonType, types

    if value is None:
        return None
    if isinstance(arrow_type, JsonType):
        return DECODER.decode(value)
    if isinstance(arrow_type, BaseExtensionType):
        return _decode_json(value, arrow_type.storage_type)
    if types.is_map(arrow_type):
        return {key: _decode_json(item, arrow_type.item_type) for key, item in value.items()}
    if types.is_struct(arrow_type):
        return {field.name: _decode_json(value[field.name], field.type) for field in arrow_type}
    if isinstance(value, list):
        return [_decode_json(item, arrow_type.value_type) for item in value]
    return _decode_json(value, arrow_type.value_type) if types.is_dictionary(arrow_type) else value
