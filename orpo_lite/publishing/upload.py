"""A card shown to the hub, and files put into a repository in one commit."""

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
    PASSING,
    Attempt,
    ConflictError,
    retry,
    server_message,
    unreadable,
    with_timeouts,
)
from orpo_lite.updates import Update


def check_card(target: Target, card: str, where: str) -> Attempt[None]:
    """Ask the hub whether it takes a card's metadata, before anything is made there.

    Raises:
        HubError: it does not.
    """

    def check() -> None:
        asked = {"content": card, "repoType": "model"}
        url, headers = f"{constants.ENDPOINT}/api/validate-yaml", build_hf_headers()
        response = get_session().post(url, json=asked, headers=headers)
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            raise HubError(
                where=where,
                found=f"its metadata are refused by the hub{server_message(error)}",
                expected="metadata that the hub takes",
                fix="mend it, or remove the file",
            ) from error
        if not isinstance(response.json(), dict):
            raise ValueError("no object")

    with with_timeouts():
        yield from retry(f"hub, {target.repository}", "showing the card", check)


def commit_files(
    target: Target, files: Mapping[str, Path | bytes], message: str, *, ours: Sequence[str] = ()
) -> Attempt[str]:
    """Put files into the repository in one commit, all of them or none; returns the commit's page.

    What is there already and equal is not sent again, so a second attempt goes on where the first was cut off.

    Args:
        target: where to.
        files: by their names there.
        message: of the commit.
        ours: patterns of names. Such files that are there, and not among these, are of an earlier push: they go.

    Raises:
        HubError: refused, or failed after the attempts.
        UnreadableError: a file is not there any more.
    """
    where, repository = f"hub, {target.repository}", target.repository
    left = threading.Event()
    removed: set[str] = set()
    with with_timeouts():
        if not target.exists:
            target = yield from _create(target)
        additions: list[CommitOperationAdd] = []

        def commit() -> str:
            stale = _stale(repository, files, ours) if target.exists else []
            removed.update(stale)
            # New ones at each attempt: they ask the hub again what is there, which may be the commit whose answer was
            # lost. What was hashed stays hashed.
            hashed = {addition.path_in_repo: addition.upload_info for addition in additions}
            additions[:] = [
                CommitOperationAdd(name, _there(content)) for name, content in files.items()
            ]
            for addition in additions:
                addition.upload_info = hashed.get(addition.path_in_repo, addition.upload_info)
            try:
                HfApi().preupload_lfs_files(repository, additions, free_memory=False)
            except ValueError as error:
                _refuse_objects(where, error, additions)
                raise
            if left.is_set():
                raise RuntimeError("stopped before the commit")
            deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
            made = HfApi().create_commit(
                repository, [*additions, *deletions], commit_message=message
            )
            return str(made.commit_url)

        size = sum(
            len(content) if isinstance(content, bytes) else _size(content)
            for content in files.values()
        )
        yield Update(
            "stage", f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {target.page}"
        )
        try:
            page = yield from retry(where, "uploading", commit, passing=(*PASSING, 409, 412))
        finally:
            left.set()  # after Ctrl-C the client's threads go on, and must not make the commit all the same
    if removed:
        yield Update(
            "note",
            f"removed, of an earlier push (the history keeps them): {', '.join(sorted(removed))}",
        )
    return page


def _stale(repository: str, files: Collection[str], ours: Sequence[str]) -> list[str]:
    there = [str(sibling.rfilename) for sibling in HfApi().model_info(repository).siblings or ()]
    return [
        name
        for name in there
        if name not in files and any(fnmatch.fnmatchcase(name, p) for p in ours)
    ]


def _there(content: Path | bytes) -> Path | bytes:
    """The client says of a file that has gone that the value is wrong."""
    if isinstance(content, Path) and not content.is_file():
        raise FileNotFoundError(errno.ENOENT, "is not there any more", str(content))
    return content


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise unreadable(error) from error


def _refuse_objects(where: str, error: ValueError, additions: Sequence[CommitOperationAdd]) -> None:
    """Raise what the hub says of single files; it names them by their hashes, where people know names."""
    if str(error).startswith("LFS batch API returned errors"):
        names = {
            a.upload_info.sha256.hex(): a.path_in_repo for a in additions if a.upload_info.is_hashed
        }
        said = [
            f"{names.get(oid, oid)}: {text}"
            for oid, text in re.findall("OID ([^:]*): `?(.*)", str(error))
        ]
        raise HubError(
            where=where,
            found=f"the hub refuses a file (uploading){server_message(ValueError('; '.join(said)))}",
            fix="see what it says",
        ) from error


def _create(target: Target) -> Attempt[Target]:
    where = f"hub, {target.repository}"
    yield Update("stage", f"making {target.page} ({'private' if target.is_private else 'public'})")

    def create() -> None:
        HfApi().create_repo(target.repository, private=target.is_private, exist_ok=False)

    try:
        yield from retry(where, "making the repository", create)
    except (
        ConflictError
    ):  # made by somebody else, or by the attempt before this one, whose answer was lost
        made = yield from find_target(target.repository, target.is_private)
        if not made.exists:
            raise HubError(
                where=where,
                found="cannot be made (409), and is not there",
                expected="a free name",
                fix="another name",
            ) from None
        return made
    return target
