"""Write files and folders completely or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from orpo_lite.errors import FULL, NO_SYNC, CheckpointError, FitError


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Mapping[str, Any]) -> str:
    """Return indented JSON with its keys in the given order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a file completely or not at all. Raise CheckpointError or FitError on failure."""
    temporary = file.with_name(f".{file.name}.tmp")
    with explain_write_errors(file, temporary):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to write into.

    On success it is flushed to the disk and replaces ``final``. On failure it is removed.
    """
    # Replacing a link would remove the link and keep what it points to.
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        found = "is a symbolic link" if final.is_symlink() else "is a file"
        fix = "move it away; only the run folder itself may be a link to another disk"
        raise CheckpointError(
            where=str(final), found=found, expected="a folder, or nothing", fix=fix
        )
    temporary, old = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "old"))
    try:
        with explain_write_errors(final, temporary):
            final.parent.mkdir(parents=True, exist_ok=True)
            if old.exists() and not final.exists():  # killed between the two renames below
                old.rename(final)
            _make_empty(temporary)
            yield temporary
            _sync_all(temporary)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            sync(final.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into.

    On success its files are flushed to the disk and each is moved into ``folder`` atomically. Other
    files of ``folder`` are not changed.
    """
    temporary = folder / ".new.tmp"
    try:
        with explain_write_errors(folder, temporary):
            folder.mkdir(parents=True, exist_ok=True)
            _make_empty(temporary)
            yield temporary
            for file in _sync_all(temporary):
                place = folder / file.relative_to(temporary)
                place.parent.mkdir(exist_ok=True)
                file.replace(place)
            sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _sync_all(folder: Path) -> list[Path]:
    """Flush all files of a folder to the disk and return their paths."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        sync(file)
    sync(folder)
    return files


@contextmanager
def explain_write_errors(final: Path, temporary: Path) -> Iterator[None]:
    """Convert errors while a file or folder is written into errors with a fix.

    ``final`` is its path, which messages show. ``temporary`` is the path that is written to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) == errno.EFBIG or "File too large" in str(error):
            fix = "`ulimit -f unlimited`, another disk, or a smaller --max-shard-size"
            raise FitError(
                where=str(final), found="the file is larger than the size limit here", fix=fix
            ) from error
        if getattr(error, "errno", 0) in FULL or "No space left" in str(error):
            free = f"{shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB free"
            raise FitError(
                where=str(final),
                found=f"the disk is full ({free})",
                fix="free some space; earlier files are unchanged",
            ) from error
        places = (str(temporary), str(final))
        if (
            isinstance(error, OSError)
            and error.filename
            and not str(error.filename).startswith(places)
        ):
            found = f"cannot be read ({error.strerror})"
            raise CheckpointError(
                where=str(error.filename), found=found, expected="a file of the run"
            ) from error
        raise CheckpointError(
            where=str(final),
            found=f"cannot be written ({error})",
            expected="a writable folder",
        ) from error


def sync(path: Path) -> bool:
    """Flush a file's contents, or a folder's entries, to the disk.

    Return False if the file system does not support it (FUSE, SMB).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        return False
    finally:
        os.close(descriptor)
    return True
