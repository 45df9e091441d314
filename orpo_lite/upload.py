"""A repository of the hub to write to: whether it may be, made where it is not there, and one commit to it.

The token comes from the environment or the login, through the hub's own client, and is never held here.
"""

import random
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http

from orpo_lite.base import UNREACHABLE
from orpo_lite.errors import TOKEN, HubError
from orpo_lite.run import Update

ATTEMPTS = 4  # of each request; the client makes some of its own within an upload
FIRST_WAIT = 2.0  # seconds, doubled each time
LONGEST_WAIT = 300.0  # a hub that asks for more is left alone, and the command can be given again later
TIMEOUT = 120.0  # seconds without a byte; the hub's client would wait for ever
PASSING = (408, 425, 429, 500, 502, 503, 504)
# Besides the hub's own errors: what the client wraps the failure of one file in, and what its xet transfer raises; and
# an answer that lacks what every answer of the hub has.
FAILURES = (*UNREACHABLE, RuntimeError, KeyError)
LOGIN = "`hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or HF_TOKEN"

Result = TypeVar("Result")
Attempt = Generator[Update, None, Result]


@dataclass(frozen=True)
class Target:
    """A repository that may be written to."""

    repository: str
    """owner/name"""
    is_private: bool
    exists: bool

    @property
    def page(self) -> str:
        """Where people see it."""
        return f"{constants.ENDPOINT}/{self.repository}"


def check_target(repository: str, *, is_private: bool) -> Attempt[Target]:
    """Ask the hub who we are and whether the repository may be written to, or made; changes nothing.

    Args:
        repository: owner/name, or a name alone, which is then ours.
        is_private: as it is to be made, and must be if it is there.

    Raises:
        HubError: offline, no token, one that may not write, somebody else's repository, or one of the other visibility.
    """
    where = f"hub, {repository}"
    if constants.is_offline_mode():
        found, expected = "cannot be reached: HF_HUB_OFFLINE is set", "a connection"
        raise HubError(where, found, expected, "unset HF_HUB_OFFLINE (TRANSFORMERS_OFFLINE sets it too)")
    if _own_token(where) is None:
        raise HubError(where, "no access token here", "a token that may write", LOGIN)
    with _patient():
        return (yield from _check(repository, is_private))


def _check(repository: str, is_private: bool) -> Attempt[Target]:
    where = f"hub, {repository}"
    who = yield from attempts(where, "asking who we are", _whoami)
    repository = repository if "/" in repository else f"{who['name']}/{repository}"
    where = f"hub, {repository}"
    _refuse_reader(where, repository, who)
    try:
        info = yield from attempts(where, f"looking for {repository}", lambda: HfApi().model_info(repository))
    except _AbsentError:
        return Target(repository, is_private, exists=False)
    if bool(info.private) != is_private:
        there, asked = ("private", "public") if info.private else ("public", "private")
        remedy = "--public (output.hub_private_repo=false)" if asked == "private" else "leave --public out"
        remedy += f"; or change it at {constants.ENDPOINT}/{repository}/settings; or another name"
        raise HubError(where, f"is {there} already", f"a {asked} repository, as asked; it is not changed here", remedy)
    return Target(repository, is_private, exists=True)


def _whoami() -> dict[str, Any]:
    who: dict[str, Any] = HfApi().whoami()
    return {"name": str(who["name"])} | who


def _own_token(where: str) -> str | None:
    try:
        return get_token()
    except Exception as error:  # of a login that had to be renewed, in ways of its own
        raise HubError(where, f"the login cannot be renewed ({type(error).__name__})", "a login", LOGIN) from None


def _refuse_reader(where: str, repository: str, who: Mapping[str, Any]) -> None:
    """Refuse a token, or an account, that may not write to this owner's repositories."""
    owner = repository.partition("/")[0]
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner.lower() not in {str(name).lower() for name in (who["name"], *roles)}:
        theirs = ", ".join([who["name"], *(str(name) for name in roles)])
        found = f"{owner} is neither you ({who['name']}) nor an organisation of yours"
        raise HubError(where, found, f"an owner among {theirs}", f"{who['name']}/{repository.partition('/')[2]}")
    if roles.get(owner) == "read":
        raise HubError(where, f"you may only read at {owner}", "the role of a contributor or more", "ask an admin")
    token = (who.get("auth") or {}).get("accessToken") or {}
    role, scopes = token.get("role"), token.get("fineGrained") or {}
    may_write = role != "read"
    if role == "fineGrained":
        granted = list(scopes.get("global") or [])
        for scope in scopes.get("scoped") or []:
            if str((scope.get("entity") or {}).get("name", "")).lower() in (owner.lower(), repository.lower()):
                granted += scope.get("permissions") or []
        may_write = "repo.write" in granted
    if not may_write:
        kind = (
            "a fine-grained token without the right to write there" if role == "fineGrained" else "a token that reads"
        )
        raise HubError(where, f"the access token is {kind}", f"one that may write to {owner}'s repositories", LOGIN)


