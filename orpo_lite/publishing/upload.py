"""Check a model card with the hub, and commit files to a repository on the hub."""

import errno
import fnmatch
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import BadRequestError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from orpo_lite.errors import HubError
from orpo_lite.publishing.account import Target, find_target
from orpo_lite.publishing.retry import (
    TEMPORARY,
    Attempt,
    ConflictError,
    retry,
    server_message,
    unreadable,
    with_timeouts,
)
from orpo_lite.updates import Update


def check_card(target: Target, card: str, where: str) -> Attempt[None]:
    """Ask the hub whether the metadata of a card are valid. Change nothing on the hub.

    Args:
        target: the repository, for messages.
        card: the text of the card.
        where: the path of the card, for messages.

    Raises:
        HubError: the metadata are not valid.
    """

    def check() -> None:
        body = {"content": card, "repoType": "model"}
        url, headers = f"{constants.ENDPOINT}/api/validate-yaml", build_hf_headers()
        response = get_session().post(url, json=body, headers=headers)
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            raise HubError(
                where=where,
                found=f"the hub refuses the metadata of the card{server_message(error)}",
                expected="metadata that the hub accepts",
                fix="correct the metadata, or remove the file, so that a new card is written",
            ) from error
        if not isinstance(response.json(), dict):
            raise ValueError("the answer is not an object")

    with with_timeouts():
        yield from retry(f"hub, {target.repository}", "checking the card", check)


def commit_files(
    target: Target, files: Mapping[str, Path | bytes], message: str, *, ours: Sequence[str] = ()
) -> Attempt[str]:
    """Commit files to a repository, and return the URL of the commit.

    Either all files are committed or none. Files that the hub already has are not sent again, so a
    new attempt continues the upload. If the repository does not exist, it is created.

    Args:
        target: the repository.
        files: name in the repository -> path or content.
        message: the commit message.
        ours: patterns for the names of files that orpo-lite pushes. The commit removes old files
            of an earlier push: files of the repository that match a pattern and are not in
            ``files``.

    Raises:
        HubError: the hub refused the commit, or the last attempt failed.
        UnreadableError: a file to commit does not exist any more.
    """
    where, repository = f"hub, {target.repository}", target.repository
    stopped = threading.Event()
    removed: set[str] = set()
    with with_timeouts():
        if not target.exists:
            target = yield from _create(target)
        additions: list[CommitOperationAdd] = []

        def commit() -> str:
            stale = _stale(repository, files, ours) if target.exists else []
            removed.update(stale)
            # Each attempt makes new objects, which ask the hub again which files it has. This is
            # needed because the answer to a successful commit may have been lost. Hashes are kept.
            hashed = {addition.path_in_repo: addition.upload_info for addition in additions}
            additions[:] = [
                CommitOperationAdd(name, _check_exists(content)) for name, content in files.items()
            ]
            for addition in additions:
                addition.upload_info = hashed.get(addition.path_in_repo, addition.upload_info)
            try:
                HfApi().preupload_lfs_files(repository, additions, free_memory=False)
            except ValueError as error:
                _refuse_objects(where, error, additions)
                raise
            if stopped.is_set():
                raise RuntimeError("stopped before the commit")
            deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
            made = HfApi().create_commit(
                repository, [*additions, *deletions], commit_message=message
            )
            return str(made.commit_url)

        size = sum(map(_size, files.values()))
        yield Update(
            "stage", f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {target.page}"
        )
        try:
            page = yield from retry(where, "uploading", commit, temporary=(*TEMPORARY, 409, 412))
        finally:
            stopped.set()  # after Ctrl-C, the client's threads continue, but they must not commit
    if removed:
        yield Update(
            "note",
            "removed files of an earlier push, which remain in the repository's history: "
            + ", ".join(sorted(removed)),
        )
    return page


def _stale(repository: str, files: Collection[str], ours: Sequence[str]) -> list[str]:
    """Return the names of files in a repository that match a pattern and are not in ``files``."""
    siblings = HfApi().model_info(repository).siblings or ()
    old = {str(sibling.rfilename) for sibling in siblings}.difference(files)
    return [name for name in sorted(old) if any(fnmatch.fnmatchcase(name, p) for p in ours)]


def _check_exists(content: Path | bytes) -> Path | bytes:
    """Return the content. Raise FileNotFoundError if it is the path of a missing file.

    The client would raise a ValueError, which does not tell the reason.
    """
    if isinstance(content, Path) and not content.is_file():
        raise FileNotFoundError(errno.ENOENT, "does not exist any more", str(content))
    return content


def _size(content: Path | bytes) -> int:
    """Return the size of a file in bytes. ``content`` is the path or the content of the file."""
    if isinstance(content, bytes):
        return len(content)
    try:
        return content.stat().st_size
    except OSError as error:
        raise unreadable(error) from error


def _refuse_objects(where: str, error: ValueError, additions: Sequence[CommitOperationAdd]) -> None:
    """Raise :class:`HubError` if the hub refused single files. The message names the files.

    The client's error names only their hashes. For other errors, do nothing.
    """
    if str(error).startswith("LFS batch API returned errors"):
        names = {
            a.upload_info.sha256.hex(): a.path_in_repo for a in additions if a.upload_info.is_hashed
        }
        errors = re.findall("OID ([^:]*): `?(.*)", str(error))
        text = "; ".join(f"{names.get(oid, oid)}: {message}" for oid, message in errors)
        raise HubError(
            where=where,
            found=f"the hub refuses a file (uploading){server_message(ValueError(text))}",
            fix="follow the hub's message",
        ) from error


def _create(target: Target) -> Attempt[Target]:
    """Create the repository, and return it as a target.

    A :class:`ConflictError` means that another process created it, or that the answer to an
    earlier attempt was lost.
    """
    where = f"hub, {target.repository}"
    visibility = "private" if target.is_private else "public"
    yield Update("stage", f"creating {target.page} ({visibility})")

    def create() -> None:
        HfApi().create_repo(target.repository, private=target.is_private, exist_ok=False)

    try:
        yield from retry(where, "creating the repository", create)
    except ConflictError:
        made = yield from find_target(target.repository, target.is_private)
        if not made.exists:
            raise HubError(
                where=where,
                found="cannot be created (409), although you can see no repository of this name",
                expected="a name that no repository has",
                fix="use another name",
            ) from None
        return made
    return target
