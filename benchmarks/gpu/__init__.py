"""What only a GPU shows, in eight minutes: ``python -m benchmarks.gpu --minutes 8 --json FILE``.

__main__    the order of the parts, their time limits, the JSON; starts each part as a process of its own
figures     what a part has found, line by line; and the report of all parts
scale       7B shapes, or small ones on the simulated device
base        random bases and pairs on disk
commands    parts that run orpo-lite's commands
steps       parts that run steps in their own process
speed       pairs a second beside TRL's
"""
