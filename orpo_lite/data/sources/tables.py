"""Rows of .csv, .tsv and .parquet files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile, islice
from typing import Any

from orpo_lite.data.sources.lines import MAX_COLUMN_NAME, MAX_ROW_BYTES, File, Place, decode, lines
from orpo_lite.errors import DataError

PANDAS_INDEX = "Unnamed: 0"  # what pandas calls it when it reads the file again
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
EXCEL_SEP = re.compile(r"sep=([,;\t|])\s*$", re.IGNORECASE)  # the first line that Excel writes and reads
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")  # in the name of a column they would command the terminal
SPACED_QUOTE = re.compile(' +"')


def csv_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Every cell is text: a reader that guesses types would make a number of the reply "42"."""
    delimiter, spaced = reading(file)
    records = csv_records(file, delimiter, spaced)
    start, titles = next(records, (1, []))
    header = csv_header(titles, f"{file.label}:{start}")
    for number, cells in records:
        where, unnamed = f"{file.label}:{number}", cells[len(header) :]
        if not len(header) <= len(cells) <= len(titles):
            fix = 'put "..." around {} and line ends'
            faults.append(
                DataError(
                    where=where,
                    found=f"{len(cells)} cells",
                    expected=f"{len(titles)} cells, as in the header",
                    fix=fix.format(DELIMITERS[delimiter]),
                )
            )
        elif any(cell.strip() for cell in unnamed):
            fix = f"name it in line {start}, or clear the cell"
            faults.append(
                DataError(
                    where=where,
                    found="a cell in a column without a name",
                    expected="the first line should name the columns",
                    fix=fix,
                )
            )
        else:
            yield where, dict(zip(header, cells, strict=False))


def csv_records(file: File, delimiter: str, spaced: bool) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows, each with the line it starts at."""
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = dropwhile(lambda place: not place[1].strip() or bool(EXCEL_SEP.match(place[1])), _texts(file))
    start, first = next(texts, (1, ""))
    above = start - 1
    lines = chain([first], (text for _, text in texts))
    records = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        for cells in records:
            if cells:
                yield start, cells
            start = above + records.line_num + 1
    except csv.Error as error:
        raise DataError(
            where=f"{file.label}:{start}",
            found=f"broken csv: {error}",
            expected="plain or quoted cells",
            fix='put "..." around a cell with commas, quotes or line ends, and double the quotes inside',
        ) from None


def _texts(file: File) -> Iterator[tuple[int, str]]:
    yield from ((number, decode(line, f"{file.label}:{number}")) for number, line in lines(file, quoted=True))


def reading(file: File) -> tuple[str, bool]:
    """The delimiter, and whether spaces may stand between it and a quote.

    Excel names the delimiter above the header. Else it is the one that cuts the header and the first row into as many
    cells, the comma before the others: a spreadsheet in much of Europe writes semicolons.
    """
    top = next((text for _, text in _texts(file) if text.strip()), "")
    if said := EXCEL_SEP.match(top):
        marks = [said[1]]
    else:
        marks = ["\t"] if file.kind == ".tsv" else [mark for mark in DELIMITERS if mark in top] or [","]
    starts = {mark: _first_two(file, mark, spaced=False) for mark in marks}
    fitting = [mark for mark, (header, row) in starts.items() if len(header) == len(row) > 1] or marks
    delimiter = "," if "," in fitting else max(fitting, key=top.count)
    # Quotes behind spaces are text to the plain reader. A quoted cell may start so too, and reads the same either way.
    plain, loose = (set(chain(*rows)) for rows in (starts[delimiter], _first_two(file, delimiter, spaced=True)))
    return delimiter, bool(loose) and any(SPACED_QUOTE.match(cell) for cell in plain - loose)


def _first_two(file: File, delimiter: str, *, spaced: bool) -> tuple[list[str], list[str]]:
    """The header and the first row, without cells where the file cannot be read so."""
    try:
        header, row = [*(cells for _, cells in islice(csv_records(file, delimiter, spaced), 2)), [], []][:2]
    except DataError:
        return [], []
    return header, row


def csv_header(cells: Sequence[str], where: str) -> list[str]:
    """The names; [] of an empty file. A delimiter may end each line, and then the last cells have no names."""
    names = [CONTROL.sub(" ", cell).strip() for cell in cells]
    while len(names) > 1 and not names[-1]:
        del names[-1]
    if names[:1] == [""] and len(names) > 1:  # an index that pandas wrote beside the columns
        names[0] = PANDAS_INDEX
    if any(not name or len(name) > MAX_COLUMN_NAME for name in names):
        raise DataError(
            where=where,
            found="a first line with an empty cell or a long text",
            expected="the first line should name the columns",
            fix="write the names above the rows",
        )
    _refuse_same_names(names, where)
    return names


def _refuse_same_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(
            where=where, found="two columns of one name", expected="a name for each column", fix="rename one"
        )


def parquet_rows(file: File, _faults: list[DataError]) -> Iterator[Place]:
    from pyarrow import ArrowException  # type: ignore[import-untyped] # it comes with datasets

    with parquet(file) as table:
        _refuse_same_names(table.schema_arrow.names, file.label)
        try:
            rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            yield from ((f"{file.label}[{i}]", row) for i, row in enumerate(rows))
        except (OSError, ValueError, ArrowException) as error:
            raise _broken_parquet(file, error) from None


def parquet(file: File) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    try:
        return ParquetFile(file.path)
    except (OSError, ValueError, ArrowException) as error:
        raise _broken_parquet(file, error) from None


def _broken_parquet(file: File, error: Exception) -> DataError:
    return DataError(
        where=file.label, found=f"broken parquet: {error}", expected="a whole parquet file", fix="copy it again"
    )