def commit_files(target: Target, files: Mapping[str, Path | bytes], message: str) -> Attempt[str]:
    """Put files into the repository in one commit, all of them or none; returns the commit's page.

    What is there already and equal is not sent again, so a second attempt goes on where the first was cut off.

    Raises:
        HubError: refused, or failed after the attempts.
    """
    where, repository = f"hub, {target.repository}", target.repository
    with _patient():
        if not target.exists:
            yield from _create(target)
        additions: list[CommitOperationAdd] = []

        def commit() -> str:
            # New ones at each attempt: they ask the hub again what is there, which may be the commit whose answer was
            # lost. What was hashed stays hashed.
            hashed = {addition.path_in_repo: addition.upload_info for addition in additions}
            additions[:] = [CommitOperationAdd(name, content) for name, content in files.items()]
            for addition in additions:
                addition.upload_info = hashed.get(addition.path_in_repo, addition.upload_info)
            return str(HfApi().create_commit(repository, additions, commit_message=message).commit_url)

        size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
        yield Update("stage", f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {target.page}")
        return (yield from attempts(where, "uploading", commit))


def _create(target: Target) -> Attempt[None]:
    where = f"hub, {target.repository}"
    yield Update("stage", f"making {target.page} ({'private' if target.is_private else 'public'})")

    def create() -> None:
        HfApi().create_repo(target.repository, private=target.is_private, exist_ok=False)

    try:
        yield from attempts(where, "making the repository", create)
    except _ConflictError:  # made by somebody else, or by the attempt before this one, whose answer was lost
        made = yield from _check(target.repository, target.is_private)
        if not made.exists:
            raise HubError(where, "cannot be made (409), and is not there", "a free name", "another name") from None


# --- attempts


class _AbsentError(HubError):
    """No such repository, or none that we can see."""


class _ConflictError(HubError):
    """Something is there already, or another change is under way."""


def attempts(where: str, doing: str, call: Callable[[], Result]) -> Attempt[Result]:
    """Call, and again after what may pass: a busy hub, a timeout, a connection that drops. A refusal stands at once.

    Raises:
        HubError: what it was in the end.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return call()
        except FAILURES as error:
            root = _root(error)
            wait = _wait(root, number)
            if wait is None or number == ATTEMPTS or wait > LONGEST_WAIT:
                raise _explain(where, doing, root, wait) from error
            yield Update("note", f"{doing}: {_said(root)}; again in {wait:.0f} s ({number} of {ATTEMPTS - 1})")
            time.sleep(wait)
    raise AssertionError


def _root(error: BaseException) -> BaseException:
    """What went wrong with a file, which the client wraps."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _wait(error: BaseException, number: int) -> float | None:
    """Seconds until another attempt makes sense; None: never."""
    status = _status(error)
    if _is_forbidden(error):
        return None
    if isinstance(error, JSONDecodeError):
        pass  # some requests read a busy hub's page as JSON before they look at its status
    elif isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled | ValueError | KeyError) or _is_local(error):
        return None
    if status is not None and status not in PASSING:
        return None
    longer: float = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return max(longer, float(asked)) if asked.isdigit() else longer


def _is_forbidden(error: BaseException) -> bool:
    """What xet's transfer raises where others answer 401."""
    return isinstance(error, PermissionError) and error.filename is None


def _is_local(error: BaseException) -> bool:
    """A file of ours that cannot be read."""
    return isinstance(error, OSError) and error.filename is not None


def _said(error: BaseException) -> str:
    status = _status(error)
    return f"the hub answers {status}" if status else f"no answer ({type(error).__name__})"


def _explain(where: str, doing: str, error: BaseException, wait: float | None) -> HubError:
    """What the hub's refusal of a push means and what to do about it."""
    status = _status(error)
    message = _server_message(error)
    if isinstance(error, GatedRepoError):
        return HubError(
            where, f"is gated ({status}, {doing})", "access granted to your account", f"ask for it; {LOGIN}"
        )
    if status == 401 or _is_forbidden(error):
        return HubError(where, f"the access token is not accepted (401, {doing})", "a valid one", LOGIN)
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return _AbsentError(where, f"is not there, or not for you ({status}, {doing})", "a repository of yours", LOGIN)
    if status == 403:
        return HubError(where, f"you may not write there (403, {doing}){message}", "the right to write", LOGIN)
    if status == 409:
        return _ConflictError(where, f"conflicts with what is there (409, {doing}){message}", "", "try again")
    if status == 429 and wait is not None and wait > LONGEST_WAIT:
        return HubError(where, f"asks to wait {wait:,.0f} s (429, {doing})", "", "try again then")
    if status is not None:
        return HubError(where, f"the hub answers {status} ({doing}){message}", "", "try again later")
    if _is_local(error):
        return HubError(where, f"a file cannot be read ({doing}): {error}", "", "see that it is there and yours")
    if isinstance(error, ValueError | KeyError):
        found = f"the hub's answer is not one ({doing}: {type(error).__name__}){message}"
        return HubError(where, found, "the hub itself, not a page in between", "try again later")
    return HubError(
        where, f"cannot be reached ({type(error).__name__}, {doing}){message}", "a connection", "try again later"
    )


def _server_message(error: BaseException) -> str:
    """What the hub says of it, in a line."""
    text = getattr(error, "server_message", None) or (
        str(error) if isinstance(error, ValueError | RuntimeError) else ""
    )
    text = TOKEN.sub("hf_***", " ".join(str(text).split()))[:200]
    return f": {text}" if text else ""


@contextmanager
def _patient() -> Any:
    """The hub's client with a limit to its patience, while this lasts."""

    before = _http._GLOBAL_CLIENT_FACTORY

    def client() -> Any:
        made = before()
        made.timeout = TIMEOUT
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(before)
