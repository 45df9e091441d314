"""The command line: parse, call, draw.

Order: console, data_view, finish, plan_view, quiet, commands.
"""

from orpo_lite.cli.commands import main

__all__ = ["main"]
