"""Keep log-probabilities under a reference model on disk, next to the tokens of their pairs.

A file holds RECORDs, one for each pair. Records are only appended, so a process that is killed
loses at most the record that it was writing.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orpo_lite.data.cache import TokenizedPairs

RECORD = np.dtype([("row", "<i8"), ("chosen", "<f8"), ("rejected", "<f8"), ("crc", "<u4")])
"""A pair's row in its cache entry, its two log-probabilities, and a checksum of these three."""
CHECKED = 24  # bytes of a record that its checksum covers


class ReferenceCache:
    """The known log-probabilities of the pairs of one cache entry under one reference model."""

    def __init__(self, pairs: TokenizedPairs, key: str) -> None:
        """Read the file for ``key``, a hash of everything that changes the log-probabilities."""
        self.file: Path = pairs.folder / f"reference-{key}.bin"
        self._known: dict[int, tuple[float, float]] = {}
        self._is_writable = True
        content = self.file.read_bytes() if self.file.is_file() else b""
        size = len(content) // RECORD.itemsize * RECORD.itemsize
        for record in np.frombuffer(content[:size], RECORD):
            if zlib.crc32(record.tobytes()[:CHECKED]) == int(record["crc"]):
                row = int(record["row"])
                self._known.setdefault(row, (float(record["chosen"]), float(record["rejected"])))
        self._is_whole = size == len(content)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Return the rows whose log-probabilities are not known, in the given order."""
        return [row for row in rows if row not in self._known]

    def add(
        self, rows: Sequence[int], logps_P2: NDArray[np.float64], *, write: bool
    ) -> OSError | None:
        """Add the log-probabilities of P rows, shape (P, 2). ``write``: append them to the file.

        If the file cannot be written, return the error. After that, nothing more is written.
        """
        self._known |= dict(zip(rows, map(tuple, logps_P2.tolist()), strict=True))
        if not write or not self._is_writable:
            return None
        records = np.zeros(len(rows), RECORD)
        records["row"] = rows
        records["chosen"], records["rejected"] = logps_P2.T
        for record in records:
            record["crc"] = zlib.crc32(record.tobytes()[:CHECKED])
        try:
            if not self._is_whole:  # drop the record that a killed process has not finished
                size = self.file.stat().st_size // RECORD.itemsize * RECORD.itemsize
                os.truncate(self.file, size)
                self._is_whole = True
            with self.file.open("ab") as stream:
                stream.write(records.tobytes())
        except OSError as error:
            self._is_writable = False
            return error
        return None

    def values(self, rows: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-probabilities of P rows, shape (P, 2). An unknown row has NaN."""
        unknown = (np.nan, np.nan)
        values = [self._known.get(row, unknown) for row in rows]
        return np.array(values, dtype=np.float64).reshape(-1, 2)
