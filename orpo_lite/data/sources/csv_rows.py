"""Rows of .csv and .tsv files."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from orpo_lite.data.sources.encoding import decode
from orpo_lite.data.sources.lines import (
    MAX_COLUMN_NAME,
    MAX_ROW_BYTES,
    File,
    Place,
    converted,
    lines,
)
from orpo_lite.errors import DataError, raise_all, reworded

PANDAS_INDEX = "Unnamed: 0"  # what pandas calls it when it reads the file again
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
EXCEL_SEP = re.compile(
    r"sep=([,;\t|])\s*$", re.IGNORECASE
)  # the first line that Excel writes and reads
NAMED = "the first line should name the columns"
CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f]+"
)  # in the name of a column they would command the terminal


def csv_rows(file: File, faults: list[DataError]) -> Iterator[Place]:
    """Yield every cell as text: a reader that guesses types would make a number of the reply "42"."""
    delimiter = _delimiter_of(file)
    records = _records(file, delimiter, quoted=delimiter != "\t" or not _has_plain_quotes(file))
    start, titles = next(records, (1, []))
    header = _header(titles, f"{file.label}:{start}")
    for number, cells in records:
        where, unnamed = f"{file.label}:{number}", cells[len(header) :]
        if not len(header) <= len(cells) <= len(titles):
            expected, fix = f"{len(titles)} cells, as in the header", _quoting(file, delimiter)
            faults.append(
                DataError(where=where, found=f"{len(cells)} cells", expected=expected, fix=fix)
            )
        elif any(cell.strip() for cell in unnamed):
            found, fix = (
                "a cell in a column without a name",
                f"name it in line {start}, or clear the cell",
            )
            faults.append(DataError(where=where, found=found, expected=NAMED, fix=fix))
        else:
            yield where, dict(zip(header, cells, strict=False))


def _records(file: File, delimiter: str, *, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows, each with the line it starts at."""
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = _without_spaced_quotes(file, delimiter) if quoted else _texts(file)
    records = csv.reader(texts, delimiter=delimiter, quotechar='"' if quoted else None, strict=True)
    start, above_header, may_be_unclosed = 1, True, True
    try:
        for cells in records:
            line_ends = records.line_num - start  # within the row
            if above_header:
                is_blank = not cells or (len(cells) == 1 and cells[0].isspace())
                above_header = is_blank or EXCEL_SEP.match(delimiter.join(cells)) is not None
            if line_ends and may_be_unclosed and _may_be_several(cells, delimiter, line_ends):
                if delimiter == "\t" or _is_even(file, delimiter):
                    raise csv.Error("a quote that is not closed in a line with all cells of a row")
                may_be_unclosed = False
            if cells and not above_header:
                yield start, cells
            start = records.line_num + 1
    except csv.Error as error:
        where, expected, fix = (
            f"{file.label}:{start}",
            "plain or quoted cells",
            _quoting(file, delimiter),
        )
        raise DataError(
            where=where, found=f"broken csv: {error}", expected=expected, fix=fix
        ) from None


def _texts(file: File) -> Iterator[str]:
    """Yield the lines. Raises DataError for one that is too long: it may hold the start or end of other rows."""
    faults: list[DataError] = []
    for number, line in lines(file, faults):
        raise_all(faults)
        yield decode(line, file, f"{file.label}:{number}")
    raise_all(faults)


def _without_spaced_quotes(file: File, delimiter: str) -> Iterator[str]:
    """Yield the lines. Raises DataError where a quote that opens a cell follows a space: it would be text.

    Quotes are doubled within a quoted cell, so that none is found there.
    """
    mark = re.escape(delimiter)
    spaced = re.compile(rf'(^|{mark}) +"(?=[^"\r\n{mark}])')
    for text in _texts(file):
        if '"' in text and spaced.search(text):
            program = f"perl -pe 's/{spaced.pattern}/$1\"/g'"
            found, fix = (
                "spaces before the quotes of a cell",
                converted(file, program, f".quoted{file.kind}"),
            )
            raise DataError(
                where=file.label, found=found, expected="quotes right after the delimiter", fix=fix
            )
        yield text


