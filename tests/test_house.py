"""The house keeps its order: floors, wings, one place that prints, nothing that runs other people's code."""

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
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NAMES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES]  # "cli", "step/losses"
BASEMENT = {("recipe", "errors")}  # the one import within a floor that is no wing: the schema raises the errors
WINGS = ("step", "data", "planner", "exports", "hub")


def read_floors(docstring: str) -> dict[str, int]:
    """The table in the package's docstring: module or wing -> floor."""
    floors = {}
    for line in docstring.splitlines():
        if match := re.match(r"(\d)  (.+)", line):
            words = re.split(r"  +", match[2])
            modules = words[: next(i for i, word in enumerate(words) if not re.fullmatch(r"\w+( \(\w+\))?", word))]
            names = [name for module in modules for name in re.findall(r"\w+", module)]
            floors |= dict.fromkeys(names, int(match[1]))
    return floors


FLOORS = read_floors(orpo_lite.__doc__ or "")


def room(name: str) -> str:
    """The wing of a module, else the module itself: what the table of floors names."""
    return name.partition("/")[0]


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def imported(module: ast.Module) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it, as "step/losses"; a wing as "step/__init__"."""
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
            if name.startswith("orpo_lite.") and (path.is_dir() or path.with_suffix(".py").is_file()):
                yield name.removeprefix("orpo_lite.").replace(".", "/") + ("/__init__" if path.is_dir() else "")


def wing_order(wing: str) -> list[str]:
    """The modules of a wing in the order that its docstring gives, the lowest first."""
    docstring = ast.get_docstring(tree(f"{wing}/__init__")) or ""
    names = {name.partition("/")[2] for name in NAMES if room(name) == wing} - {"__init__"}
    return list(dict.fromkeys(word for word in re.findall(r"\w+", order_sentence(docstring)) if word in names))


def order_sentence(docstring: str) -> str:
    """The sentence that speaks of the inside of the wing."""
    return next((text for text in re.split(r"\.\s", docstring) if "nside the wing" in text), "")


def upward(name: str, targets: Iterator[str]) -> list[str]:
    """The imports of ``name`` that do not go strictly down."""
    wrong = []
    for target in targets:
        above, below = room(name), room(target)
        if above == below and above in WINGS:
            order = ["__init__", *wing_order(above)]
            own, other = name.partition("/")[2], target.partition("/")[2]
            fine = other == "__init__" or (own in order and other in order and order.index(other) < order.index(own))
        else:
            fine = FLOORS[below] < FLOORS[above] or (name, target) in BASEMENT
        if not fine:
            wrong.append(f"{name} imports {target}")
    return wrong


# --- floors


def test_the_table_of_floors_is_read() -> None:
    assert FLOORS["cli"] == FLOORS["__main__"] == 6
    assert FLOORS["step"] == FLOORS["data"] == 1
    assert FLOORS["errors"] == 0
    assert sorted(set(FLOORS.values())) == [0, 1, 2, 3, 4, 5, 6]


def test_every_module_is_on_a_floor_and_every_name_is_a_module() -> None:
    assert {room(name) for name in NAMES} == set(FLOORS)


def test_every_module_of_a_wing_has_its_place_in_the_wing() -> None:
    for wing in WINGS:
        modules = {name.partition("/")[2] for name in NAMES if room(name) == wing} - {"__init__"}
        assert set(wing_order(wing)) == modules, f"orpo_lite/{wing}/__init__.py says the order of its modules"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__main__"])
def test_imports_go_strictly_down(name: str) -> None:
    assert upward(name, imported(tree(name))) == []


def test_main_is_the_command_line() -> None:
    assert list(imported(tree("__main__"))) == ["cli"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model", "from orpo_lite.train import train"),
        ("train", "from orpo_lite import merge"),
        ("train", "import orpo_lite.cli"),
        ("merge", "def f():\n    from orpo_lite import train"),
        ("step/losses", "from orpo_lite.step.head import padded_logps"),
        ("step/head", "from orpo_lite.data import pairs"),
        ("data/formats", "import orpo_lite.data.pairs"),
        ("errors", "from orpo_lite.recipe import Recipe"),
    ],
)
def test_an_import_that_goes_up_is_seen(name: str, source: str) -> None:
    assert upward(name, imported(ast.parse(source))) != []


def test_the_step_knows_no_recipe_and_no_files() -> None:
    for name in NAMES:
        if room(name) == "step":
            assert {room(target) for target in imported(tree(name))} <= {"step"}, name


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
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in modules if name.partition(".")[0] in ("rich", "typer", "tqdm", "click"))


@pytest.mark.parametrize("name", ["__init__", *NAMES])
def test_nothing_runs_code_out_of_files(name: str) -> None:
    assert list(dangers(tree(name))) == []


@pytest.mark.parametrize("name", ["__init__", *(name for name in NAMES if name not in ("cli", "screen"))])
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


@pytest.mark.parametrize("source", ["print(1)", "sys.stdout.write('x')", "from rich import print as p", "import typer"])
def test_a_print_is_seen(source: str) -> None:
    assert list(prints(ast.parse(source))) != []


def test_clicks_own_package_is_never_imported() -> None:
    """Typer carries its own click; another one would not know its exceptions."""
    assert not re.search(r"^\s*(import|from) click\b", (PACKAGE / "cli.py").read_text(encoding="utf-8"), re.MULTILINE)


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
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
