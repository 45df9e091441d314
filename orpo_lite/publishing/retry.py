"""Repeat failed requests to the hub, and explain the hub's errors.

The library huggingface_hub reads the access token from the environment or from the login. orpo-lite
never stores the token.
"""

import random
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from json import JSONDecodeError
from typing import Any, TypeVar

from huggingface_hub import get_token, set_client_factory
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http, hf_raise_for_status, parse_ratelimit_headers  # type: ignore[attr-defined]

from orpo_lite.base.download import UNREACHABLE
from orpo_lite.errors import TOKEN, CheckpointError, HubError
from orpo_lite.updates import Update

ATTEMPTS = 4  # for each request; attempts of the hub's client and of this module both count
FIRST_WAIT = 2.0  # seconds before the second attempt; doubled after each attempt
LONGEST_WAIT = 300.0  # seconds; if the hub asks for a longer wait, the command ends
TIMEOUT = 120.0  # seconds without a received byte; the hub's client has no limit
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)  # status codes of temporary failures
LEAST = 8  # characters of the shortest token that is searched in texts; a shorter one may be a word
# Words in an answer with status 403 that show a quota as its reason, not missing rights.
QUOTA = re.compile("storage|quota|payment|billing|subscri|upgrade", re.IGNORECASE)
INVALID_ANSWER = ValueError | LookupError | TypeError | AttributeError
LOGIN = (
    "run `hf auth login` with a token that has write access "
    "(https://huggingface.co/settings/tokens), or set HF_TOKEN"
)

Result = TypeVar("Result")
Attempt = Generator[Update, None, Result]


class UnreadableError(CheckpointError):
    """A file of the run disappeared or became unreadable during the push."""


class AbsentError(HubError):
    """The repository does not exist, or the account cannot see it."""


class ConflictError(HubError):
    """The repository exists already, or another change to it is in progress."""


class _SpentError(Exception):
    """The last attempt of a request failed. ``__cause__`` is the failure."""


# Errors of a failed request. RuntimeError: the xet transfer failed, or a file of several failed.
# LookupError, TypeError and AttributeError: the answer has an unexpected structure.
FAILURES = (*UNREACHABLE, RuntimeError, LookupError, TypeError, AttributeError, _SpentError)


def retry(
    where: str, doing: str, call: Callable[[], Result], *, temporary: Collection[int] = TEMPORARY
) -> Attempt[Result]:
    """Call a function that sends requests to the hub. After a temporary failure, call it again.

    Temporary failures are a busy hub, a timeout and a lost connection. Yield a note before each new
    attempt; finally return the result of the function.

    Args:
        where: the place for messages, such as "hub, me/model".
        doing: the action for messages, such as "uploading".
        call: the function. It takes no arguments.
        temporary: the HTTP status codes that are temporary failures.

    Raises:
        HubError: the hub refused the request, or the last attempt failed.
        UnreadableError: a local file cannot be read.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return run_in_thread(call)
        except FAILURES as error:
            root, is_spent = _root(error)
            if _is_own_bug(root):
                raise
            wait = _wait(root, number, temporary)
            is_last = is_spent or number == ATTEMPTS
            if is_last or wait is None or wait > LONGEST_WAIT:
                raise _explain(where, doing, root, wait) from error
            yield Update(
                "note",
                f"{doing}: {_failure(root)}; retry {number} of {ATTEMPTS - 1} in {wait:.0f} s",
            )
            time.sleep(wait)
    raise AssertionError


def run_in_thread(call: Callable[[], Result]) -> Result:
    """Call a function in another thread, and return the function's result.

    So Ctrl-C works at once. If the main thread called the function, Ctrl-C would have to wait for
    the threads of the hub's client.
    """
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result()
    finally:
        pool.shutdown(wait=False)


def _root(error: BaseException) -> tuple[BaseException, bool]:
    """Return (cause, is_spent): the original error, and True if no attempt is left."""
    is_spent = False
    while type(error) in (RuntimeError, _SpentError) and error.__cause__ is not None:
        is_spent = is_spent or type(error) is _SpentError
        error = error.__cause__
    return error, is_spent


def _is_own_bug(error: BaseException) -> bool:
    """Return True if an error is a bug in orpo-lite.

    Errors of the same types also occur in the hub's client, if an answer has an unexpected
    structure. So the module that raised the error is checked.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    is_bug = isinstance(error, LookupError | TypeError | AttributeError)
    return is_bug and module.startswith("orpo_lite.")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status code of a failed request, or None if there was no answer."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code
    return None


def _wait(
    error: BaseException, number: int, temporary: Collection[int] = TEMPORARY
) -> float | None:
    """Return the seconds to wait before the next attempt, or None if a retry would not help."""
    status = _status(error)
    if _is_forbidden(error):
        return None
    permanent = LocalTokenNotFoundError | OfflineModeIsEnabled | INVALID_ANSWER
    is_permanent = isinstance(error, permanent) or _is_local(error)
    # A busy hub answers with a web page. Some requests parse the page as JSON before they check
    # the status.
    if is_permanent and not isinstance(error, JSONDecodeError):
        return None
    wait: float = FIRST_WAIT * 2 ** (number - 1) * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
    if status is None:
        return wait
    if status not in temporary:
        return None
    return max(wait, _requested_wait(error.response))  # type: ignore[attr-defined]