def _delimiter_of(file: File) -> str:
    """Return the delimiter.

    Excel names it above the header. Else it is the one that cuts the header and the first row into as many cells, the
    comma before the others: a spreadsheet in much of Europe writes semicolons.
    """
    top = next(filter(str.strip, _texts(file)), "")
    if said := EXCEL_SEP.match(top):
        return said[1]
    marks = ["\t"] if file.kind == ".tsv" else [mark for mark in DELIMITERS if mark in top] or [","]
    fitting = [mark for mark in marks if _fits(file, mark)] or marks
    return "," if "," in fitting else max(fitting, key=top.count)


def _fits(file: File, delimiter: str) -> bool:
    try:
        header, row = [*(cells for _, cells in islice(_records(file, delimiter), 2)), [], []][:2]
    except DataError:
        return False
    return len(header) == len(row) > 1


def _has_plain_quotes(file: File) -> bool:
    """Return whether the quotes in a table with tabs are plain characters, as the standard of .tsv has it.

    They are if each line has as many cells as the header with plain quotes, and some line has not by the rules of csv.
    """
    blank = uneven = False
    for text in _texts(file):
        if text.strip() and (
            blank or "\t" not in text
        ):  # a blank line between others is within a quoted cell
            return False
        blank = not text.strip()
        uneven = uneven or ('"' in text and not _is_row(text))
    return uneven and _is_even(file, "\t")


def _is_row(text: str) -> bool:
    """Return whether a line has as many cells by the rules of csv as it has between tabs."""
    try:
        return [len(cells) for cells in csv.reader([text], delimiter="\t", strict=True)] == [
            text.count("\t") + 1
        ]
    except csv.Error:
        return False


def _may_be_several(cells: Sequence[str], delimiter: str, line_ends: int) -> bool:
    """Return whether a row over several lines has the cells of a whole row on each of them."""
    return len(cells) > 1 and sum(cell.count(delimiter) for cell in cells) == line_ends * (
        len(cells) - 1
    )


def _is_even(file: File, delimiter: str) -> bool:
    """Return whether all lines have as many cells as the header if quotes are plain characters."""
    counts = (
        text.count(delimiter) for text in _texts(file) if text.strip() and not EXCEL_SEP.match(text)
    )
    width = next(counts, 0)
    return all(count == width for count in counts)


def _quoting(file: File, delimiter: str) -> str:
    """Return how to write a cell; with tabs also the line for a table in which quotes are plain characters."""
    fix = f'put "..." around {DELIMITERS[delimiter]}, quotes and line ends in a cell, and double the quotes inside'
    if delimiter != "\t":
        return fix
    line = converted(file, """perl -pe 's/"/""/g; s/[^\\t\\r\\n]+/"$&"/g'""", f".quoted{file.kind}")
    return reworded(line, f"{fix}; or where quotes are plain characters: {line}")


def _header(cells: Sequence[str], where: str) -> list[str]:
    """The names; [] of an empty file. A delimiter may end each line, and then the last cells have no names."""
    names = [CONTROL.sub(" ", cell).strip() for cell in cells]
    while len(names) > 1 and not names[-1]:
        del names[-1]
    if names[:1] == [""] and len(names) > 1:  # an index that pandas wrote beside the columns
        names[0] = PANDAS_INDEX
    if any(not name or len(name) > MAX_COLUMN_NAME for name in names):
        found, fix = (
            "a first line with an empty cell or a long text",
            "write the names above the rows",
        )
        raise DataError(where=where, found=found, expected=NAMED, fix=fix)
    refuse_same_names(names, where)
    return names


def refuse_same_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        expected = "a name for each column"
        raise DataError(
            where=where, found="two columns of one name", expected=expected, fix="rename one"
        )
