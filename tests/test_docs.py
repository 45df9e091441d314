"""Every command of README.md, CONTRIBUTING.md and docs/ runs, or its fence says why not.

A fence is marked by the words behind its language:

- ``sh``, ``python``: run, in the order of the page, in one folder. ``not run: REASON`` leaves it
  out. ``in the copy``: by a copy of the package with the page's changes.
- ``console``: a command after ``$``, and the end of what it prints, exactly.
- ``text output``: lines of what the fence before printed; figures may differ.
- ``NAME file: PATH`` is written to a file. ``diff apply: PATH`` changes a file of the copy.

Other fences are only shown, and hold no command.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Answer, DemoRun, moved_run, write_base

import orpo_lite

pytestmark = pytest.mark.usefixtures("counted_once")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
SLOW = {  # they train several times; the first runs each example in a copy of the package
    "docs/extending.md",
    "docs/training.md",
    "docs/troubleshooting.md",
    "docs/generate-and-chat.md",
    "docs/after-training.md",
}
SHOWN_ONLY = ("text", "yaml", "{toctree}")
DEMO = "train --recipe demo"
FENCE = re.compile(r"^( *)```(\S*) *(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    language: str
    mark: str
    text: str
    where: str

    @property
    def reason(self) -> str:
        """Why it is not run."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def fences(page: Path) -> Iterator[Fence]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent, language, mark, body = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        where = f"{page.relative_to(ROOT)}:{line}"
        yield Fence(
            language, mark.strip(), re.sub(f"^{indent}", "", body, flags=re.MULTILINE), where
        )


def unexplained(fence: Fence) -> str:
    """Return what is wrong with a fence that neither runs nor says why not; "" where nothing is."""
    if fence.language in ("sh", "python"):
        if fence.mark.startswith("not run"):
            return "" if len(fence.reason) > 10 else "not run, without a reason"
        if (
            fence.mark.startswith("file: ")
            or fence.mark in ("", "in the copy")
            or re.fullmatch(r"exits \d+", fence.mark)
        ):
            others = [
                line
                for line in fence.commands
                if fence.language == "sh" and not line.startswith("orpo-lite ")
            ]
            return f"has no runner for {others[0]!r}" if others else ""
        return f"is marked {fence.mark!r}, which nothing runs"
    if (
        fence.language == "console"
        or fence.mark == "output"
        or fence.mark.startswith(("file: ", "apply: "))
    ):
        return ""
    if fence.language not in SHOWN_ONLY or re.search(
        r"^\$? ?(orpo-lite|python|pip) ", fence.text, re.MULTILINE
    ):
        return f"of {fence.language!r} has no runner"
    return ""


def test_every_fence_runs_or_says_why_not() -> None:
    found = [fence for page in PAGES for fence in fences(page)]
    assert len(found) > 50
    assert [f"{fence.where} {why}" for fence in found if (why := unexplained(fence))] == []
    ticks = sum(page.read_text("utf-8").count("```") for page in PAGES)
    assert ticks == 2 * len(found), "a fence that is not read here"


@pytest.mark.parametrize(
    ("language", "mark", "text"),
    [
        ("sh", "", "pip install x\n"),
        ("sh", "not run:", "ls\n"),
        ("sh", "later", "orpo-lite recipes ls\n"),
        ("python", "not run: no", "1\n"),
        ("bash", "", "orpo-lite recipes ls\n"),
        ("", "", "ls\n"),
        ("text", "", "$ orpo-lite data\n"),
    ],
)
def test_a_fence_that_nothing_runs_is_found(language: str, mark: str, text: str) -> None:
    assert unexplained(Fence(language, mark, text, "page:1"))


