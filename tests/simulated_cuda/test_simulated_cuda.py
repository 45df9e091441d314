"""What a GPU would show, on a simulated one; in processes of their own, for torch looks for its devices only once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simulated_cuda

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(simulated_cuda.missing()), reason=simulated_cuda.missing())
CHECKS = [
    "check_training.py",
    "check_out_of_memory.py",
    "check_transfers.py",
    "check_families.py",
    "check_doctor.py",
]


@pytest.mark.parametrize("marker", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_all_checks_pass_on_the_simulated_device(marker: str, tmp_path: Path) -> None:
    """All in one process: to start one and to import torch takes longer than most of them."""
    files = [
        *(str(HERE / name) for name in CHECKS),
        *([] if marker == "long" else [str(HERE.parent / "test_gpu.py")]),
    ]
    command = [
        sys.executable,
        str(HERE / "run.py"),
        "pytest",
        "-q",
        "-m",
        marker,
        f"--basetemp={tmp_path}",
        *files,
    ]
    # Not a worker of xdist's, should this process be one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        command,
        env=environment | {"SIM_DEVICES": "2"},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.M)
    assert [line for line in skipped if "flash-attn is not installed" not in line] == []
