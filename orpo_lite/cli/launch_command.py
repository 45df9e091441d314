"""Define the command ``launch``, which starts several processes of ``orpo-lite train``."""

import os
import shlex
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import typer
from typer.core import TyperGroup

from orpo_lite.cli.app import DURING, app, choose_recipe
from orpo_lite.cli.console import err
from orpo_lite.errors import Command, LostProcessError, RecipeError, first_line

SAVE_SECONDS = 3600
"""Seconds to finish and save a step after a signal. torch's default of 30 is less than a step."""


@app.command(
    rich_help_panel=DURING,
    epilog="Example: orpo-lite launch --processes 2 -- train --recipe demo",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def launch(
    context: typer.Context,
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
    if words and words[0].startswith("-"):
        raise RecipeError(
            where="orpo-lite launch",
            found=f"{words[0]} is not one of its options",
            expected="its own options, then -- and the command train with its words",
            fix=Command("orpo-lite launch --help"),
        )
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
    if machines == 1 and (machine_rank or main_address):
        option = "--machine-rank" if machine_rank else "--main-address"
        raise RecipeError(
            where="orpo-lite launch",
            found=f"{option} without --machines",
            expected="the number of machines",
            fix="--machines 2",
        )
    if machine_rank >= machines:
        raise RecipeError(
            where="orpo-lite launch",
            found=f"--machine-rank {machine_rank} with --machines {machines}",
            expected=f"a number from 0 to {machines - 1}, another one on each machine",
            fix=f"--machines {machine_rank + 1}",
        )
    # The words are read here too, so that a wrong recipe is reported once and at once.
    command = cast(TyperGroup, typer.main.get_command(app)).commands["train"]
    parsed = command.make_context("train", [*words[1:]], parent=context.parent)
    chosen = choose_recipe(
        parsed.params["recipe"],
        parsed.params["resume"],
        parsed.params["overrides"] or [],
        command="launch --processes 2 -- train",
    )
    from orpo_lite.model.parallel import check_processes

    count = _count_processes(processes)
    check_processes(chosen, count * machines)
    if parsed.params["dry_run"]:
        command.invoke(parsed)
        return
    if main_address:
        _check_address(main_address, main_port, is_own=machine_rank == 0)
    launched = Launch(count, machines, machine_rank, main_address or "", main_port)
    raise typer.Exit(launched.run(words, Path(chosen.training.output_dir)))


@dataclass(frozen=True)
class Launch:
    """The processes of a training on this machine, and its place among the machines."""

    processes: int
    machines: int
    machine_rank: int
    main_address: str
    main_port: int

    @property
    def command(self) -> str:
        """The shell command that launches as many processes, up to the word train."""
        words = ["orpo-lite", "launch", "--processes", str(self.processes)]
        if self.machines > 1:
            words += ["--machines", str(self.machines), "--machine-rank", str(self.machine_rank)]
            words += ["--main-address", self.main_address, "--main-port", str(self.main_port)]
        return shlex.join([*words, "--"])

    def run(self, words: Sequence[str], path: Path) -> int:
        """Run ``orpo-lite`` with ``words`` in each process.

        If a process fails, the others are stopped, and the first error is printed. A process that
        is killed is reported with the command that continues the run in the folder ``path``.

        Returns:
            The exit code of the first process that failed, or 0.
        """
        from torch.distributed import DistError
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from orpo_lite.runs.commands import LAUNCHER, resume_command

        threads = max(1, (os.cpu_count() or 1) // self.processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ[LAUNCHER] = self.command
        one = self.machines == 1
        config = LaunchConfig(
            min_nodes=self.machines,
            max_nodes=self.machines,
            nproc_per_node=self.processes,
            run_id="orpo-lite",
            rdzv_backend="c10d" if one else "static",
            rdzv_endpoint="localhost:0" if one else f"{self.main_address}:{self.main_port}",
            rdzv_configs={} if one else {"rank": self.machine_rank, "timeout": 900},
            max_restarts=0,
            shutdown_timeout=SAVE_SECONDS,
        )
        _hush()
        if not one:
            err.print(f"waiting for {self.machines} machines at {config.rdzv_endpoint} ...")
        try:
            elastic_launch(config, entrypoint=sys.executable)("-m", "orpo_lite", *words)
        except ChildFailedError as error:
            failed = error.failures.items()
            # A process that wrote no error has other data, without a time.
            told = {rank: found for rank, found in failed if "timestamp" in found.error_file_data}
            if told:
                rank = min(told, key=lambda n: (told[n].timestamp, n))
                err.print(told[rank].message)
                # The launcher may have ended the process by a signal after it wrote this.
                return int(told[rank].error_file_data["exit_code"])
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                if failure.exitcode == LostProcessError.exit_code and not one:
                    err.print("a process of another machine ended; see what was printed there")
                return int(failure.exitcode)
            name = signal.Signals(-failure.exitcode).name
            err.print(f"process {rank} was ended by {name}; the other processes are stopped")
            if (path / "lock.json").is_file():
                again = resume_command(path)
            else:  # nothing was trained yet
                again = Command(f"{self.command} {shlex.join(words)}")
            err.print(f"  fix: {again}")
            return 128 - failure.exitcode
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except (RendezvousError, DistError) as error:
            raise RecipeError(
                where="orpo-lite launch",
                found=f"the machines did not find each other ({first_line(error)})",
                expected=f"this command on each of {self.machines} machines within 15 minutes, "
                "with another --machine-rank",
                fix="check --main-address and --main-port, and that machine 0 can be reached there",
            ) from error
        return 0


def _count_processes(wanted: int | None) -> int:
    """Return the number of processes of this machine. Raise RecipeError if it has fewer GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    count = wanted or max(1, gpus)
    if gpus and count > gpus and "ACCELERATE_USE_CPU" not in os.environ:
        raise RecipeError(
            where=f"--processes {count}",
            found=f"this machine has {gpus} GPUs",
            expected="at most one process for each GPU",
            fix=f"--processes {gpus}",
        )
    if not gpus:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return count


def _hush() -> None:
    """Keep the launcher's own messages off the screen: it prints the errors of the processes."""
    import logging

    names = [name for name in logging.root.manager.loggerDict if "torch.distributed" in name]
    for name in ("torch.distributed", *names):  # torch sets a level for each of them
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _check_address(host: str, port: int, *, is_own: bool) -> None:
    """Raise RecipeError if machine 0 has no address, or if its port is in use.

    ``is_own``: whether this is machine 0.
    """
    try:
        socket.getaddrinfo(host, port)
        if is_own:
            with socket.create_server(("", port)):
                pass
    except socket.gaierror as error:
        raise RecipeError(
            where=f"--main-address {host}",
            found=f"no such host ({error.strerror})",
            expected="the name or address of machine 0, which the others can reach",
            fix="--main-address HOST",
        ) from error
    except OSError as error:
        raise RecipeError(
            where=f"--main-port {port}",
            found=f"the port cannot be used ({error.strerror})",
            expected="a free port of machine 0, the same on all machines",
            fix=f"--main-port {port + 1 if port < 65535 else 29500}",
        ) from error
