"""Read and check values of a recipe. Each function raises ValueError with what it expects."""

import json
import os
import re
from pathlib import Path
from typing import Any

from orpo_lite.recipe.text import read_bytes


def read_steps(value: object) -> float:
    """Read a share of all steps (below 1) or a number of steps (TrainingArguments' convention)."""
    try:
        steps = float(value)  # type: ignore[arg-type]
    except TypeError:  # null or a list
        raise ValueError("should be a valid number") from None
    if not 0 <= steps < float("inf"):
        raise ValueError("should be a share of the steps (0.1) or a whole number of them (100)")
    if steps > 1 and steps != int(steps):
        raise ValueError("a share of all steps below 1, or a whole number of steps")
    return steps


def refuse_zero(value: int) -> int:
    """Refuse 0 as a number of steps; -1 means as many as the epochs need."""
    if value == 0:
        raise ValueError("-1, or at least one step")
    return value


def expand_home(value: str) -> str:
    """Return a path with its leading ~ expanded: a shell does not expand it after ``KEY=``."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        user = value.partition("/")[0]
        raise ValueError(
            f"a folder: no user has the home folder {user}; "
            f"write ./{value} for a folder of that name here"
        )
    return path


def read_module_names(value: object) -> object:
    """Return names with commas between them as a list; "all-linear" stays a text."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    return _split_at_commas(value)


def read_names(value: object) -> object:
    """Return several names, written as JSON or with commas between them, as a list.

    A text that is the path of a file is one name, because a file's name may contain a comma.
    """
    if not isinstance(value, str) or Path(value).expanduser().exists():
        return value
    if value.startswith('["'):
        try:
            return json.loads(value)
        except ValueError:
            pass  # not JSON: split it at its commas
    return _split_at_commas(value) if "," in value else value


def read_trackers(value: object) -> object:
    """Return names of trackers as a list, each once; none and null are no trackers."""
    if value is None or value == "none":
        return []
    names = _split_at_commas(value) if isinstance(value, str) else value
    return list(dict.fromkeys(names)) if isinstance(names, list) else names


def _split_at_commas(value: str) -> list[str]:
    names = [name.strip(" \"'") for name in value.strip("[] ").split(",")]
    return [name for name in names if name]


def to_json_values(value: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON has: YAML reads 2024-07-26 as a date, a template needs the text."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


# Initialisations of peft that change the base's weights.
BASE_CHANGING = {"pissa", "olora", "loftq", "corda", "eva", "lora-ga", "lora"}


def check_lora_init(value: object) -> object:
    """Refuse the initialisations that change the base; read "true" as True."""
    name = str(value).lower()
    if name.split("_")[0] in BASE_CHANGING:
        raise ValueError(
            f"true, gaussian or orthogonal: {value} rewrites the base, "
            "so the adapter would fit no other copy of it"
        )
    return True if name == "true" else value


def check_budget(value: object) -> object:
    """Refuse a budget that is not auto or a size above 0."""
    if isinstance(value, str) and value != "auto" and read_bytes(value) == 0:
        raise ValueError("auto, or a size such as 24GiB")
    return value


def check_attention(value: object) -> object:
    """Refuse the name of a repository, whose compiled code transformers would run."""
    if isinstance(value, str) and "/" in value:
        raise ValueError(
            "a name without a /: one with a / fetches compiled code from the hub, which is refused"
        )
    return value


# The same checks as those of the hub's own client.
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII)
MAX_REPOSITORY_LENGTH = 96


def refuse_repository(name: str) -> None:
    """Raise ValueError for a name that no repository of the hub can have."""
    is_valid = REPOSITORY.fullmatch(name) and len(name) <= MAX_REPOSITORY_LENGTH
    if not is_valid or "--" in name or ".." in name or name.endswith(".git"):
        raise ValueError(
            "owner/name, of letters, digits, -, _ and . "
            "(no -- or .., no .git at the end, at most 96 characters)"
        )


def check_repository(name: str | None) -> str | None:
    """Refuse a name that no repository of the hub can have; None is no repository."""
    if name is not None:
        refuse_repository(name)
    return name