def _requested_wait(response: Any) -> float:
    """Return the seconds that the hub asks to wait, or 0 if it does not ask."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = response.headers.get("Retry-After", "")
    return float(seconds) if re.fullmatch("[0-9]+", seconds) else 0.0


def _is_forbidden(error: BaseException) -> bool:
    """Return True if the xet transfer was refused. Its error is equivalent to status 401."""
    return isinstance(error, PermissionError) and error.filename is None


def _is_local(error: BaseException) -> bool:
    """Return True if an error is about a local file."""
    return isinstance(error, OSError) and error.filename is not None


def _failure(error: BaseException) -> str:
    """Return a short description of a failed request."""
    status = _status(error)
    return (
        f"the hub answered with status {status}"
        if status
        else f"the hub did not answer ({type(error).__name__})"
    )


def _explain(
    where: str, doing: str, error: BaseException, wait: float | None
) -> HubError | UnreadableError:
    """Return the error, with a fix, for a failed request.

    ``where`` and ``doing`` are the place and the action. ``wait`` is the result of :func:`_wait`.
    """
    status = _status(error)
    message = server_message(error)
    if isinstance(error, GatedRepoError):
        return HubError(
            where=where,
            found=f"is gated ({status}, {doing})",
            expected="access granted to your account",
            fix=f"ask for access on the page of the repository; then {LOGIN}",
        )
    if status == 401 or _is_forbidden(error):
        return HubError(
            where=where,
            found=f"the hub does not accept the access token (401, {doing})",
            expected="a valid token",
            fix=LOGIN,
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return AbsentError(
            where=where,
            found=f"does not exist, or you have no access to it ({status}, {doing})",
            expected="a repository that you can access",
            fix=LOGIN,
        )
    if status in (402, 413) or (status == 403 and QUOTA.search(message)):
        fix = (
            "follow the hub's message: free space on the hub, or push smaller files "
            "(orpo-lite merge --max-shard-size)"
        )
        return HubError(
            where=where,
            found=f"the hub's storage limit is reached ({status}, {doing}){message}",
            fix=fix,
        )
    if status == 403:
        return HubError(
            where=where,
            found=f"you have no write access (403, {doing}){message}",
            expected="an account and a token with write access",
            fix=LOGIN,
        )
    if status in (409, 412):
        return ConflictError(
            where=where,
            found="the request conflicts with the current state of the repository "
            f"({status}, {doing}){message}",
            fix="repeat the command",
        )
    if status == 429 and wait is not None and wait > LONGEST_WAIT:
        return HubError(
            where=where,
            found=f"the hub asks to wait {wait:,.0f} s (429, {doing})",
            fix=f"try again after {wait:,.0f} s",
        )
    if status is not None:
        is_refusal = 400 <= status < 500 and status not in TEMPORARY
        fix = "follow the hub's message" if is_refusal else "try again later"
        return HubError(
            where=where, found=f"the hub answered with status {status} ({doing}){message}", fix=fix
        )
    if isinstance(error, OSError) and error.filename is not None:
        return unreadable(error)
    if isinstance(error, INVALID_ANSWER):
        return HubError(
            where=where,
            found=f"the answer is not from the hub ({doing}: {type(error).__name__}){message}",
            expected="an answer from the hub, not a web page from a proxy or a login",
            fix="try again later",
        )
    return HubError(
        where=where,
        found=f"cannot be reached ({type(error).__name__}, {doing}){message}",
        expected="a connection to the hub",
        fix="try again later",
    )


def unreadable(error: OSError) -> UnreadableError:
    """Convert the OSError of a local file to an :class:`UnreadableError`."""
    return UnreadableError(
        where=str(error.filename),
        found=f"cannot be read ({error.strerror})",
        expected="a file that can be read",
    )


def own_token(where: str) -> str | None:
    """Return the user's access token for the hub, or None if there is none.

    Raises:
        HubError: the login has expired and cannot be renewed.
    """
    try:
        return get_token()
    except Exception as error:  # renewing a login can raise anything
        raise HubError(
            where=where,
            found=f"the login to the hub cannot be renewed ({type(error).__name__})",
            expected="a valid login",
            fix=LOGIN,
        ) from None


def server_message(error: BaseException) -> str:
    """Return the hub's message as ": text" on one line, or "". Access tokens are removed."""
    text = getattr(error, "server_message", None)
    if not text and isinstance(error, ValueError | RuntimeError):
        text = str(error)
    own = own_token("hub") or ""
    text = TOKEN.sub("hf_***", " ".join(str(text or "").split()))
    if len(own) >= LEAST:
        text = text.replace(own, "hf_***")
    text = text[:200]
    return f": {text}" if text else ""


@contextmanager
def with_timeouts() -> Any:
    """Limit how long, and how often, huggingface_hub tries a request in the ``with`` block."""
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


def _request(
    request: Callable[..., Any], failed: Counter[str], method: str, url: object, **options: Any
) -> Any:
    """Send a request for the hub's client. If its last attempt fails, raise :class:`_SpentError`.

    The client also sends some requests again. Without this limit, its attempts and the attempts of
    :func:`retry` would multiply, and the client would wait as long as the hub asks.
    """
    # The files of an upload share a URL, but each has its own thread.
    key = f"{threading.get_ident()} {method} {url}"
    failed[key] += 1
    is_last = failed[key] >= ATTEMPTS
    try:
        response = request(method, url, **options)
        is_temporary = response.status_code in TEMPORARY
        if is_temporary and (is_last or _requested_wait(response) > LONGEST_WAIT):
            hf_raise_for_status(response)
    except HTTPError as error:
        if is_last or isinstance(error, HfHubHTTPError):
            raise _SpentError from error
        raise
    if not is_temporary:
        del failed[key]
        is_page = "html" in response.headers.get("Content-Type", "")
        if method == "PUT" and is_page and response.status_code < 300:
            raise ValueError("a web page instead of an answer")  # the login page of a network
    return response
