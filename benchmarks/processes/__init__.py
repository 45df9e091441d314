"""Compare trainings of several processes on a CPU with those of one: see ``__main__``."""
