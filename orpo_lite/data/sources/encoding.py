"""Decode UTF-8 text. Report zip files, git-lfs pointers, and text in another encoding."""

from __future__ import annotations

import codecs
import re

from orpo_lite.data.sources.lines import BLOCK, File, conversion_command
from orpo_lite.errors import Command, DataError, reworded

# iconv knows these names too, with "-" instead of "_". If two encodings give the same text, the
# first one is used.
ENCODINGS = (
    "cp1252", "gb18030", "shift_jis", "euc_jp", "euc_kr", "big5", "cp1251", "koi8_r", "cp1250",
    "cp1253", "cp1254", "cp1255", "cp1256", "cp874",
)  # fmt: skip
# Characters of cp1252. In most other one-byte encodings, their bytes are other characters.
WESTERN = {*map(chr, range(0xC0, 0x100)), *"œŒ€«»’‘“”–—…"}
SHOWN = 30  # characters of a line that a message shows
SAMPLE = 100  # lines from which the encoding is guessed
MAX_ENCODINGS = 3  # in one message

NOT_TEXT = (
    (b"PK\x03\x04", "a zip file or a spreadsheet", "unpack it, or save it as csv"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", Command("git lfs pull")),
)


def refuse_lookalikes(file: File) -> None:
    """Raise DataError for a file that is UTF-16, a zip file or a git-lfs pointer."""
    with file.open() as stream:
        start = stream.read(32)
    where, expected = f"{file.label}:1", f"{file.suffix[1:]} in UTF-8"
    for mark, found, fix in NOT_TEXT:
        if start.startswith(mark):
            raise DataError(where=where, found=found, expected=expected, fix=fix)
    encoding = ""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "UTF-16"
    elif b"\0" in start[:4]:  # no text in UTF-8 has a zero byte here
        encoding = "UTF-16BE" if start.startswith(b"\0") else "UTF-16LE"
    if encoding:
        fix = _iconv_command(file, encoding)
        raise DataError(where=where, found=f"{encoding} text", expected=expected, fix=fix)


def decode(line: bytes, file: File, where: str) -> str:
    """Return the text of a line of bytes. The line must be in UTF-8.

    Raises DataError if the line is not in UTF-8. If the whole file seems to have another encoding,
    the error names up to three likely encodings. Next to each encoding, the error shows a word of
    the line as this encoding reads it.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        before = line[: error.start].decode()
        _, _, last_line = before.rpartition("\n")
        place = position(before.count("\n") + 1, len(last_line) + 1)
        found = f"byte 0x{line[error.start]:02x} at {place} is not UTF-8"
    fix: str = "correct this line: other lines are in UTF-8"
    if likely := _likely_encodings(line, file):
        found += "; it may be " + ", or ".join(f"{name}: {words}" for words, name in likely.items())
        commands = [_iconv_command(file, name) for name in likely.values()]
        fix = reworded(commands[0], "; or ".join(commands))
    raise DataError(where=where, found=found, expected="UTF-8 text", fix=fix)


def _iconv_command(file: File, encoding: str) -> Command:
    return conversion_command(file, f"iconv -f {encoding} -t UTF-8", f".utf8{file.suffix}")


def _likely_encodings(line: bytes, file: File) -> dict[str, str]:
    """Return up to three likely encodings: the first non-ASCII word, decoded -> its encoding.

    Returns {} if other lines are in UTF-8, because converting the whole file would corrupt them.
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
        text = line.decode(encoding, errors="replace")
        word = re.findall(r"\w{0,8}[^\x00-\x7f][^\s\"]*", text)[0][:SHOWN]
        shown = "".join(filter(str.isprintable, word))
        found.setdefault(shown, encoding.upper().replace("_", "-"))
    return dict(list(found.items())[:MAX_ENCODINGS])


def _is_western(text: str) -> bool:
    """Return whether a text consists of plain letters with some accents."""
    accents = [character for character in text if not character.isascii()]
    return WESTERN.issuperset(accents) and len(accents) < sum(map(str.isalpha, text)) / 3


def position(line: int, column: int) -> str:
    return f"column {column}" if line == 1 else f"line {line}, column {column}"
