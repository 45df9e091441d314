"""orpo-lite: preference-tune a language model on the one GPU you own.

The table lists the packages by layer. A package imports only from lower layers: a test,
tests/test_layout.py, checks this.

9  cli (__main__)                                the command line; only this package prints
8  comparing                                     several trainings and a judge of their answers
7  api  doctor                                   tasks that use several packages
6  planning  training  evaluation                one task each; they do not import each other
6  merging  exporting  publishing
5  runs  model                                   the run folder; the model in memory
4  objectives  demo                              losses on pairs; the built-in base and pairs
3  data                                          from rows to pairs, tokens and batches
2  base  ops                                     the base on disk; low-memory tensor operations
1  recipe  updates                               settings; the progress of a running task
0  errors                                        errors that a person can fix
"""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Do not load compiled code from the hub, and do not send usage reports to it. These variables must
# be set before the libraries are imported.
os.environ.setdefault("USE_HUB_KERNELS", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# On a CPU, torch and bitsandbytes have a thread pool each. Without this, idle threads of one pool
# use the CPU in a loop and slow down the other pool.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Forward passes of many lengths fragment the GPU's memory, so that more is used than planned.
# Expandable segments avoid this.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Name -> module. It is imported at the first use, so that `orpo-lite --help` does not import torch.
_EXPORTS = {
    "load_recipe": "orpo_lite.recipe.reader",
    "plan": "orpo_lite.planning.plan",
    "train": "orpo_lite.api",
    "merge": "orpo_lite.merging.merge",
    "generate": "orpo_lite.api",
    "verify": "orpo_lite.api",
    "evaluate": "orpo_lite.evaluation.evaluate",
    "compare": "orpo_lite.comparing.compare",
    "score": "orpo_lite.evaluation.rewards",
    "export": "orpo_lite.exporting.targets",
    "push": "orpo_lite.publishing.push",
    "report": "orpo_lite.evaluation.report",
}
__all__ = [
    "compare",
    "evaluate",
    "export",
    "generate",
    "load_recipe",
    "merge",
    "plan",
    "push",
    "report",
    "score",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'orpo_lite' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
