"""A repository of the hub to write to: whether it may be, made where it is not there, and one commit to it.

The token comes from the environment or the login, through the hub's own client, and is never held here.
"""

import errno
import fnmatch
import random
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    _http,
    build_hf_headers,
    hf_raise_for_status,
    parse_ratelimit_headers,
)
from pydantic import BaseModel, Field, ValidationError

from orpo_lite.base import UNREACHABLE
from orpo_lite.errors import TOKEN, CheckpointError, HubError
from orpo_lite.run import Update

ATTEMPTS = 4  # of each request, whether the client makes them or we do
FIRST_WAIT = 2.0  # seconds, doubled each time
LONGEST_WAIT = 300.0  # a hub that asks for more is left alone, and the command can be given again later
TIMEOUT = 120.0  # seconds without a byte; the hub's client would wait for ever
PASSING = (408, 425, 429, 500, 502, 503, 504)
ROLES = ("write", "contributor", "admin")  # in an organisation, of those who may write to its repositories
LEAST = 8  # characters of a token that is looked for in texts; a shorter one may be a word
QUOTA = re.compile("storage|quota|payment|billing|subscri|upgrade", re.IGNORECASE)  # in a 403 that is about no right
MISSHAPEN = ValueError | LookupError | TypeError | AttributeError  # what becomes of an answer that is not one
LOGIN = "`hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or HF_TOKEN"

Result = TypeVar("Result")
Attempt = Generator[Update, None, Result]


class WrongTargetError(HubError):
    """It may not be written to as asked; ``instead``, with ``is_private``, would do."""

    def __init__(self, where: str, found: str, expected: str, remedy: str, *, instead: str, is_private: bool) -> None:
        super().__init__(where, found, expected, remedy)
        self.instead, self.is_private = instead, is_private


class UnreadableError(CheckpointError):
    """A file of the run that went while the hub was waited for."""


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
    if not re.match("https?://.", constants.ENDPOINT):
        found, expected = f"{constants.ENDPOINT!r} is no address", "https://, and the host"
        raise HubError("HF_ENDPOINT", found, expected, f"HF_ENDPOINT=https://{constants.ENDPOINT}, or unset it")
    token = own_token(where)
    if token is None:
        raise HubError(where, "no access token here", "a token that may write", LOGIN)
    if not re.fullmatch("[!-~]+", token):
        found = "the access token is not one: it holds a space, or what is not ASCII"
        raise HubError(where, found, "the token as the hub shows it, which begins with hf_", LOGIN)
    with _patient():
        return (yield from _check(repository, is_private))


def _check(repository: str, is_private: bool) -> Attempt[Target]:
    where = f"hub, {repository}"
    who = yield from attempts(where, "asking who we are", _whoami)
    repository = repository if "/" in repository else f"{who.name}/{repository}"
    where = f"hub, {repository}"
    _refuse_reader(where, repository, who, is_private=is_private)

    def look() -> bool:
        found = HfApi().model_info(repository).private
        if not isinstance(found, bool):
            raise ValueError("it does not say whether the repository is private")
        return found

    try:
        found = yield from attempts(where, f"looking for {repository}", look)
    except _AbsentError:
        return Target(repository, is_private, exists=False)
    if found != is_private:
        there, asked = ("private", "public") if found else ("public", "private")
        remedy = "--public (output.hub_private_repo=false)" if asked == "private" else "leave --public out"
        remedy += f"; or change it at {constants.ENDPOINT}/{repository}/settings; or another name"
        expected = f"a {asked} repository, as asked; it is not changed here"
        raise WrongTargetError(where, f"is {there} already", expected, remedy, instead=repository, is_private=found)
    return Target(repository, is_private, exists=True)


def own_token(where: str) -> str | None:
    """The person's, of whatever form. Raises :class:`HubError` for a login that is over."""
    try:
        return get_token()
    except Exception as error:  # of a login that had to be renewed, in ways of its own
        raise HubError(where, f"the login cannot be renewed ({type(error).__name__})", "a login", LOGIN) from None


