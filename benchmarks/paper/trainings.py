"""Make the trainings that the experiments need, several at the same time."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from benchmarks.paper.answers import compared
from benchmarks.paper.claims import EXPERIMENTS
from benchmarks.paper.study import Base, Study
from orpo_lite.errors import OrpoLiteError

Job = tuple[Base, str, int]
"""A training: its base, its arm and its seed."""


def jobs_of(names: Sequence[str], study: Study) -> list[Job | None]:
    """Return the trainings that the named experiments need. None is the comparison of E5 and E6."""
    jobs: dict[Job | None, None] = {}
    for experiment in map(EXPERIMENTS.__getitem__, names):
        if experiment.is_of_answers:
            jobs[None] = None
        seeds = study.seeds[:1] if experiment.first_seed_only else study.seeds
        jobs |= dict.fromkeys((*arm, seed) for seed in seeds for arm in experiment.arms)
    # It takes longer than any training, so it begins first.
    return sorted(jobs, key=lambda job: job is not None)


def train(job: Job | None, study: Study) -> tuple[int, str]:
    """Make a training or the comparison, in a process of its own. Return exit code and message."""
    torch.set_num_threads(1)
    try:
        if job is None:
            compared(study)
        else:
            base, arm, seed = job
            study.run(arm, seed, base)
    except OrpoLiteError as error:  # Interrupted too
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        return 130, "stopped"
    return 0, ""


def train_all(jobs: Sequence[Job | None], study: Study, processes: int) -> tuple[int, str]:
    """Make all trainings, several at the same time. Return exit code and message of the first
    that fails."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(train, job, study) for job in jobs]):
                code, message = done.result()
                if code:
                    return code, message
        finally:  # also after Ctrl-C: jobs that have not begun must not begin
            pool.shutdown(cancel_futures=True)
    return 0, ""
