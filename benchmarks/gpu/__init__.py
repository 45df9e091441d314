"""Measure on a GPU, in eight minutes: ``python -m benchmarks.gpu --minutes 8 --json FILE``.

__main__    the order of the parts and their time limits; starts each part in its own process
figures     the figures of a part, line by line, and the report of all parts
scale       7B shapes, or small ones on the simulated device
base        random bases and pairs on disk
commands    parts that run orpo-lite's commands
steps       parts that run steps in their own process
speed       pairs per second, compared with TRL
"""
