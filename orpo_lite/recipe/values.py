"""Convert and check values of a recipe.

For an invalid value, a function raises ValueError. The error's text says what is expected.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from orpo_lite.recipe.text import read_bytes


def read_steps(value: object) -> float:
    """Return a float: a share of all steps if it is below 1, otherwise a whole number of steps.

    transformers' TrainingArguments reads its step settings in the same way.
    """
    expected = "a share of all steps below 1 (such as 0.1), or a whole number of steps"
    try:
        steps = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # null, a list or another text
        raise ValueError(expected) from None
    if not 0 <= steps < float("inf") or (steps > 1 and steps != int(steps)):
        raise ValueError(expected)
    return steps


def refuse_zero(value: int) -> int:
    """Return ``value``, a number of steps; -1: as many as the epochs need. Refuse 0."""
    if value == 0:
        raise ValueError("at least one step, or -1 for as many as num_train_epochs needs")
    return value


def expand_home(value: str) -> str:
    """Replace a leading ~ of a path by the home folder: "~/runs" -> "/home/me/runs".

    This is needed because a shell does not replace the ~ in ``KEY=~/runs``.
    """
    path = os.path.expanduser(value)
    if path.startswith("~"):
        user = value.partition("/")[0]
        raise ValueError(
            f"a folder; {user} is not the home folder of a user. "
            f"If the folder's name begins with ~, write ./{value}"
        )
    return path


def read_module_names(value: object) -> object:
    """Split names at commas: "q_proj,v_proj" -> ["q_proj", "v_proj"]. "all-linear" stays a text."""
    if not isinstance(value, str) or value == "all-linear":
        return value
    return _split_at_commas(value)


def read_names(value: object) -> object:
    """Split a text with several names into a list. Return any other value unchanged.

    "a,b" -> ["a", "b"]. The JSON list '["a", "b"]' -> ["a", "b"]. A single name "a" -> "a".

    The path of an existing file or folder is a single name, even if it contains a comma.
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
    """Return the names of trackers as a list without duplicates. "none" and null give []."""
    if value is None or value == "none":
        return []
    names = _split_at_commas(value) if isinstance(value, str) else value
    return list(dict.fromkeys(names)) if isinstance(names, list) else names


def _split_at_commas(value: str) -> list[str]:
    names = [name.strip(" \"'") for name in value.strip("[] ").split(",")]
    return [name for name in names if name]


def to_json_values(value: dict[str, Any]) -> dict[str, Any]:
    """Convert values to JSON types. A date (YAML reads 2024-07-26 as a date) becomes a text."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


# Values of init_lora_weights in peft that change the base's weights.
BASE_CHANGING = {"pissa", "olora", "loftq", "corda", "eva", "lora-ga", "lora"}


def check_lora_init(value: object) -> object:
    """Return the value of init_lora_weights. The text "true" becomes True.

    Refuse methods that change the base's weights, such as PiSSA.
    """
    name = str(value).lower()
    if name.split("_")[0] in BASE_CHANGING:
        raise ValueError(
            f"true, gaussian or orthogonal; {value} changes the base's weights, "
            "so the adapter would not fit another copy of the base"
        )
    return True if name == "true" else value


def check_budget(value: object) -> object:
    """Return a memory budget. It must be "auto" or a size above 0, such as "24GiB"."""
    if isinstance(value, str) and value != "auto" and read_bytes(value) == 0:
        raise ValueError("auto, or a size such as 24GiB")
    return value


def check_attention(value: object) -> object:
    """Return the name of an attention implementation. Refuse the name of a hub repository.

    If the name is a hub repository, transformers downloads compiled code from it and runs the code.
    """
    if isinstance(value, str) and "/" in value:
        raise ValueError(
            "a name without a /, such as sdpa; a name with a / is a hub repository, and compiled "
            "code from the hub is not run"
        )
    return value


# The hub's own client has the same rules.
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII)
MAX_REPOSITORY_LENGTH = 96


def refuse_repository(name: str) -> None:
    """Raise ValueError if ``name`` cannot be the name of a hub repository."""
    is_valid = REPOSITORY.fullmatch(name) and len(name) <= MAX_REPOSITORY_LENGTH
    if not is_valid or "--" in name or ".." in name or name.endswith(".git"):
        raise ValueError(
            "owner/name of at most 96 letters, digits, -, _ and . "
            "(without --, .. or .git at the end)"
        )


def has_form_of_path(name: str) -> bool:
    """Return True if the name of a base or adapter is a path: a hub name has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def is_on_hub(name: str) -> bool:
    """Return True if ``name`` is the owner/name of a hub repository, and not a local folder."""
    is_repository = "/" in name and REPOSITORY.fullmatch(name) is not None
    return is_repository and not Path(name).exists()


def check_repository(name: str | None) -> str | None:
    """Return ``name``, which may be None. Raise ValueError for an invalid repository name."""
    if name is not None:
        refuse_repository(name)
    return name
