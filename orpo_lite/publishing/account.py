"""Check that the account on the hub may create a repository or write to it."""

import re
from dataclasses import dataclass

from huggingface_hub import HfApi, constants
from pydantic import BaseModel, Field, ValidationError

from orpo_lite.errors import HubError
from orpo_lite.publishing.retry import LOGIN, AbsentError, Attempt, own_token, retry, with_timeouts

ROLES = ("write", "contributor", "admin")  # roles in an organisation that may write


class WrongTargetError(HubError):
    """The owner or the visibility of the requested repository is wrong.

    The fix suggests a repository with another owner or another visibility. ``instead`` is the name
    of the suggested repository, and ``is_private`` is its visibility.
    """

    def __init__(self, *, instead: str, is_private: bool, **message: str) -> None:
        super().__init__(**message)
        self.instead, self.is_private = instead, is_private


@dataclass(frozen=True)
class Target:
    """A repository on the hub that the account may write to or create."""

    repository: str
    """The full name, such as "me/model"."""
    is_private: bool
    exists: bool

    @property
    def page(self) -> str:
        """Return the URL of the repository's page."""
        return f"{constants.ENDPOINT}/{self.repository}"


def check_target(repository: str, *, is_private: bool) -> Attempt[Target]:
    """Ask the hub whether the token's account may create or write to a repository. Change nothing.

    Args:
        repository: owner/name, or only a name. If no owner is given, the account is the owner.
        is_private: True for a private repository. An existing repository must have this visibility
            already.

    Raises:
        HubError: the hub cannot be reached, there is no token, or the token or the account has no
            write access.
        WrongTargetError: the account may not use this owner, or the repository exists and has
            another visibility.
    """
    where = f"hub, {repository}"
    if constants.is_offline_mode():
        found, expected = "cannot be reached: offline mode is on", "a connection to the hub"
        raise HubError(
            where=where,
            found=found,
            expected=expected,
            fix="unset both HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE: each of them turns it on",
        )
    if not re.match("https?://.", constants.ENDPOINT):
        found, expected = f"{constants.ENDPOINT!r} is not a URL", "https:// followed by a host name"
        raise HubError(
            where="HF_ENDPOINT",
            found=found,
            expected=expected,
            fix=f"set HF_ENDPOINT=https://{constants.ENDPOINT}, or unset HF_ENDPOINT",
        )
    token = own_token(where)
    if token is None:
        raise HubError(
            where=where,
            found="there is no access token",
            expected="a token with write access",
            fix=LOGIN,
        )
    if not re.fullmatch("[!-~]+", token):
        found = "the access token is invalid: it has a space or a character that is not ASCII"
        raise HubError(
            where=where,
            found=found,
            expected="a token that is copied from the hub and begins with hf_",
            fix=LOGIN,
        )
    with with_timeouts():
        return (yield from find_target(repository, is_private))


def find_target(repository: str, is_private: bool) -> Attempt[Target]:
    """Return the repository if the account may create it or write to it. Change nothing.

    :func:`check_target` checks HF_ENDPOINT, offline mode and the token, and then calls this
    function.
    """
    where = f"hub, {repository}"
    account = yield from retry(where, "reading the account", _whoami)
    repository = repository if "/" in repository else f"{account.name}/{repository}"
    where = f"hub, {repository}"
    _check_write_access(where, repository, account, is_private=is_private)

    def read_visibility() -> bool:
        found = HfApi().model_info(repository).private
        if not isinstance(found, bool):
            raise ValueError("the answer lacks the repository's visibility")
        return found

    try:
        found = yield from retry(where, f"looking for {repository}", read_visibility)
    except AbsentError:
        return Target(repository, is_private, exists=False)
    if found != is_private:
        actual, requested = ("private", "public") if found else ("public", "private")
        fix = "leave --public out (in a recipe: output.hub_private_repo=true)"
        if requested == "private":
            fix = "add --public (in a recipe: output.hub_private_repo=false)"
        fix += (
            f"; or change the visibility at {constants.ENDPOINT}/{repository}/settings; "
            "or use another name"
        )
        raise WrongTargetError(
            where=where,
            found=f"exists and is already {actual}",
            expected=f"a {requested} repository; a push does not change the visibility",
            fix=fix,
            instead=repository,
            is_private=found,
        )
    return Target(repository, is_private, exists=True)


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


def find_account() -> Attempt[tuple[str, str]]:
    """Return (account, role): the name of the token's account, and the role of the token.

    The role is "read", "write" or "fineGrained", or "" if the hub does not report it.

    Raises:
        HubError: the hub cannot be reached, or it does not accept the token.
    """
    with with_timeouts():
        account = yield from retry("hub", "reading the account", _whoami)
    token = account.auth.token if account.auth else None
    return account.name, (token.role if token else None) or ""


def _whoami() -> _Account:
    try:
        return _Account.model_validate(HfApi().whoami())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _check_write_access(
    where: str, repository: str, account: _Account, *, is_private: bool
) -> None:
    """Raise :class:`HubError` if the account or its token has no write access to a repository."""
    owner, _, name = repository.partition("/")
    roles = {org.name.lower(): org.role for org in account.orgs}
    if owner.lower() not in (account.name.lower(), *roles):
        owners = ", ".join([account.name, *(org.name for org in account.orgs)])
        found = f"{owner} is neither your account ({account.name}) nor one of your organisations"
        mine = f"{account.name}/{name}"
        raise WrongTargetError(
            where=where,
            found=found,
            expected=f"one of these owners: {owners}",
            fix=f"use the name {mine}",
            instead=mine,
            is_private=is_private,
        )
    role = roles.get(owner.lower())
    if owner.lower() != account.name.lower() and role not in ROLES:
        found = f"your role at {owner} is {role or 'not known'}"
        if role == "read":
            found = f"you have only read access at {owner}"
        raise HubError(
            where=where,
            found=found,
            expected=f"one of these roles: {', '.join(ROLES)}",
            fix=f"ask an admin of {owner} for one of these roles",
        )
    token = account.auth.token if account.auth else None
    token = token or _Token()
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
        found = "the access token has only read access"
        if token.role == "fineGrained":
            found = f"the fine-grained access token has no write access to {repository}"
        raise HubError(
            where=where,
            found=found,
            expected=f"a token with write access to {owner}'s repositories",
            fix=LOGIN,
        )
