"""Requests to the hub, made again where that makes sense; and what its refusals mean, with what to do about them.

The token comes from the environment or the login, through the hub's own client, and is never held here.
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

ATTEMPTS = 4  # of each request, whether the client makes them or we do
FIRST_WAIT = 2.0  # seconds, doubled each time
LONGEST_WAIT = (
    300.0  # a hub that asks for more is left alone, and the command can be given again later
)
TIMEOUT = 120.0  # seconds without a byte; the hub's client would wait for ever
PASSING = (408, 425, 429, 500, 502, 503, 504)
LEAST = 8  # characters of a token that is looked for in texts; a shorter one may be a word
QUOTA = re.compile(
    "storage|quota|payment|billing|subscri|upgrade", re.IGNORECASE
)  # in a 403 that is about no right
MISSHAPEN = (
    ValueError | LookupError | TypeError | AttributeError
)  # what becomes of an answer that is not one
LOGIN = "`hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or HF_TOKEN"

Result = TypeVar("Result")
Attempt = Generator[Update, None, Result]


class UnreadableError(CheckpointError):
    """A file of the run that went while the hub was waited for."""


class AbsentError(HubError):
    """No such repository, or none that we can see."""


class ConflictError(HubError):
    """Something is there already, or another change is under way."""


class _SpentError(Exception):
    """The last of the attempts that one request has; its cause says what it was."""


# Besides the hub's own errors: what the client wraps the failure of one file in, and what its xet transfer raises; and
# what becomes of an answer of another shape than every answer of the hub has.
FAILURES = (*UNREACHABLE, RuntimeError, LookupError, TypeError, AttributeError, _SpentError)


def retry(
    where: str, doing: str, call: Callable[[], Result], *, passing: Collection[int] = PASSING
) -> Attempt[Result]:
    """Call, and again after what may pass: a busy hub, a timeout, a connection that drops. A refusal stands at once.

    Raises:
        HubError: what it was in the end.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return run_in_thread(call)
        except FAILURES as error:
            root, is_spent = _root(error)
            if _is_ours(root):
                raise
            wait = _wait(root, number, passing)
            if wait is None or is_spent or number == ATTEMPTS or wait > LONGEST_WAIT:
                raise _explain(where, doing, root, wait) from error
            yield Update(
                "note",
                f"{doing}: {_said(root)}; again in {wait:.0f} s ({number} of {ATTEMPTS - 1})",
            )
            time.sleep(wait)
    raise AssertionError


def run_in_thread(call: Callable[[], Result]) -> Result:
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
    in_ours = bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("orpo_lite.")
    return in_ours and isinstance(error, LookupError | TypeError | AttributeError)


def _status(error: BaseException) -> int | None:
    return (
        error.response.status_code
        if isinstance(error, HfHubHTTPError) and error.response is not None
        else None
    )


def _wait(error: BaseException, number: int, passing: Collection[int] = PASSING) -> float | None:
    """Seconds until another attempt makes sense; None: never."""
    status = _status(error)
    if _is_forbidden(error):
        return None
    if isinstance(error, JSONDecodeError):
        pass  # some requests read a busy hub's page as JSON before they look at its status
    elif isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled | MISSHAPEN) or _is_local(
        error
    ):
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


def _explain(
    where: str, doing: str, error: BaseException, wait: float | None
) -> HubError | UnreadableError:
    """What the hub's refusal of a push means and what to do about it."""
    status = _status(error)
    message = server_message(error)
    if isinstance(error, GatedRepoError):
        return HubError(
            where=where,
            found=f"is gated ({status}, {doing})",
            expected="access granted to your account",
            fix=f"ask for it; {LOGIN}",
        )
    if status == 401 or _is_forbidden(error):
        return HubError(
            where=where,
            found=f"the access token is not accepted (401, {doing})",
            expected="a valid one",
            fix=LOGIN,
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return AbsentError(
            where=where,
            found=f"is not there, or not for you ({status}, {doing})",
            expected="a repository of yours",
            fix=LOGIN,
        )
    if status in (402, 413) or (status == 403 and QUOTA.search(message)):
        fix = "see what it says: make room there, or push smaller files (orpo-lite merge --max-shard-size)"
        return HubError(
            where=where, found=f"the hub takes no more ({status}, {doing}){message}", fix=fix
        )
    if status == 403:
        return HubError(
            where=where,
            found=f"you may not write there (403, {doing}){message}",
            expected="the right to write",
            fix=LOGIN,
        )
    if status in (409, 412):
        return ConflictError(
            where=where,
            found=f"conflicts with what is there ({status}, {doing}){message}",
            fix="try again",
        )
    if status == 429 and wait is not None and wait > LONGEST_WAIT:
        return HubError(
            where=where, found=f"asks to wait {wait:,.0f} s (429, {doing})", fix="try again then"
        )
    if status is not None:
        fix = (
            "see what it says"
            if 400 <= status < 500 and status not in PASSING
            else "try again later"
        )
        return HubError(where=where, found=f"the hub answers {status} ({doing}){message}", fix=fix)
    if isinstance(error, OSError) and error.filename is not None:
        return unreadable(error)
    if isinstance(error, MISSHAPEN):
        return HubError(
            where=where,
            found=f"the hub's answer is not one ({doing}: {type(error).__name__}){message}",
            expected="the hub itself, not a page in between",
            fix="try again later",
        )
    return HubError(
        where=where,
        found=f"cannot be reached ({type(error).__name__}, {doing}){message}",
        expected="a connection",
        fix="try again later",
    )


def unreadable(error: OSError) -> UnreadableError:
    """What to say of a file that went, or that may not be read."""
    return UnreadableError(
        where=str(error.filename),
        found=f"cannot be read ({error.strerror})",
        expected="a file of the run, whole",
    )


def own_token(where: str) -> str | None:
    """The person's, of whatever form. Raises :class:`HubError` for a login that is over."""
    try:
        return get_token()
    except Exception as error:  # of a login that had to be renewed, in ways of its own
        raise HubError(
            where=where,
            found=f"the login cannot be renewed ({type(error).__name__})",
            expected="a login",
            fix=LOGIN,
        ) from None


def server_message(error: BaseException) -> str:
    """What the hub says of it, in a line; never the token, which it may quote."""
    text = getattr(error, "server_message", None) or (
        str(error) if isinstance(error, ValueError | RuntimeError) else ""
    )
    own = own_token("hub") or ""
    text = TOKEN.sub("hf_***", " ".join(str(text).split()))
    text = (text.replace(own, "hf_***") if len(own) >= LEAST else text)[:200]
    return f": {text}" if text else ""


@contextmanager
def with_timeouts() -> Any:
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


def _request(
    request: Callable[..., Any], failed: Counter[str], method: str, url: object, **options: Any
) -> Any:
    """A request of the client, which makes some again by itself; no more often than we do the others.

    Without that its attempts and ours would multiply, and it would wait for as long as any hub asks.
    """
    key = f"{threading.get_ident()} {method} {url}"  # the files of an upload share an address, each on its thread
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
        if (
            method == "PUT"
            and "html" in response.headers.get("Content-Type", "")
            and response.status_code < 300
        ):
            raise ValueError(
                "a page in answer to a file"
            )  # which a network asks people to log in with
    return response
