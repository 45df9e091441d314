"""The command line: parse, call, draw.

Order: console, data_view, plan_view, progress, finish, quiet, completion, app; further
"""

from orpo_lite.cli import model_commands, setup_commands, train_command  # noqa: F401 - registers
from orpo_lite.cli.app import main

__all__ = ["main"]
