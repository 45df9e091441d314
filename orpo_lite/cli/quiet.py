"""Keep the messages and progress bars of libraries off the screen."""

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any


def hush() -> None:
    """Make libraries print only errors, in a command that does not import torch.

    Without this call, libraries print a message for each attempt to reach the hub. A command that
    imports torch uses :func:`quiet` instead.
    """
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def is_first_process() -> bool:
    """Return True in the first process of `accelerate launch`. Only this process prints.

    Without `accelerate launch`, the result is True.
    """
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def quiet(*, reads_data: bool = True) -> Iterator[None]:
    """Send the messages of libraries to Python's logging, which writes them to train.log.

    bitsandbytes prints while it is imported. transformers, datasets and peft log messages and draw
    progress bars. The bars of huggingface_hub are kept, because a download may take long.

    Args:
        reads_data: False if the command reads no data. Then the library datasets is not imported.
    """
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(logging.NullHandler())  # without a handler Python prints warnings to stderr
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        _compiling_late(),
    ):
        import bitsandbytes  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loggers: list[Any] = [transformers.utils.logging]
    if reads_data:
        import datasets

        datasets.disable_progress_bars()
        loggers.append(datasets.logging)
    for logger in loggers:
        with contextlib.suppress(AttributeError):
            logger.disable_default_handler()
            logger.enable_propagation()
    yield


@contextlib.contextmanager
def _compiling_late() -> Iterator[None]:
    """Make torch.compile load torch's compiler at the first call of a function that it returned.

    bitsandbytes calls torch.compile while it is imported. To load the compiler takes some seconds,
    and few devices call these functions of bitsandbytes.
    """
    import torch

    compile_now: Any = torch.compile

    def compile_late(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_late, **options)

        @functools.cache
        def compiled() -> Any:
            return compile_now(function, **options)

        @functools.wraps(function)
        def run(*args: Any, **arguments: Any) -> Any:
            return compiled()(*args, **arguments)

        return run

    torch.compile = compile_late  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now
