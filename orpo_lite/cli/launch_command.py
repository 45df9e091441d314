"""Define the command ``launch``, which starts several processes of ``orpo-lite train``."""

import os
import signal
import sys
from typing import Annotated

import typer

from orpo_lite.cli.app import DURING, LAUNCHED, app
from orpo_lite.cli.console import err
from orpo_lite.errors import Command, RecipeError

SAVE_SECONDS = 3600
"""Seconds to finish and save a step after a signal. torch's default of 30 is less than a step."""


@app.command(
    rich_help_panel=DURING,
    epilog="Example: orpo-lite launch --processes 2 -- train --recipe demo",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def launch(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- train ...", help="The command, as for one GPU."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Number of processes on this machine. Default: its GPUs."
        ),
    ] = None,
    machines: Annotated[int, typer.Option(metavar="M", min=1, help="Number of machines.")] = 1,
    machine_rank: Annotated[
        int, typer.Option(metavar="K", min=0, help="Number of this machine, from 0.")
    ] = 0,
    main_address: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Name or address of machine 0. Needs --machines."),
    ] = None,
    main_port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="A free port of machine 0.")
    ] = 29500,
) -> None:
    """Train with several processes, one for each GPU, on one machine or on several.

    torch's elastic launcher starts them, as under `accelerate launch`. If a process ends with an
    error, the others are stopped, and the first error is the only one that is printed.
    """
    words = words or []
    if not words or words[0] != "train":
        found = f"the command is {words[0]}" if words else "there is no command"
        raise RecipeError(
            where="orpo-lite launch",
            found=found,
            expected="the command train after --",
            fix=Command("orpo-lite launch --processes 2 -- train --recipe demo"),
        )
    if machines > 1 and main_address is None:
        raise RecipeError(
            where="orpo-lite launch",
            found=f"--machines {machines} without --main-address",
            expected="the name or address of machine 0, which the others can reach",
            fix="--main-address HOST",
        )
    if machine_rank >= machines:
        raise RecipeError(
            where="orpo-lite launch",
            found=f"--machine-rank {machine_rank} with --machines {machines}",
            expected=f"a number from 0 to {machines - 1}",
            fix="--machine-rank 0",
        )
    raise typer.Exit(
        run_processes(words, processes, machines, machine_rank, main_address or "", main_port)
    )


def run_processes(
    words: list[str],
    processes: int | None,
    machines: int = 1,
    machine_rank: int = 0,
    main_address: str = "",
    main_port: int = 29500,
) -> int:
    """Run ``orpo-lite`` with ``words`` in several processes. Return the exit code of the first
    that failed, or 0."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    count = processes or max(1, gpus)
    if gpus and count > gpus and "ACCELERATE_USE_CPU" not in os.environ:
        raise RecipeError(
            where=f"--processes {count}",
            found=f"this machine has {gpus} GPUs",
            expected="at most one process for each GPU",
            fix=f"--processes {gpus}",
        )
    if not gpus:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ[LAUNCHED] = "1"
    one_machine = machines == 1
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=count,
        run_id="orpo-lite",
        rdzv_backend="c10d" if one_machine else "static",
        rdzv_endpoint="localhost:0" if one_machine else f"{main_address}:{main_port}",
        rdzv_configs={} if one_machine else {"rank": machine_rank, "timeout": 900},
        max_restarts=0,
        shutdown_timeout=SAVE_SECONDS,
    )
    _hush()
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", "orpo_lite", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            err.print(f"process {rank} was ended by {name}; the other processes are stopped")
            again = f"orpo-lite launch --processes {count} -- train --resume RUN"
            err.print(f"fix: {again}, where RUN is the run's folder")
            return 128 - failure.exitcode
        return int(failure.exitcode)  # the process has said why
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _hush() -> None:
    """Keep the launcher's own messages off the screen: each process reports its error itself."""
    import logging

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