# --- what whoami says


class _Entity(BaseModel):
    type: str | None = None
    name: str | None = None


class _Scope(BaseModel):
    entity: _Entity = _Entity()
    permissions: list[str] = []


class _Rights(BaseModel):
    everywhere: list[str] = Field([], alias="global")
    scoped: list[_Scope] = []


class _Token(BaseModel):
    role: str | None = None
    rights: _Rights | None = Field(None, alias="fineGrained")


class _Auth(BaseModel):
    token: _Token | None = Field(None, alias="accessToken")


class _Organisation(BaseModel):
    name: str
    role: str | None = Field(None, alias="roleInOrg")


class _Account(BaseModel):
    name: str = Field(min_length=1)
    orgs: list[_Organisation] = []
    auth: _Auth | None = None


def _whoami() -> _Account:
    try:
        return _Account.model_validate(HfApi().whoami())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _refuse_reader(where: str, repository: str, who: _Account, *, is_private: bool) -> None:
    """Refuse a token, or an account, that may not write to this owner's repositories."""
    owner, _, name = repository.partition("/")
    roles = {org.name.lower(): org.role for org in who.orgs}
    if owner.lower() not in (who.name.lower(), *roles):
        theirs = ", ".join([who.name, *(org.name for org in who.orgs)])
        found = f"{owner} is neither you ({who.name}) nor an organisation of yours"
        mine = f"{who.name}/{name}"
        raise WrongTargetError(where, found, f"an owner among {theirs}", mine, instead=mine, is_private=is_private)
    if owner.lower() != who.name.lower() and (role := roles[owner.lower()]) not in ROLES:
        found = f"you may only read at {owner}" if role == "read" else f"your role at {owner} is {role}"
        raise HubError(where, found, "the role of a contributor or more", "ask an admin")
    token = (who.auth.token if who.auth else None) or _Token()
    rights = token.rights or _Rights()
    may_write = token.role != "read"
    if token.role == "fineGrained":
        here = {("user", owner.lower()), ("org", owner.lower()), ("model", repository.lower())}
        granted = [*rights.everywhere]
        for scope in rights.scoped:
            if (scope.entity.type, (scope.entity.name or "").lower()) in here:
                granted += scope.permissions
        may_write = "repo.write" in granted
    if not may_write:
        kind = (
            "a fine-grained token without the right to write there"
            if token.role == "fineGrained"
            else "a token that reads"
        )
        raise HubError(where, f"the access token is {kind}", f"one that may write to {owner}'s repositories", LOGIN)


# --- card and commit


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
            found = f"its metadata are refused by the hub{_server_message(error)}"
            raise HubError(where, found, "metadata that the hub takes", "mend it, or remove the file") from error
        if not isinstance(response.json(), dict):
            raise ValueError("no object")

    with _patient():
        yield from attempts(f"hub, {target.repository}", "showing the card", check)


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
    with _patient():
        if not target.exists:
            target = yield from _create(target)
        additions: list[CommitOperationAdd] = []

        def commit() -> str:
            stale = _stale(repository, files, ours) if target.exists else []
            removed.update(stale)
            # New ones at each attempt: they ask the hub again what is there, which may be the commit whose answer was
            # lost. What was hashed stays hashed.
            hashed = {addition.path_in_repo: addition.upload_info for addition in additions}
            additions[:] = [CommitOperationAdd(name, _there(content)) for name, content in files.items()]
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
            made = HfApi().create_commit(repository, [*additions, *deletions], commit_message=message)
            return str(made.commit_url)

        size = sum(len(content) if isinstance(content, bytes) else _size(content) for content in files.values())
        yield Update("stage", f"uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {target.page}")
        try:
            page = yield from attempts(where, "uploading", commit, passing=(*PASSING, 409, 412))
        finally:
            left.set()  # after Ctrl-C the client's threads go on, and must not make the commit all the same
    if removed:
        yield Update("note", f"removed, of an earlier push (the history keeps them): {', '.join(sorted(removed))}")
    return page


