"""Who we are at the hub, and whether a repository may be written to, or made."""

import re
from dataclasses import dataclass

from huggingface_hub import HfApi, constants
from pydantic import BaseModel, Field, ValidationError

from orpo_lite.errors import HubError
from orpo_lite.publishing.retry import LOGIN, AbsentError, Attempt, own_token, retry, with_timeouts

ROLES = (
    "write",
    "contributor",
    "admin",
)  # in an organisation, of those who may write to its repositories


class WrongTargetError(HubError):
    """It may not be written to as asked; ``instead``, with ``is_private``, would do."""

    def __init__(self, *, instead: str, is_private: bool, **said: str) -> None:
        super().__init__(**said)
        self.instead, self.is_private = instead, is_private


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
        raise HubError(
            where=where,
            found=found,
            expected=expected,
            fix="unset HF_HUB_OFFLINE (TRANSFORMERS_OFFLINE sets it too)",
        )
    if not re.match("https?://.", constants.ENDPOINT):
        found, expected = f"{constants.ENDPOINT!r} is no address", "https://, and the host"
        raise HubError(
            where="HF_ENDPOINT",
            found=found,
            expected=expected,
            fix=f"HF_ENDPOINT=https://{constants.ENDPOINT}, or unset it",
        )
    token = own_token(where)
    if token is None:
        raise HubError(
            where=where, found="no access token here", expected="a token that may write", fix=LOGIN
        )
    if not re.fullmatch("[!-~]+", token):
        found = "the access token is not one: it holds a space, or what is not ASCII"
        raise HubError(
            where=where,
            found=found,
            expected="the token as the hub shows it, which begins with hf_",
            fix=LOGIN,
        )
    with with_timeouts():
        return (yield from find_target(repository, is_private))


def find_target(repository: str, is_private: bool) -> Attempt[Target]:
    """:func:`check_target`, once there is a token."""
    where = f"hub, {repository}"
    who = yield from retry(where, "asking who we are", _whoami)
    repository = repository if "/" in repository else f"{who.name}/{repository}"
    where = f"hub, {repository}"
    _refuse_reader(where, repository, who, is_private=is_private)

    def look() -> bool:
        found = HfApi().model_info(repository).private
        if not isinstance(found, bool):
            raise ValueError("it does not say whether the repository is private")
        return found

    try:
        found = yield from retry(where, f"looking for {repository}", look)
    except AbsentError:
        return Target(repository, is_private, exists=False)
    if found != is_private:
        there, asked = ("private", "public") if found else ("public", "private")
        fix = (
            "--public (output.hub_private_repo=false)"
            if asked == "private"
            else "leave --public out"
        )
        fix += f"; or change it at {constants.ENDPOINT}/{repository}/settings; or another name"
        raise WrongTargetError(
            where=where,
            found=f"is {there} already",
            expected=f"a {asked} repository, as asked; it is not changed here",
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
        raise WrongTargetError(
            where=where,
            found=found,
            expected=f"an owner among {theirs}",
            fix=mine,
            instead=mine,
            is_private=is_private,
        )
    if owner.lower() != who.name.lower() and (role := roles[owner.lower()]) not in ROLES:
        found = (
            f"you may only read at {owner}" if role == "read" else f"your role at {owner} is {role}"
        )
        raise HubError(
            where=where,
            found=found,
            expected="the role of a contributor or more",
            fix="ask an admin",
        )
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
        raise HubError(
            where=where,
            found=f"the access token is {kind}",
            expected=f"one that may write to {owner}'s repositories",
            fix=LOGIN,
        )
