"""Read rows of .csv and .tsv files."""

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
    PlacedRow,
    conversion_command,
    lines,
)
from orpo_lite.errors import DataError, raise_all, reworded

PANDAS_INDEX = "Unnamed: 0"  # pandas' name for a first column without a name, usually its index
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Excel may write the delimiter into the first line: "sep=;".
EXCEL_SEP = re.compile(r"sep=([,;\t|])\s*$", re.IGNORECASE)
NAMED = "column names in the first line"
# Control characters in a column's name would reach the terminal.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def csv_rows(file: File, faults: list[DataError]) -> Iterator[PlacedRow]:
    """Yield (place, row), where the place is file and line: a.csv:3. Every cell is a text.

    The types of cells are not guessed, because a guess would turn the reply "42" into a number.
    Errors of rows are added to ``faults``. Raises DataError for a file that cannot be read at all.
    """
    delimiter = _find_delimiter(file)
    is_quoted = delimiter != "\t" or not _has_plain_quotes(file)
    records = _records(file, delimiter, quoted=is_quoted)
    start, titles = next(records, (1, []))
    header = _header(titles, f"{file.label}:{start}")
    for number, cells in records:
        where, unnamed = f"{file.label}:{number}", cells[len(header) :]
        if not len(header) <= len(cells) <= len(titles):
            fault = DataError(
                where=where,
                found=f"{len(cells)} cells",
                expected=f"{len(titles)} cells, as in the header",
                fix=_quoting_fix(file, delimiter),
            )
            faults.append(fault)
        elif any(cell.strip() for cell in unnamed):
            fault = DataError(
                where=where,
                found="a cell in a column without a name",
                expected=NAMED,
                fix=f"name the column in line {start}, or clear the cell",
            )
            faults.append(fault)
        else:
            yield where, dict(zip(header, cells, strict=False))


