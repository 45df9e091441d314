"""Shell completion of recipe names, recipe keys, run folders and export targets.

``orpo-lite --install-completion`` installs the completion for the current shell. This module does
not import torch, so that completion is fast.
"""

from pathlib import Path

TARGETS = ("gguf", "ollama", "vllm")


def complete_recipe(incomplete: str) -> list[str]:
    """Return names that begin with ``incomplete``: shipped recipes and .yaml files."""
    from orpo_lite.recipe.reader import shipped_recipes

    names = [*shipped_recipes(), *_paths(incomplete, "*.yaml")]
    return [name for name in names if name.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Return the recipe keys that begin with ``incomplete``, each followed by ``=``."""
    from orpo_lite.recipe.schema import KEYS

    keys = [f"{section}.{key}=" for section in KEYS for key in KEYS[section]]
    return [key for key in keys if key.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Return the run folders whose path begins with ``incomplete``.

    If there are none, put ``runs/`` before ``incomplete`` and search again: ``de`` ->
    ``runs/demo``.
    """
    found = _paths(incomplete, "*/recipe.yaml") or _paths(f"runs/{incomplete}", "*/recipe.yaml")
    return [str(Path(path).parent) for path in found]


def complete_run_or_key(incomplete: str) -> list[str]:
    """Return the run folders and the keys of section ``data`` that begin with ``incomplete``."""
    keys = [key for key in complete_key(incomplete) if key.startswith("data.")]
    return [*complete_run(incomplete), *keys]


def complete_target(incomplete: str) -> list[str]:
    """Return the export targets that begin with ``incomplete``."""
    return [name for name in TARGETS if name.startswith(incomplete)]


def _paths(incomplete: str, pattern: str) -> list[str]:
    """Return the paths that match ``pattern`` and begin with ``incomplete``."""
    folder, _, begin = incomplete.rpartition("/")
    start = Path(f"{folder}/" if folder or incomplete.startswith("/") else ".")
    found = (
        path
        for path in start.expanduser().glob(pattern)
        if path.relative_to(start).parts[0].startswith(begin)
    )
    return sorted(str(path) for path in found)
