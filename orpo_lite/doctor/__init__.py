"""Check whether this machine can train, and a recipe on it.

Heavy libraries are imported inside the checks. A broken one is then the fault of its check, and the
others still run. Order: check, kernels, machine, run, bug_report.
"""
