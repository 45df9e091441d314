"""Run the command line: read the arguments, call the package, print the result.

A module imports only modules that come before it in this list. Import order: console, data_view,
doctor_view, plan_view, progress, finish, quiet, completion, chat_loop, app; further modules come
last. The further modules define commands (example: train_command), and do not import each other.
"""

# Importing one of these modules adds its commands to the application.
import orpo_lite.cli.model_commands
import orpo_lite.cli.result_commands
import orpo_lite.cli.setup_commands
import orpo_lite.cli.train_command  # noqa: F401
from orpo_lite.cli.app import main

__all__ = ["main"]
