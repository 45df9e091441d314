"""Write the results of the checks as text for a GitHub issue, without private data."""

import os
import platform
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orpo_lite.doctor.check import Check
from orpo_lite.errors import TOKEN

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL|COOKIE", re.IGNORECASE)
IN_PATH = r"[^\s,;:'\"()\[\]<>|]"
PATH = re.compile(rf"(?<![\w:/.])(?:~[\w-]*)?/{IN_PATH}+")
URL = re.compile(r"https?://(?!huggingface\.co/|pytorch\.org/)[^\s,;'\")]+")
MARKS = {"fault": "FAULT", "warning": "warning", "ok": "ok"}


def bug_report(checks: Sequence[Check]) -> str:
    """Return the results as Markdown for an issue.

    The text contains no access tokens, local paths, private URLs, or user and machine names.
    """
    private = sorted({name for check in checks for name in check.private}, key=len, reverse=True)
    lines = [f"**orpo-lite doctor**, {platform.system()} {platform.machine()}", ""]
    for check in checks:
        text = f"{check.found} (to do: {check.fix})" if check.fix else check.found
        for name in private:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
        lines.append(f"- {MARKS[check.state]}: {check.name}: {' '.join(text.split())}")
    return anonymous("\n".join(lines)) + "\n"


def anonymous(text: str) -> str:
    """Replace access tokens, paths, URLs, and user and machine names in ``text`` by placeholders.

    URLs of huggingface.co and pytorch.org are not replaced.
    """
    secrets = [value for name, value in os.environ.items() if SECRET.search(name)]
    with suppress(Exception):  # the login may have expired, and renewing it may fail
        from huggingface_hub import get_token

        secrets.append(get_token() or "")
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    text = TOKEN.sub("***", text)
    folders = [str(Path.cwd()), str(Path.home()), sys.prefix, *_folders()]
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}{IN_PATH}*", "PATH", text)
    text = PATH.sub("PATH", URL.sub("URL", text))
    for name in _own_names():
        text = re.sub(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])", "NAME", text, flags=re.I)
    return text


def _folders() -> list[str]:
    """Return all folders that are values of environment variables."""
    return [value for value in os.environ.values() if value.startswith("/") and ":" not in value]


def _own_names() -> list[str]:
    """Return the names of the user and of the machine."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0], Path.home().name}
    names |= {os.environ.get(variable, "") for variable in ("USER", "LOGNAME", "SUDO_USER")}
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)
