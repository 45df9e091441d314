"""What the README claims, measured: ``python -m benchmarks.NAME --json FILE``."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as orpo_lite sets it; see there
