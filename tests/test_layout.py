"""The packages keep their order: layers, one place that prints, nothing that runs other people's code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import orpo_lite

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "orpo_lite"
NAMES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)
NAMES.remove("__init__")  # "errors", "ops/head", "data/formats/detect", "data/formats/__init__"
FURTHER = "(further)"
VERBS = ("planning", "training", "evaluation", "merging", "exporting", "publishing")


def read_layers(docstring: str) -> dict[str, int]:
    """The table in the package's docstring: module or package -> layer."""
    layers = {}
    for line in docstring.splitlines():
        if match := re.match(r"(\d)  (.+)", line):
            names = re.split(r" {10,}", match[2])[0]
            layers |= dict.fromkeys(re.findall(r"\w+", names), int(match[1]))
    return layers


LAYERS = read_layers(orpo_lite.__doc__ or "")


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported(module: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it, as "ops/head"; a package as "ops/__init__"."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            dotted = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        else:
            continue
        for name in dotted:
            path = PACKAGE.parent.joinpath(*name.split("."))
            if name.startswith("orpo_lite.") and (
                path.is_dir() or path.with_suffix(".py").is_file()
            ):
                yield name.removeprefix("orpo_lite.").replace(".", "/") + (
                    "/__init__" if path.is_dir() else ""
                )


def members(folder: str) -> set[str]:
    """The modules and packages within a package."""
    inside = PACKAGE / folder
    found = {path.stem for path in inside.glob("*.py")} | {
        path.parent.name for path in inside.glob("*/__init__.py")
    }
    return found - {"__init__"}


def order(folder: str) -> list[str]:
    """The members of a package in the order that its docstring gives, the lowest first.

    ``; further`` behind them says that more may be added on top, which do not import each other.
    """
    said = (ast.get_docstring(tree(f"{folder}/__init__")) or "").partition("Import order: ")[2]
    named, further, _ = said.partition("; further")
    return re.findall(r"\w+", named) + ([FURTHER] if further else [])


def goes_down(name: str, target: str) -> bool:
    """Whether a module may import another: from a layer below, or from before itself in the package of both."""
    above, below = name.split("/"), target.split("/")
    if above[0] != below[0]:
        return LAYERS[below[0]] < LAYERS[above[0]]
    depth = next(
        i for i, (one, other) in enumerate(zip(above, below, strict=False)) if one != other
    )
    if "__init__" in (above[depth], below[depth]):  # a package may hand on what its modules have
        return True
    known = order("/".join(above[:depth]))
    high, low = (one if one in known else FURTHER for one in (above[depth], below[depth]))
    return known.index(low) < known.index(high)


def upward(name: str, targets: Iterator[str]) -> list[str]:
    """The imports of ``name`` that do not go strictly down."""
    return [f"{name} imports {target}" for target in targets if not goes_down(name, target)]


# --- layers


def test_the_table_of_layers_is_read() -> None:
    assert LAYERS["cli"] == LAYERS["__main__"] == 9
    assert LAYERS["ops"] == LAYERS["base"] == 2
    assert LAYERS["errors"] == 0
    assert {LAYERS[verb] for verb in VERBS} == {6}
    assert sorted(set(LAYERS.values())) == list(range(10))


def test_every_module_has_a_layer_and_every_name_is_a_module() -> None:
    assert {name.partition("/")[0] for name in NAMES} == set(LAYERS)


@pytest.mark.parametrize(
    "folder", [name.removesuffix("/__init__") for name in NAMES if name.endswith("/__init__")]
)
def test_a_package_says_the_order_of_its_modules(folder: str) -> None:
    said, are = set(order(folder)), members(folder)
    assert said <= are | {FURTHER}, f"orpo_lite/{folder}/__init__.py"
    assert FURTHER in said or are <= said, f"orpo_lite/{folder}/__init__.py"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__main__"])
def test_imports_go_strictly_down(name: str) -> None:
    assert upward(name, imported(tree(name))) == []


def test_main_is_the_command_line() -> None:
    assert list(imported(tree("__main__"))) == ["cli/__init__"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model/load", "from orpo_lite.training.loop import train_steps"),
        ("training/loop", "from orpo_lite.planning import choose"),
        ("training/loop", "import orpo_lite.cli"),
        ("merging/merge", "def f():\n    from orpo_lite.api import train"),
        ("ops/outputs", "from orpo_lite.ops.head import padded_logps"),
        ("ops/head", "from orpo_lite.data import pairs"),
        ("data/formats/readers", "import orpo_lite.data.pairs"),
        ("data/formats/readers", "from orpo_lite.data.formats.detect import detect_format"),
        ("data/sources/lines", "import orpo_lite.data.sources.find"),
        ("errors", "from orpo_lite.recipe.schema import Recipe"),
    ],
)
def test_an_import_that_goes_up_is_seen(name: str, source: str) -> None:
    assert upward(name, imported(ast.parse(source))) != []


