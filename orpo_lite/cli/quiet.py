"""Library noise goes to the log, not to the screen."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator


def hush() -> None:
    """Do the same as :func:`quiet` for commands that import none of the slow libraries."""
    for library in (
        "TRANSFORMERS",
        "DATASETS",
        "HF_HUB",
    ):  # they tell of each attempt to reach the hub
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def is_first_process() -> bool:
    """Return whether this process prints: under `accelerate launch` only the first one does."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Library noise goes to the logging tree (and so to the run's train.log), not to the screen.

    bitsandbytes prints while it is imported. transformers, datasets and peft log and draw bars.
    The bars of huggingface_hub stay: a download of gigabytes should be seen.
    """
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.NullHandler())  # without a handler Python prints warnings to stderr
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        import bitsandbytes  # noqa: F401
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for logger in (transformers.utils.logging, datasets.logging):
        with contextlib.suppress(AttributeError):
            logger.disable_default_handler()
            logger.enable_propagation()
    yield
