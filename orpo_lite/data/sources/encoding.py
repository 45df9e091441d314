"""Text that is not UTF-8, and files that are not what their names say."""

from __future__ import annotations

import codecs
import re
from itertools import islice

from orpo_lite.data.sources.lines import BLOCK, File, converted
from orpo_lite.errors import Command, DataError, reworded

# Those that iconv knows too, there with "-" for "_"; of two that give the same text the first is taken.
ENCODINGS = (
    "cp1252", "gb18030", "shift_jis", "euc_jp", "euc_kr", "big5", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254",
    "cp1255", "cp1256", "cp874",
)  # fmt: skip
WESTERN = {
    *map(chr, range(0xC0, 0x100)),
    *"œŒ€«»’‘“”–—…",
}  # what most encodings of one byte would read otherwise
SHOWN = 30  # characters of a line
SAMPLE = 100  # lines

NOT_TEXT = (
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save it as csv"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", Command("git lfs pull")),
)


def refuse_lookalikes(file: File) -> None:
    """Raise DataError for a file that is text of another encoding, or no data at all, by its first bytes."""
    with file.open() as stream:
        start = stream.read(32)
    where, expected = f"{file.label}:1", f"{file.kind[1:]} in UTF-8"
    for mark, found, fix in NOT_TEXT:
        if start.startswith(mark):
            raise DataError(where=where, found=found, expected=expected, fix=fix)
    encoding = "UTF-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
    if not encoding and b"\0" in start[:4]:  # no text in UTF-8 begins so
        encoding = "UTF-16BE" if start.startswith(b"\0") else "UTF-16LE"
    if encoding:
        raise DataError(
            where=where, found=f"{encoding} text", expected=expected, fix=_recoded(file, encoding)
        )


def decode(line: bytes, file: File, where: str) -> str:
    """Return the text. Raises DataError that shows what it would be in the likely encodings."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        before, number = (
            line[: error.start].decode().rpartition("\n"),
            line[: error.start].count(b"\n") + 1,
        )
        found = f"byte 0x{line[error.start]:02x} at {position(number, len(before[-1]) + 1)} is not UTF-8"
    fix: str = "correct this line: other lines are in UTF-8"
    if likely := _likely(line, file):
        found += "; it may be " + ", or ".join(f"{name}: {words}" for words, name in likely.items())
        lines = [_recoded(file, name) for name in likely.values()]
        fix = reworded(lines[0], "; or ".join(lines))
    raise DataError(where=where, found=found, expected="UTF-8 text", fix=fix)


def _recoded(file: File, encoding: str) -> Command:
    return converted(file, f"iconv -f {encoding} -t UTF-8", f".utf8{file.kind}")


def _likely(line: bytes, file: File) -> dict[str, str]:
    """Return up to three encodings by the first words of the line that are not ASCII, as each of them gives these.

    There is none where other lines are in UTF-8: to convert the whole file would spoil them.
    """
    from charset_normalizer import from_bytes

    with file.open() as stream:
        others = [other for other in stream.read(BLOCK).splitlines() if not other.isascii()]
    if any("\ufffd" not in other.decode(errors="replace") for other in others):
        return {}
    best = from_bytes(b"\n".join([*others[:SAMPLE], line]), cp_isolation=[*ENCODINGS])
    guesses = [min(match.could_be_from_charset, key=ENCODINGS.index) for match in best]
    names = guesses or ["cp1252", "cp1250", "cp1251"]
    if _is_western(line.decode("cp1252", errors="replace")):
        names.insert(0, "cp1252")
    found: dict[str, str] = {}
    for encoding in names:
        word = re.findall(r"\w{0,8}[^\x00-\x7f][^\s\"]*", line.decode(encoding, errors="replace"))[
            0
        ]
        found.setdefault(
            "".join(filter(str.isprintable, word[:SHOWN])), encoding.upper().replace("_", "-")
        )
    return dict(islice(found.items(), 3))


def _is_western(text: str) -> bool:
    """Return whether a text is of plain letters with some accents."""
    accents = [character for character in text if not character.isascii()]
    return WESTERN.issuperset(accents) and len(accents) < sum(map(str.isalpha, text)) / 3


def position(line: int, column: int) -> str:
    return f"column {column}" if line == 1 else f"line {line}, column {column}"
