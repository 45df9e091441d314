"""Run all checks of the machine. If a recipe is given, check the recipe too."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from orpo_lite.doctor.check import Check, Checks, run_check
from orpo_lite.doctor.kernels import check_attention, check_four_bit
from orpo_lite.doctor.machine import (
    check_device,
    check_disk_space,
    check_host_memory,
    check_hub,
    check_packages,
    free_ram,
)
from orpo_lite.recipe.schema import Recipe
from orpo_lite.updates import Update, run_to_end

TIME_LIMIT = 60.0  # seconds per check; a driver or a network may never answer
HUB_LIMIT = 20.0
PLAN_LIMIT = 600.0

CHECKS: list[tuple[str, Callable[[], Checks], float]] = [
    ("packages", check_packages, TIME_LIMIT),
    ("GPU", check_device, TIME_LIMIT),
    ("4-bit product", check_four_bit, TIME_LIMIT),
    ("attention", check_attention, TIME_LIMIT),
    ("memory", check_host_memory, TIME_LIMIT),
    ("disk", check_disk_space, TIME_LIMIT),
    ("hub", check_hub, HUB_LIMIT),
]
"""The checks in their order: name, function, and time limit in seconds."""


def doctor(recipe: Recipe | None = None) -> list[Check]:
    """Check this machine, and whether it can train ``recipe``.

    Weights and datasets are not downloaded. The base's config.json may be downloaded.
    """
    return run_to_end(doctor_events(recipe), lambda _: None)


def doctor_events(recipe: Recipe | None = None) -> Generator[Update, None, list[Check]]:
    """Yield the progress of :func:`doctor`; finally return its result."""
    found: list[Check] = []
    for name, check, limit in CHECKS:
        yield Update("stage", f"checking: {name}")
        found += run_check(name, check, limit)
    if recipe is not None:
        is_online = all(check.state == "ok" for check in found if check.name == "hub")
        yield Update("stage", "checking: recipe")
        checks = run_check("recipe", partial(check_recipe, recipe, is_online=is_online), PLAN_LIMIT)
        private = _private_names(recipe)
        found += [replace(check, private=private) for check in checks]
    return found


def check_recipe(recipe: Recipe, *, is_online: bool) -> Iterator[Check]:
    """Check that the recipe fits this machine, and that its base and data can be read.

    A base or dataset that is only on the hub is not downloaded, but the hub must be reachable.

    ``is_online``: True if the hub answers or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    from orpo_lite.planning.fit import does_not_fit
    from orpo_lite.planning.plan import plan
    from orpo_lite.recipe.text import gib

    can_download = is_online and not constants.is_offline_mode()
    for name, check in CHECKS_OF_RECIPE:
        yield from run_check(name, partial(check, recipe, can_download), TIME_LIMIT)
    report = plan(recipe)
    needed = f"{gib(report.plan.needed)} of GPU memory"
    if report.plan.fits and report.local is None and recipe.memory.budget == "auto":
        yield Check("plan", "ok", f"needs {needed}; this machine has no GPU to compare with")
    elif report.plan.fits:
        yield Check("plan", "ok", f"fits: needs {needed} (limit: {gib(report.plan.budget or 0)})")
    else:
        error = does_not_fit(report.plan, report.changes)
        yield Check("plan", "fault", f"does not fit: {error.found}", error.fix)
    if report.plan.measured.host > free_ram():
        found = (
            f"needs {gib(report.plan.measured.host)} of RAM, but only {gib(free_ram())} are free"
        )
        yield Check("plan", "warning", found, "end other programs, or train on a smaller base")


def _check_trackers(recipe: Recipe, _can_download: bool) -> Iterator[Check]:
    """Check that the trackers in ``training.report_to`` can be used, as the training does."""
    from orpo_lite.training.trackers import check_trackers

    if recipe.training.report_to:
        check_trackers(recipe)
        yield Check("trackers", "ok", ", ".join(recipe.training.report_to))


def _private_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the private names in a recipe, such as its data, local base and run folder."""
    from orpo_lite.base.adapter import named_adapters

    names = [*recipe.data.names, recipe.data.dataset_test_split, recipe.training.output_dir]
    if Path(recipe.model.model_name_or_path).exists():
        names.append(recipe.model.model_name_or_path)
    names += [*named_adapters(recipe).values(), recipe.output.hub_model_id]
    return tuple(name for name in names if name and not name.startswith("builtin:"))


def _check_base(recipe: Recipe, can_download: bool) -> Iterator[Check]:
    """Check that the base is on this machine, or can be downloaded."""
    from orpo_lite.base.download import TEXT, WEIGHTS, find_cached, manual_download
    from orpo_lite.base.find import find_base, weight_files
    from orpo_lite.data.sources.source import is_local

    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    if name.startswith("builtin:"):
        yield Check("base", "ok", f"{name} is generated on this machine")
        return
    if is_local(name):
        find_base(name, revision)
        yield Check("base", "ok", f"{name} is on this machine")
        return
    folder = find_cached(name, revision, [*TEXT, *WEIGHTS])
    is_cached = folder is not None and all(file.is_file() for file in weight_files(folder))
    yield _describe_repository(
        "base", name, is_cached, can_download, manual_download(name, revision)
    )


def _check_data(recipe: Recipe, can_download: bool) -> Iterator[Check]:
    """Check that each dataset is on this machine, or can be downloaded."""
    import datasets

    from orpo_lite.data.sources.local import find_files
    from orpo_lite.data.sources.source import TRAIN_SPLIT, is_local

    for name in recipe.data.names:
        if name.startswith("builtin:"):
            yield Check("data", "ok", f"{name} is generated on this machine")
        elif is_local(name):
            find_files(name, recipe.data.dataset_train_split, TRAIN_SPLIT)
            yield Check("data", "ok", f"{name} is on this machine")
        else:
            cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()
            fix = f"on a connected machine: hf download --repo-type dataset {name}"
            yield _describe_repository("data", name, cached.is_dir(), can_download, fix)


def _describe_repository(
    check: str, name: str, is_cached: bool, can_download: bool, fix: str
) -> Check:
    if is_cached:
        return Check(check, "ok", f"{name} is in the cache")
    if can_download:
        return Check(check, "ok", f"{name} will be downloaded")
    return Check(check, "fault", f"{name} is not in the cache, and it cannot be downloaded", fix)


CHECKS_OF_RECIPE: list[tuple[str, Callable[[Recipe, bool], Iterator[Check]]]] = [
    ("base", _check_base),
    ("data", _check_data),
    ("trackers", _check_trackers),
]
"""The checks of a recipe in their order: name and function."""