def test_the_operations_know_no_recipe_and_no_files() -> None:
    for name in NAMES:
        if name.startswith("ops/"):
            assert {target.partition("/")[0] for target in imported(tree(name))} <= {"ops"}, name


def test_two_modules_know_accelerate_one_for_processes_and_one_for_trackers() -> None:
    def knows(name: str) -> bool:
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        return bool(
            re.search(r"^\s*(from|import) accelerate\b|is_main_process", text, re.MULTILINE)
        )

    assert [name for name in NAMES if knows(name)] == ["model/parallel", "training/trackers"]


def test_no_file_is_long() -> None:
    lengths = {
        name: len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
        for name in NAMES
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


# --- printing, and other people's code

FORBIDDEN = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
                   "torch.hub.load", "numpy.load", "np.load"}  # fmt: skip
FORBIDDEN_ARGUMENTS = {
    ("shell", True),
    ("trust_remote_code", True),
    ("weights_only", False),
    ("use_safetensors", False),
}


def dotted(node: ast.expr) -> str:
    """torch.load of the expression ``torch.load``; "" of any other kind."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def dangers(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names]
            yield from (n for n in [*modules, *names] if n.partition(".")[0] in FORBIDDEN_MODULES)
            yield from (f"{m}.{n}" for m in modules for n in names if f"{m}.{n}" in FORBIDDEN_CALLS)
        elif isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_CALLS:
            yield dotted(node)
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN:
            yield node.id
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if (node.arg, node.value.value) in FORBIDDEN_ARGUMENTS:
                yield f"{node.arg}={node.value.value}"
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v.value) for k, v in zip(node.keys, node.values, strict=True)
                     if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)]  # fmt: skip
            yield from (f"{k}: {v}" for k, v in pairs if (k, v) in FORBIDDEN_ARGUMENTS)


def prints(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and node.id in ("print", "input"):
            yield node.id
        elif isinstance(node, ast.Attribute) and dotted(node) in ("sys.stdout", "sys.stderr"):
            yield dotted(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            yield from (
                name
                for name in modules
                if name.partition(".")[0] in ("rich", "typer", "tqdm", "click")
            )


@pytest.mark.parametrize("name", ["__init__", *NAMES])
def test_nothing_runs_code_out_of_files(name: str) -> None:
    assert list(dangers(tree(name))) == []


@pytest.mark.parametrize(
    "name", ["__init__", *(name for name in NAMES if not name.startswith("cli/"))]
)
def test_only_the_command_line_prints(name: str) -> None:
    assert list(prints(tree(name))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "from torch import load",
        "import pickle",
        "from pickle import loads",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "eval(x)",
        "exec(x)",
        "run = eval",
        "subprocess.run(x, shell=True)",
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "options = {'use_safetensors': False}",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert list(dangers(ast.parse(source))) != []


@pytest.mark.parametrize(
    "source", ["print(1)", "sys.stdout.write('x')", "from rich import print as p", "import typer"]
)
def test_a_print_is_seen(source: str) -> None:
    assert list(prints(ast.parse(source))) != []


def test_clicks_own_package_is_never_imported() -> None:
    """Typer carries its own click; another one would not know its exceptions."""
    for file in PACKAGE.rglob("*.py"):
        assert not re.search(
            r"^\s*(import|from) click\b", file.read_text(encoding="utf-8"), re.MULTILINE
        ), file


# --- heavy imports, and the tools


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'accelerate', 'pydantic', 'numpy'}"
    code = f"import sys, orpo_lite.cli; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_the_tools_have_nothing_to_say(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
