"""Take docs/report-desktop.png and docs/report-phone.png: the demo's report in a browser.

python docs/report_pictures.py          trains the demo in a new folder, a minute or two
python docs/report_pictures.py RUN      takes pictures of the report of that run

It needs Chromium, and Playwright of the extra dev.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
SHOTS = {"report-desktop.png": (1280, 1075, "light", 1), "report-phone.png": (390, 1510, "dark", 1)}
"""File -> width and height of the window, colour scheme, pixels of the screen for each of CSS."""


def write_report(run: Path) -> Path:
    """Return the report of a run, written anew."""
    command = [sys.executable, "-m", "orpo_lite", "report", run.name]
    subprocess.run(command, cwd=run.parent, check=True)  # noqa: S603
    return run / "report.html"


def take(report: Path) -> None:
    """Write the pictures."""
    with sync_playwright() as playwright:
        options = {"args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]}
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), **options)
        for name, (width, height, scheme, scale) in SHOTS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                device_scale_factor=scale,
            )
            page = context.new_page()
            page.goto(report.resolve().as_uri())
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.save(DOCS / name, optimize=True)
            context.close()
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "runs", "demo")
        if len(sys.argv) == 1:
            command = [sys.executable, "-m", "orpo_lite", "train", "--recipe", "demo"]
            subprocess.run(command, cwd=folder, check=True)  # noqa: S603
        take(write_report(run))
