"""Draw docs/demo.svg: what `orpo-lite train --recipe demo` prints at its end.

python docs/demo_picture.py             trains the demo in a new folder, a minute or two
python docs/demo_picture.py FILE        draws what an earlier run printed into FILE
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ["train", "--recipe", "demo"]
TARGET = Path(__file__).with_name("demo.svg")
COLUMNS = 100


def run_demo() -> str:
    """Return what the command prints, run in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orpo_lite", *COMMAND]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return done.stdout


def result_of(printed: str) -> str:
    """Return the part that shows the result: from the line of the kept adapter on."""
    return printed[printed.index("adapter of step") :].rstrip()


def draw(printed: str) -> str:
    """Return the picture as SVG."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(Text(f"$ orpo-lite {' '.join(COMMAND)}", style="bold"))
        console.print(Text("..."))
        console.print(Text(result_of(printed)))
        return console.export_svg(title="orpo-lite", unique_id="demo")


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else run_demo()
    TARGET.write_text(draw(text), encoding="utf-8")