class Runner:
    """Runs the fences of one page in the current folder."""

    def __init__(self, call: Callable[..., Answer], demo_printed: str) -> None:
        self.call = call
        self.demo_printed = demo_printed
        self.printed = ""
        self.copy = Path("copy").resolve()

    def run(self, fence: Fence) -> None:
        if fence.reason:
            return
        if fence.mark.startswith("file: "):
            self.write(fence.mark.removeprefix("file: "), fence.text)
        elif fence.mark.startswith("apply: "):
            self.apply(fence)
        elif fence.language == "sh":
            self.printed = ""
            for command in fence.commands:
                run = self.in_copy if fence.mark == "in the copy" else self.in_process
                ended, printed, complaint = run(shlex.split(command, comments=True)[1:])
                self.printed += printed
                assert ended == 0, f"{fence.where} {command}: {ended}\n{printed}\n{complaint}"
        elif fence.language == "python":
            Path("fence.py").write_text(fence.text, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                runpy.run_path("fence.py")
            self.printed = output.getvalue()
        elif fence.language == "console":
            command, _, expected = fence.text.partition("\n")
            ended, printed, complaint = self.in_process(shlex.split(command)[2:])
            assert (printed if ended == 0 else complaint).strip().endswith(expected.strip()), (
                fence.where
            )
        elif fence.mark == "output":
            real = [loose(line) for line in self.printed.splitlines()]
            lacking = [
                line for line in fence.text.splitlines() if line.strip() and loose(line) not in real
            ]
            assert lacking == [], f"{fence.where}: not printed\n{self.printed}"

    def in_process(self, arguments: list[str]) -> Answer:
        if shlex.join(arguments) == DEMO:  # this very command was run for all tests
            return 0, self.demo_printed, ""
        return self.call(*arguments)

    def in_copy(self, arguments: list[str]) -> Answer:
        environment = os.environ | {"PYTHONPATH": str(self.copy)}
        command = [sys.executable, "-P", "-m", "orpo_lite", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def copied(self) -> Path:
        if not self.copy.exists():
            package = Path(orpo_lite.__file__).parent
            shutil.copytree(
                package, self.copy / "orpo_lite", ignore=shutil.ignore_patterns("__pycache__")
            )
            shutil.copytree(
                ROOT / "recipes", self.copy / "orpo_lite" / "recipes", dirs_exist_ok=True
            )
        return self.copy

    def write(self, name: str, text: str) -> None:
        path = (self.copied() if name.startswith("orpo_lite/") else Path()) / name
        path.write_text(text, encoding="utf-8")

    def apply(self, fence: Fence) -> None:
        path = self.copied() / fence.mark.removeprefix("apply: ")
        lines = fence.text.splitlines()
        before, after = (
            "\n".join(line[1:] for line in lines if line[0] == sign) + "\n" for sign in "-+"
        )
        text = path.read_text(encoding="utf-8")
        assert text.count(f"\n{before}") == 1, (
            f"{fence.where}: the lines before are not in {path.name}, or not once"
        )
        path.write_text(text.replace(f"\n{before}", f"\n{after}"), encoding="utf-8")


def loose(line: str) -> str:
    """Return a line without its figures and the spaces that they need."""
    return re.sub(r"[+-]?\d[\d.,]*(e-?\d+)?", "0", " ".join(line.split()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in NAMES],
)
def test_a_page_runs_from_top_to_bottom(
    name: str,
    demo_run: DemoRun,
    call: Callable[..., Answer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = list(fences(ROOT / name))
    if all(fence.reason or fence.language in SHOWN_ONLY for fence in page):
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    moved_run(demo_run, tmp_path)
    write_base(tmp_path / "my-base")
    runner = Runner(call, demo_run.printed)
    for fence in page:
        runner.run(fence)


# --- links


def test_every_link_to_a_file_or_heading_leads_somewhere() -> None:
    dead = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.is_file() or (heading and heading not in headings(file)):
                dead.append(f"{page.name}: {target}")
    assert dead == []


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub and MyST make of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")):
        pytest.skip("the extra docs is not installed")
    command = [
        sys.executable,
        "-P",
        "-m",
        "sphinx",
        "-W",
        "-n",
        "-q",
        str(ROOT / "docs"),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- pictures, notebook, help


def module(name: str) -> dict[str, object]:
    return runpy.run_path(str(ROOT / "docs" / f"{name}.py"))


def test_the_picture_of_the_demo_is_what_it_prints(demo_run: DemoRun) -> None:
    made = module("demo_picture")
    real, committed = (
        made["draw"](demo_run.printed),
        (ROOT / "docs" / "demo.svg").read_text("utf-8"),
    )  # type: ignore[operator]
    labels = ("reward", "accuracy", "log-prob", "rejected", "before", "after", "prompt")
    words = [re.findall(r"[a-z-]{4,}", re.sub("<[^>]+>", " ", text)) for text in (real, committed)]
    assert all(
        label in words[1] and words[0].count(label) == words[1].count(label) for label in labels
    )


def test_the_picture_of_the_layers_is_the_docstrings() -> None:
    made = module("architecture")
    drawn = made["draw"](made["read_layers"]())  # type: ignore[operator]
    assert (ROOT / "docs" / "architecture.svg").read_text("utf-8") == drawn


def test_the_notebook_is_one_and_its_code_compiles() -> None:
    notebook = json.loads((ROOT / "docs" / "gpu.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4
    for text in code:
        compile(text, "gpu.ipynb", "exec")


@pytest.mark.long
def test_the_notebooks_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_run: DemoRun
) -> None:
    """All cells behind the installation, with the demo in place of a model of the hub."""
    monkeypatch.chdir(tmp_path)
    moved_run(demo_run, tmp_path)
    notebook = json.loads((ROOT / "docs" / "gpu.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = "\n".join(code[1:]).replace("max_steps=30", 'max_steps=3", "training.eval_steps=3')
    text = text.replace('"smollm2-135m"', '"demo"')
    Path("cells.py").write_text(text, encoding="utf-8")
    runpy.run_path("cells.py")
    assert Path("runs/notebook/merged/config.json").is_file()


@pytest.mark.long
def test_every_help_has_an_example_that_runs(
    call: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_run: DemoRun
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    moved_run(demo_run, tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "Any tips?"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Any tips?\n"))  # for the chat
    runner = Runner(call, demo_run.printed)
    verbs = [["recipes", verb] for verb in ("ls", "show", "cp")]
    for verb in (
        [],
        *verbs,
        *([name] for name in ("data", "plan", "doctor", "train", "eval", "report")),
        *([name] for name in ("generate", "chat", "merge", "export", "push")),
    ):
        code, said, _ = call(*verb, "--help")
        (example,) = re.findall(r"Example: orpo-lite (.+)", said)
        assert code == 0
        assert example.split()[: len(verb)] == verb
        if verb != ["push"]:  # test_push.py has the hub that it needs
            ended, _, complaint = runner.in_process(shlex.split(example.strip()))
            assert ended == 0, complaint
