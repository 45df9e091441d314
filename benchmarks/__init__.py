"""Measure what the README claims: ``python -m benchmarks.NAME --json FILE``."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as orpo_lite/__init__.py sets it
