"""Check whether this machine can train, and whether it can train a given recipe.

Heavy libraries are imported inside the checks. If a library is broken, only the check that imports
it reports a fault. The other checks still run.

Import order: check, kernels, machine, run, bug_report.
"""