def _stale(repository: str, files: Collection[str], ours: Sequence[str]) -> list[str]:
    there = [str(sibling.rfilename) for sibling in HfApi().model_info(repository).siblings or ()]
    return [name for name in there if name not in files and any(fnmatch.fnmatchcase(name, p) for p in ours)]


def _there(content: Path | bytes) -> Path | bytes:
    """The client says of a file that has gone that the value is wrong."""
    if isinstance(content, Path) and not content.is_file():
        raise FileNotFoundError(errno.ENOENT, "is not there any more", str(content))
    return content


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(error) from error


def _refuse_objects(where: str, error: ValueError, additions: Sequence[CommitOperationAdd]) -> None:
    """Raise what the hub says of single files; it names them by their hashes, where people know names."""
    if str(error).startswith("LFS batch API returned errors"):
        names = {a.upload_info.sha256.hex(): a.path_in_repo for a in additions if a.upload_info.is_hashed}
        said = [f"{names.get(oid, oid)}: {text}" for oid, text in re.findall("OID ([^:]*): `?(.*)", str(error))]
        found = f"the hub refuses a file (uploading){_server_message(ValueError('; '.join(said)))}"
        raise HubError(where, found, "", "see what it says") from error


def _create(target: Target) -> Attempt[Target]:
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
        return made
    return target


# --- attempts


class _AbsentError(HubError):
    """No such repository, or none that we can see."""


class _ConflictError(HubError):
    """Something is there already, or another change is under way."""


class _SpentError(Exception):
    """The last of the attempts that one request has; its cause says what it was."""


# Besides the hub's own errors: what the client wraps the failure of one file in, and what its xet transfer raises; and
# what becomes of an answer of another shape than every answer of the hub has.
FAILURES = (*UNREACHABLE, RuntimeError, LookupError, TypeError, AttributeError, _SpentError)


def attempts(
    where: str, doing: str, call: Callable[[], Result], *, passing: Collection[int] = PASSING
) -> Attempt[Result]:
    """Call, and again after what may pass: a busy hub, a timeout, a connection that drops. A refusal stands at once.

    Raises:
        HubError: what it was in the end.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return apart(call)
        except FAILURES as error:
            root, is_spent = _root(error)
            if _is_ours(root):
                raise
            wait = _wait(root, number, passing)
            if wait is None or is_spent or number == ATTEMPTS or wait > LONGEST_WAIT:
                raise _explain(where, doing, root, wait) from error
            yield Update("note", f"{doing}: {_said(root)}; again in {wait:.0f} s ({number} of {ATTEMPTS - 1})")
            time.sleep(wait)
    raise AssertionError


def apart(call: Callable[[], Result]) -> Result:
    """The result of a call made on another thread, so that Ctrl-C ends the wait: the client would wait for its own."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result()
    finally:
        pool.shutdown(wait=False)


def _root(error: BaseException) -> tuple[BaseException, bool]:
    """What went wrong with a file, which the client wraps; and whether its request has no attempt left."""
    is_spent = False
    while type(error) in (RuntimeError, _SpentError) and error.__cause__ is not None:
        is_spent = is_spent or type(error) is _SpentError
        error = error.__cause__
    return error, is_spent


def _is_ours(error: BaseException) -> bool:
    """Whether it is a fault in these lines; the client's own lines take the shape of an answer for granted."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_ours = bool(frames) and frames[-1].f_globals.get("__name__") == __name__
    return in_ours and isinstance(error, LookupError | TypeError | AttributeError)


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _wait(error: BaseException, number: int, passing: Collection[int] = PASSING) -> float | None:
    """Seconds until another attempt makes sense; None: never."""
    status = _status(error)
    if _is_forbidden(error):
        return None
    if isinstance(error, JSONDecodeError):
        pass  # some requests read a busy hub's page as JSON before they look at its status
    elif isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled | MISSHAPEN) or _is_local(error):
        return None
    if status is not None and status not in passing:
        return None
    longer: float = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
    return max(longer, _asked(error.response)) if status is not None else longer  # type: ignore[attr-defined]


def _asked(response: Any) -> float:
    """Seconds that the hub asks to wait; 0 where it does not say."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = response.headers.get("Retry-After", "")
    return float(asked) if re.fullmatch("[0-9]+", asked) else 0.0


