"""Make ``python -m orpo_lite`` run the command ``orpo-lite``."""

from orpo_lite.cli import main

if __name__ == "__main__":
    main()
