"""The command line: parse, call, draw.

Order: console, data_view, plan_view, progress, finish, quiet, completion, commands.
"""

from orpo_lite.cli.commands import main

__all__ = ["main"]
