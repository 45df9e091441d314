"""Run the command line: read the arguments, call the package, print the result.

Import order: console, data_view, doctor_view, plan_view, progress, finish, quiet, completion,
chat_loop, app; further modules define commands, such as train_command. A module of the list imports
only modules that come before it in the list. The modules with commands do not import each other.
"""

# Importing one of these modules adds its commands to the application.
import orpo_lite.cli.compare_command
import orpo_lite.cli.launch_command
import orpo_lite.cli.model_commands
import orpo_lite.cli.result_commands
import orpo_lite.cli.setup_commands
import orpo_lite.cli.train_command  # noqa: F401
from orpo_lite.cli.app import main

__all__ = ["main"]
