"""Which objective a recipe asks for. A new one is a file of this package and a name in ``LossSection.type``."""

from importlib import import_module

from orpo_lite.objectives.objective import Objective
from orpo_lite.recipe.schema import LossSection


def find_objective(settings: LossSection) -> Objective:
    """Return the ``OBJECTIVE`` of the file that ``loss.type`` names, with the recipe's settings."""
    objective: Objective = import_module(f"orpo_lite.objectives.{settings.type}").OBJECTIVE(settings)
    return objective