def _is_forbidden(error: BaseException) -> bool:
    """What xet's transfer raises where others answer 401."""
    return isinstance(error, PermissionError) and error.filename is None


def _is_local(error: BaseException) -> bool:
    """A file of ours that cannot be read."""
    return isinstance(error, OSError) and error.filename is not None


def _said(error: BaseException) -> str:
    status = _status(error)
    return f"the hub answers {status}" if status else f"no answer ({type(error).__name__})"


def _explain(where: str, doing: str, error: BaseException, wait: float | None) -> HubError | UnreadableError:
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
    if status in (402, 413) or (status == 403 and QUOTA.search(message)):
        remedy = "see what it says: make room there, or push smaller files (orpo-lite merge --max-shard-size)"
        return HubError(where, f"the hub takes no more ({status}, {doing}){message}", "", remedy)
    if status == 403:
        return HubError(where, f"you may not write there (403, {doing}){message}", "the right to write", LOGIN)
    if status in (409, 412):
        return _ConflictError(where, f"conflicts with what is there ({status}, {doing}){message}", "", "try again")
    if status == 429 and wait is not None and wait > LONGEST_WAIT:
        return HubError(where, f"asks to wait {wait:,.0f} s (429, {doing})", "", "try again then")
    if status is not None:
        remedy = "see what it says" if 400 <= status < 500 and status not in PASSING else "try again later"
        return HubError(where, f"the hub answers {status} ({doing}){message}", "", remedy)
    if isinstance(error, OSError) and error.filename is not None:
        return _unreadable(error)
    if isinstance(error, MISSHAPEN):
        found = f"the hub's answer is not one ({doing}: {type(error).__name__}){message}"
        return HubError(where, found, "the hub itself, not a page in between", "try again later")
    return HubError(
        where, f"cannot be reached ({type(error).__name__}, {doing}){message}", "a connection", "try again later"
    )


def _unreadable(error: OSError) -> UnreadableError:
    return UnreadableError(str(error.filename), f"cannot be read ({error.strerror})", "a file of the run, whole")


def _server_message(error: BaseException) -> str:
    """What the hub says of it, in a line; never the token, which it may quote."""
    text = getattr(error, "server_message", None) or (
        str(error) if isinstance(error, ValueError | RuntimeError) else ""
    )
    own = own_token("hub") or ""
    text = TOKEN.sub("hf_***", " ".join(str(text).split()))
    text = (text.replace(own, "hf_***") if len(own) >= LEAST else text)[:200]
    return f": {text}" if text else ""


@contextmanager
def _patient() -> Any:
    """The hub's client with a limit to its patience, while this lasts."""

    before = _http._GLOBAL_CLIENT_FACTORY
    failed: Counter[str] = Counter()

    def client() -> Any:
        made: Any = before()
        made.timeout = TIMEOUT
        made.request = partial(_request, made.request, failed)
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(before)


def _request(request: Callable[..., Any], failed: Counter[str], method: str, url: object, **options: Any) -> Any:
    """A request of the client, which makes some again by itself; no more often than we do the others.

    Without that its attempts and ours would multiply, and it would wait for as long as any hub asks.
    """
    key = f"{method} {url}"
    failed[key] += 1
    is_last = failed[key] >= ATTEMPTS
    try:
        response = request(method, url, **options)
        if response.status_code in PASSING and (is_last or _asked(response) > LONGEST_WAIT):
            hf_raise_for_status(response)
    except HTTPError as error:
        if is_last or isinstance(error, HfHubHTTPError):
            raise _SpentError from error
        raise
    if response.status_code not in PASSING:
        del failed[key]
        if method == "PUT" and "html" in response.headers.get("Content-Type", "") and response.status_code < 300:
            raise ValueError("a page in answer to a file")  # which a network asks people to log in with
    return response
