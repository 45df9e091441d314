"""The command line: read the arguments, call the package, print the result.

Order: console, chat_loop, data_view, doctor_view, plan_view, progress, finish, quiet, completion,
app; further
"""

# Importing one of these modules adds its commands to the application.
import orpo_lite.cli.model_commands
import orpo_lite.cli.result_commands
import orpo_lite.cli.setup_commands
import orpo_lite.cli.train_command  # noqa: F401
from orpo_lite.cli.app import main

__all__ = ["main"]