def _records(file: File, delimiter: str, *, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and the rows, each with the number of its first line."""
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = _without_spaced_quotes(file, delimiter) if quoted else _texts(file)
    records = csv.reader(texts, delimiter=delimiter, quotechar='"' if quoted else None, strict=True)
    start, above_header, may_be_unclosed = 1, True, True
    try:
        for cells in records:
            line_ends = records.line_num - start  # line ends inside the row's cells
            if above_header:
                is_blank = not cells or (len(cells) == 1 and cells[0].isspace())
                above_header = is_blank or EXCEL_SEP.match(delimiter.join(cells)) is not None
            if line_ends and may_be_unclosed and _may_be_several(cells, delimiter, line_ends):
                if delimiter == "\t" or _is_even(file, delimiter):
                    raise csv.Error("a line has all cells of a row, but a quote that is not closed")
                may_be_unclosed = False
            if cells and not above_header:
                yield start, cells
            start = records.line_num + 1
    except csv.Error as error:
        raise DataError(
            where=f"{file.label}:{start}",
            found=f"broken csv: {error}",
            expected="cells that are not quoted, or that are quoted as a whole",
            fix=_quoting_fix(file, delimiter),
        ) from None


def _texts(file: File) -> Iterator[str]:
    """Yield the lines as texts.

    Raises DataError for a line that is too long, because it may contain parts of other rows.
    """
    faults: list[DataError] = []
    for number, line in lines(file, faults):
        raise_all(faults)
        yield decode(line, file, f"{file.label}:{number}")
    raise_all(faults)


def _without_spaced_quotes(file: File, delimiter: str) -> Iterator[str]:
    """Yield the lines. Raises DataError for a cell that begins with a space and a quote.

    The csv module would read that quote as text. Inside a quoted cell, quotes are doubled, so the
    search does not match there.
    """
    mark = re.escape(delimiter)
    spaced = re.compile(rf'(^|{mark}) +"(?=[^"\r\n{mark}])')
    for text in _texts(file):
        if '"' in text and spaced.search(text):
            program = f"perl -pe 's/{spaced.pattern}/$1\"/g'"
            raise DataError(
                where=file.label,
                found="spaces before the quotes of a cell",
                expected="quotes right after the delimiter",
                fix=conversion_command(file, program, f".quoted{file.suffix}"),
            )
        yield text


def _find_delimiter(file: File) -> str:
    """Return the delimiter of a table.

    Excel may write the delimiter above the header. Otherwise, the delimiter is the character that
    splits the header and the first row into the same number of cells. If several characters do so,
    the comma is preferred. Spreadsheets in much of Europe write semicolons.
    """
    top = next(filter(str.strip, _texts(file)), "")
    if match := EXCEL_SEP.match(top):
        return match[1]
    marks = [mark for mark in DELIMITERS if mark in top] or [","]
    if file.suffix == ".tsv":
        marks = ["\t"]
    fitting = [mark for mark in marks if _splits_evenly(file, mark)] or marks
    return "," if "," in fitting else max(fitting, key=top.count)


def _splits_evenly(file: File, delimiter: str) -> bool:
    """Return whether the header and the first row have the same number of cells, at least two."""
    try:
        records = [cells for _, cells in islice(_records(file, delimiter), 2)]
    except DataError:
        return False
    return len(records) == 2 and len(records[0]) == len(records[1]) > 1


def _has_plain_quotes(file: File) -> bool:
    """Return whether quotes in a table with tabs are plain characters, as the .tsv standard says.

    This is assumed if all lines have the same number of tabs, but the csv rules for quotes would
    split at least one line into a different number of cells.
    """
    is_blank = is_uneven = False
    for text in _texts(file):
        if text.strip() and (is_blank or "\t" not in text):
            return False  # a blank line between others is within a quoted cell
        is_blank = not text.strip()
        is_uneven = is_uneven or ('"' in text and not _is_row(text))
    return is_uneven and _is_even(file, "\t")


def _is_row(text: str) -> bool:
    """Return whether the csv rules for quotes split a line at each of its tabs."""
    try:
        records = [*csv.reader([text], delimiter="\t", strict=True)]
    except csv.Error:
        return False
    return len(records) == 1 and len(records[0]) == text.count("\t") + 1


def _may_be_several(cells: Sequence[str], delimiter: str, line_ends: int) -> bool:
    """Return whether a row that spans several lines may be several rows.

    For example, a row of three lines is suspect if it contains the delimiters of three whole rows.
    """
    delimiters = sum(cell.count(delimiter) for cell in cells)
    return len(cells) > 1 and delimiters == line_ends * (len(cells) - 1)


def _is_even(file: File, delimiter: str) -> bool:
    """Return whether all lines have the same number of delimiters as the header."""
    counts = (
        text.count(delimiter) for text in _texts(file) if text.strip() and not EXCEL_SEP.match(text)
    )
    width = next(counts, 0)
    return all(count == width for count in counts)


def _quoting_fix(file: File, delimiter: str) -> str:
    """Return the fix for a line with a wrong number of cells: how to quote a cell.

    For a table with tabs, the fix includes a command that quotes all cells.
    """
    fix = (
        f'put "..." around a cell with {DELIMITERS[delimiter]}, quotes or line ends, '
        "and double the quotes inside"
    )
    if delimiter != "\t":
        return fix
    program = """perl -pe 's/"/""/g; s/[^\\t\\r\\n]+/"$&"/g'"""
    command = conversion_command(file, program, f".quoted{file.suffix}")
    return reworded(command, f"{fix}; or, if the quotes are part of the text: {command}")


def _header(cells: Sequence[str], where: str) -> list[str]:
    """Return the column names; [] for an empty file.

    Empty cells at the end of the header are ignored, because each line may end with a delimiter.
    """
    names = [CONTROL.sub(" ", cell).strip() for cell in cells]
    while len(names) > 1 and not names[-1]:
        del names[-1]
    if len(names) > 1 and not names[0]:  # the index that pandas writes as the first column
        names[0] = PANDAS_INDEX
    if any(not name or len(name) > MAX_COLUMN_NAME for name in names):
        raise DataError(
            where=where,
            found="the first line is no header: it has an empty cell or a long text",
            expected=NAMED,
            fix="add a first line with the names of the columns",
        )
    refuse_same_names(names, where)
    return names


def refuse_same_names(names: Sequence[str], where: str) -> None:
    """Raise DataError for a column name that appears twice."""
    if len(set(names)) < len(names):
        raise DataError(
            where=where,
            found="two columns have the same name",
            expected="a different name for each column",
            fix="rename one of the columns",
        )
