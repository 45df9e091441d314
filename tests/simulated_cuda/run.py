"""Run something on the simulated device (:mod:`simulated_cuda`), from anywhere:

python tests/simulated_cuda/run.py cli train --recipe demo training.output_dir=RUN
python tests/simulated_cuda/run.py pytest tests/test_gpu.py -q
python tests/simulated_cuda/run.py module benchmarks.gpu --rehearse
"""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(kind: str, *arguments: str) -> None:
    """Install the device, then run the command line, pytest or a module in this process."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    import simulated_cuda

    simulated_cuda.install()
    import torch

    torch.set_num_threads(1)
    if kind == "module":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "pytest":
        import pytest

        sys.exit(pytest.main(["-p", "no:cacheprovider", *arguments]))
    else:
        from orpo_lite.cli import main as command_line

        sys.argv = ["orpo-lite", *arguments]
        command_line()


if __name__ == "__main__":
    main(*sys.argv[1:])
