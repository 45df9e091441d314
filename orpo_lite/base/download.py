"""Find the commit of a hub repository, download its files, and explain the hub's errors."""

import logging
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from orpo_lite.errors import FULL, Command, FitError, HubError, ModelError
from orpo_lite.recipe.text import gib

logger = logging.getLogger(__name__)

HUB_TIMEOUT = 30.0  # seconds; the hub's client has no limit
# Patterns of the files to download for a base or an adapter. Pickles are never downloaded.
TEXT = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = ["adapter_config.json", ADAPTER_WEIGHTS]
# Files that are not downloaded: other formats (original/, onnx/, Mistral's consolidated weights).
# The only folder that is downloaded holds named chat templates.
NAMED = "additional_chat_templates/"
NOT_FETCHED = [*(f"{NAMED[:i]}[!{letter}]*/*" for i, letter in enumerate(NAMED)), "consolidated*"]
POINTER = b"version https://git-lfs"
# All errors of the hub's client are of these types. A ValueError means that the answer is not from
# the hub, or that the repository's name is invalid.
UNREACHABLE = (HTTPError, OSError, ValueError)


def resolve(name: str, revision: str, patterns: list[str]) -> str:
    """Return the hash of the commit that ``revision`` names in a hub repository.

    Check that the repository can be read, and that the disk has space for the missing files. If the
    hub cannot be reached, return the commit hash of the copy in the cache.

    Args:
        name: owner/name of the repository.
        revision: a branch, tag or commit.
        patterns: patterns of the files to download.

    Raises:
        ModelError: the repository has no weights in safetensors format.
        FitError: there is not enough disk space.
        HubError: the repository or revision is unknown, the repository is gated, or the hub cannot
            be reached and the cache has no copy.
    """
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except UNREACHABLE as error:
        cached = None
        refusals = GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError
        if not isinstance(error, refusals):
            cached = find_cached(name, revision, [p for p in patterns if "safetensors" not in p])
        if cached is None:
            raise hub_error(name, revision, error) from error
        logger.warning(
            "the hub cannot be reached (%s); using the cached copy of %s",
            type(error).__name__,
            name,
        )
        return cached.name
    commit, files = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = list(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=NOT_FETCHED))
    if WEIGHTS[0] in patterns and not any(file.endswith(".safetensors") for file in wanted):
        raise ModelError(
            where=f"model {name}",
            found="has no weights in safetensors",
            expected="safetensors files, because pickle files are never loaded",
        )
    missing = [
        f for f in wanted if not isinstance(try_to_load_from_cache(name, f, revision=commit), str)
    ]
    check_disk(Path(constants.HF_HUB_CACHE), sum(files[f] for f in missing), f"downloading {name}")
    if revision != commit:
        _remember(name, revision, commit)
    return commit


def hub_host() -> str:
    """Return the host name of the hub, or "" in offline mode (HF_HUB_OFFLINE)."""
    return "" if constants.HF_HUB_OFFLINE else urlsplit(constants.ENDPOINT).netloc


def _remember(name: str, revision: str, commit: str) -> None:
    """Record a branch's commit in the hub's cache, so that the branch can be used offline later.

    The hub's client does not record the commit of a branch if files are downloaded by commit.
    """
    ref = (
        Path(constants.HF_HUB_CACHE)
        / repo_folder_name(repo_id=name, repo_type="model")
        / "refs"
        / revision
    )
    with suppress(OSError):  # the cache may be read-only
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")


def download(name: str, commit: str, patterns: list[str]) -> Path:
    """Download the files that the cache lacks, and return the repository's folder in the cache.

    ``patterns`` selects the files of the repository ``name`` at ``commit``.

    Raises:
        FitError: the disk is full.
        HubError: the repository is gated, or the hub cannot be reached.
    """
    try:
        return Path(
            snapshot_download(
                name, revision=commit, allow_patterns=patterns, ignore_patterns=NOT_FETCHED
            )
        )
    except UNREACHABLE as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise FitError(
                where=f"downloading {name}, to {constants.HF_HUB_CACHE}",
                found="the disk is full",
                fix="free some space, or set HF_HOME to another disk",
            ) from error
        raise hub_error(name, commit, error) from error


def find_cached(name: str, revision: str, patterns: list[str]) -> Path | None:
    """Return the folder of a hub repository in the cache, or None if the cache has no copy.

    No request is sent to the hub. The folder may be incomplete.
    """
    try:
        options: dict[str, Any] = {
            "allow_patterns": patterns,
            "ignore_patterns": NOT_FETCHED,
            "local_files_only": True,
        }
        return Path(snapshot_download(name, revision=revision, **options))
    except UNREACHABLE:
        return None


def hub_error(name: str, revision: str, error: Exception) -> HubError:
    """Convert an exception of the hub's client into a :class:`HubError` with a fix."""
    where = f"hub, {name} at {revision}"
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, UNREACHABLE):
        error = error.__cause__  # the reason why the hub was not reached
    if isinstance(error, GatedRepoError):
        fix = f"ask for access at {page}, then run `hf auth login`"
        return HubError(
            where=where, found="is gated", expected="access granted to your account", fix=fix
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            where=where,
            found="has no such revision",
            expected="a branch, tag or commit",
            fix=f"choose one at {page}/commits/main",
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        fix = (
            "check the spelling; if the repository is private, run `hf auth login`; "
            "if it is a local folder, check that it exists"
        )
        return HubError(
            where=where,
            found="does not exist, or you have no access",
            expected="the owner/name of a repository, or a local folder",
            fix=fix,
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        fix = f"run `hf auth login` with a token that may read {page}"
        return HubError(
            where=where,
            found=f"denies access ({status})",
            expected="access granted to your account",
            fix=fix,
        )
    what = (
        f"is not available ({status})" if status else f"cannot be reached ({type(error).__name__})"
    )
    fix = f"try again later; or {manual_download(name, revision)}"
    return HubError(
        where=where,
        found=f"{what} and is not in the cache",
        expected="a connection to the hub, or a copy in the cache",
        fix=fix,
    )


def refuse_pointers(folder: Path, patterns: list[str]) -> None:
    """Raise :class:`ModelError` if a file holds a Git LFS pointer instead of its content.

    Only the files in ``folder`` that match ``patterns`` are checked.
    """
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(found):
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) != POINTER:
                continue
        is_clone = any((parent / ".git").exists() for parent in (folder, *folder.parents))
        again = f"download {file.name} again, for instance with `hf download`"
        pull = Command(f"git -C {shlex.quote(str(folder))} lfs pull", f"; or {again}")
        raise ModelError(
            where=str(file),
            found="is a git-lfs pointer, not the file itself",
            expected="the content of the file",
            fix=pull if is_clone else again,
        )


def manual_download(name: str, revision: str) -> str:
    """Return the advice to run ``hf download`` for a repository on a machine with a network."""
    return f"on a machine with a network, run: hf download {name} --revision {revision}"


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise :class:`FitError` if the disk of a folder has fewer than ``needed`` free bytes.

    The folder may not exist yet. The error shows ``purpose``, the task that needs the space:
    "downloading org/model".
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        found, fix = f"{gib(needed)} needed, {gib(free)} free", "free some space"
        if purpose.startswith("downloading"):
            fix += ", or set HF_HOME to another disk"
        raise FitError(where=f"{purpose}, to {folder}", found=found, fix=fix)
