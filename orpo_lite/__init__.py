"""orpo-lite: preference-tune a language model on the one GPU you own.

The house, imports strictly downward (kept by tests/test_house.py):

6  cli (__main__)                                  parse, call, chain the verbs
5  screen                                          what the person sees; the only place that prints
4  train  merge  verify  export  push  plan        one verb a file, each a function that returns a value
3  prepare  proof  planner  gradient  evaluate     for several verbs: what comes before and in a step,
3  generate  checkpoint  demo                      what is said and kept,
3  deltas  exports  card  hub                      what leaves
2  model  run  optimizer  meter  weights  licence  the pair model, run folder, AdamW, a step, stored weights
1  step  data  base                                the maths, pure tensors; rows to batches; the base on disk
0  recipe  errors                                  the schema; the errors people see
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Before any library of theirs is imported: no compiled code from the hub, no usage reports to it.
os.environ.setdefault("USE_HUB_KERNELS", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# On a CPU torch and bitsandbytes each keep a pool of threads; idle ones that spin starve the other pool.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Lazy, so that `orpo-lite --help` does not wait for torch.
_EXPORTS = {
    "load_recipe": "orpo_lite.recipe",
    "plan": "orpo_lite.plan",
    "train": "orpo_lite.train",
    "merge": "orpo_lite.merge",
    "verify": "orpo_lite.verify",
    "export": "orpo_lite.export",
    "push": "orpo_lite.push",
}
__all__ = ["export", "load_recipe", "merge", "plan", "push", "train", "verify"]


class _Package(ModuleType):
    """Importing the file train.py binds the module to the package's name ``train``; keep the verb there instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _EXPORTS:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'orpo_lite' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
