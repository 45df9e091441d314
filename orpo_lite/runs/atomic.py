"""Write files and folders completely or not at all, even if the process is killed."""

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
    """Return the SHA-256 hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Mapping[str, Any]) -> str:
    """Return a mapping as indented JSON. The order of the keys is kept."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        FitError: the disk is full, or the file is larger than the system's size limit.
        CheckpointError: the file cannot be written for another reason.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    with explain_write_errors(file, temporary):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into. At the end, the temporary folder replaces ``final``.

    The temporary folder is flushed to the disk first. After an error, the temporary folder is
    removed, and ``final`` is unchanged. Raises the same errors as :func:`write_text`.
    """
    # If final were a link, the link would be replaced and its target would remain.
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        found = "is a symbolic link" if final.is_symlink() else "is a file"
        fix = "move it to another place; only the run folder itself may be a link to another disk"
        raise CheckpointError(
            where=str(final), found=found, expected="a folder, or nothing at this path", fix=fix
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
    """Yield a temporary folder to write files into. At the end, move the files into ``folder``.

    The files are flushed to the disk first. Each file is moved atomically. If the caller raises an
    error, no file is moved. Other files in ``folder`` are not changed. Raises the same errors as
    :func:`write_text`.
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
    """If the code in the ``with`` block fails to write, raise an error that has a fix.

    Args:
        final: the path of the file or folder, for messages.
        temporary: the path that is written first, before it is renamed to ``final``.

    Raises:
        FitError: the disk is full, or the file is larger than the system's size limit.
        CheckpointError: another OSError or SafetensorError occurred.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) == errno.EFBIG or "File too large" in str(error):
            fix = "run `ulimit -f unlimited`, use another disk, or set a smaller --max-shard-size"
            raise FitError(
                where=str(final), found="the file is larger than the system's size limit", fix=fix
            ) from error
        if getattr(error, "errno", 0) in FULL or "No space left" in str(error):
            free = f"{shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB free"
            raise FitError(
                where=str(final),
                found=f"the disk is full ({free})",
                fix="free some space; existing files were not changed",
            ) from error
        places = (str(temporary), str(final))
        if (
            isinstance(error, OSError)
            and error.filename
            and not str(error.filename).startswith(places)
        ):
            found = f"cannot be read ({error.strerror})"
            raise CheckpointError(
                where=str(error.filename), found=found, expected="a readable file of the run"
            ) from error
        raise CheckpointError(
            where=str(final),
            found=f"cannot be written ({error})",
            expected="a writable folder",
        ) from error


def sync(path: Path) -> bool:
    """Flush a file's content, or a folder's list of files, to the disk.

    Return False if the file system does not support this (FUSE, SMB), else True.
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
