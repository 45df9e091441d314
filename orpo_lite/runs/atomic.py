"""Files and folders that are written whole or not at all."""

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
    """Of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Mapping[str, Any]) -> str:
    """JSON for people and programs: indented, in the given order."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all. Raises CheckpointError, FitError."""
    temporary = file.with_name(f".{file.name}.tmp")
    with explained(file, temporary):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on success it is flushed and takes the place of ``final``, else removed."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        found = (
            "is a link: what it points to would stay, and the link go"
            if final.is_symlink()
            else "is a file"
        )
        fix = "move it away; a run whose whole folder is a link may lie on any disk"
        raise CheckpointError(
            where=str(final), found=found, expected="a folder, or nothing", fix=fix
        )
    temporary, old = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "old"))
    try:
        with explained(final, temporary):
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
    """A temporary folder to write into; on success its files are flushed and put into ``folder``, each of them whole.

    Other files of ``folder`` stay as they are.
    """
    temporary = folder / ".new.tmp"
    try:
        with explained(folder, temporary):
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
    """Flush all files of a folder; returns them."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        sync(file)
    sync(folder)
    return files


@contextmanager
def explained(final: Path, temporary: Path) -> Iterator[None]:
    """Errors of writing ``temporary``, which is to become ``final``, as errors that say what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) == errno.EFBIG or "File too large" in str(error):
            fix = "`ulimit -f unlimited`, another disk, or a smaller --max-shard-size"
            raise FitError(
                where=str(final), found="a file may not grow so large here", fix=fix
            ) from error
        if getattr(error, "errno", 0) in FULL or "No space left" in str(error):
            free = f"{shutil.disk_usage(final.parent).free / 2**20:,.0f} MiB free"
            raise FitError(
                where=str(final),
                found=f"the disk is full ({free})",
                fix="free some space; nothing older is lost",
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
            expected="a folder that can be written to",
        ) from error


def sync(path: Path) -> bool:
    """Make a file's contents, or a folder's names, durable; False where the file system cannot (FUSE, SMB)."""
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
