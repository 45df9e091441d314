"""Recipe names work from a checkout, an editable install and a wheel; the wheel holds what it should."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
LIST = (
    "import json, orpo_lite, orpo_lite.recipe.reader as r; "
    "print(json.dumps([orpo_lite.__file__, {name: str(path) for name, path in r.shipped_recipes().items()}]))"
)


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """What Python prints, run in ``cwd`` with ``path`` searched first."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built once and without a network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it."""
    target = tmp_path_factory.mktemp("site")
    options = [
        "--no-deps",
        "--no-index",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(target),
    ]
    python("-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


@pytest.fixture
def editable(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the checkout, and a folder with what an editable install of it by hatchling leaves there."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for folder in ("orpo_lite", "recipes"):
        shutil.copytree(
            ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", checkout)
    shutil.copytree(
        checkout / "recipes", site / "orpo_lite" / "recipes"
    )  # force-include's copy, of that day
    (site / "_editable_impl_orpo_lite.pth").write_text(str(checkout), encoding="utf-8")
    return checkout, site


def test_a_checkout_reads_its_own_recipes(tmp_path: Path) -> None:
    package, recipes = json.loads(python("-c", LIST, cwd=tmp_path, path=ROOT))
    assert package == str(ROOT / "orpo_lite" / "__init__.py")
    assert recipes == {name: str(ROOT / "recipes" / f"{name}.yaml") for name in NAMES}


def is_editable() -> bool:
    """Whether the environment's own orpo-lite is an editable install of this checkout."""
    try:
        text = distribution("orpo-lite").read_text("direct_url.json") or "{}"
    except ModuleNotFoundError:
        return False
    origin = json.loads(text)
    return bool(origin.get("dir_info", {}).get("editable")) and origin["url"] == ROOT.as_uri()


def test_an_editable_install_reads_the_checkout_not_a_stale_copy(tmp_path: Path) -> None:
    if not is_editable():
        pytest.skip("orpo-lite is not installed editable from this checkout")
    package, recipes = json.loads(python("-c", LIST, cwd=tmp_path))
    assert package == str(ROOT / "orpo_lite" / "__init__.py")
    assert recipes == {name: str(ROOT / "recipes" / f"{name}.yaml") for name in NAMES}


def test_a_recipe_added_after_an_editable_install_is_seen_and_no_copy_is_read(
    editable: tuple[Path, Path], tmp_path: Path
) -> None:
    checkout, site = editable
    (checkout / "recipes" / "just-added.yaml").write_text("# Just added\n", encoding="utf-8")
    (checkout / "recipes" / "demo.yaml").unlink()
    # Not through PYTHONPATH, where the .pth file of an editable install is not read; and before any other install.
    enter = f"import site, sys; old = sys.path[:]; sys.path.clear(); site.addsitedir({str(site)!r}); sys.path += old"
    package, recipes = json.loads(python("-c", f"{enter}; {LIST}", cwd=tmp_path))
    assert package == str(checkout / "orpo_lite" / "__init__.py")
    names = sorted({*NAMES, "just-added"} - {"demo"})
    assert recipes == {name: str(checkout / "recipes" / f"{name}.yaml") for name in names}


def test_a_wheel_reads_the_recipes_it_carries(installed: Path, tmp_path: Path) -> None:
    package, recipes = json.loads(python("-c", LIST, cwd=tmp_path, path=installed))
    assert package == str(installed / "orpo_lite" / "__init__.py")
    assert recipes == {
        name: str(installed / "orpo_lite" / "recipes" / f"{name}.yaml") for name in NAMES
    }


def test_a_wheels_command_line_lists_and_shows_them(installed: Path, tmp_path: Path) -> None:
    listed = python("-m", "orpo_lite", "recipes", "ls", cwd=tmp_path, path=installed)
    assert [line.split()[0] for line in listed.splitlines()[1:]] == NAMES
    shown = python("-m", "orpo_lite", "recipes", "show", "demo", cwd=tmp_path, path=installed)
    assert "model_name_or_path: builtin:tiny-llama" in shown


def test_the_wheels_recipes_are_those_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in NAMES:
            text = archive.read(f"orpo_lite/recipes/{name}.yaml")
            assert text == (ROOT / "recipes" / f"{name}.yaml").read_bytes()


def test_the_wheel_holds_the_package_the_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names} - {"orpo_lite"}
        assert info.endswith(".dist-info")
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "orpo_lite").rglob("*.py")}
        recipes = {f"orpo_lite/recipes/{name}.yaml" for name in NAMES}
        ours = {name for name in names if not name.startswith(info)}
        written = {
            "orpo_lite/py.typed",
            "orpo_lite/base/bases.json",
            *(f"orpo_lite/evaluation/report{end}" for end in (".css", ".html", ".js")),
            "orpo_lite/comparing/compare_body.html",
            *(f"orpo_lite/evaluation/report_{part}.html" for part in ("body", "charts")),
            "orpo_lite/recipe/gpu_sizes.json",
        }
        assert ours == modules | recipes | written
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "orpo-lite = orpo_lite.cli:main" in scripts


def test_the_wheel_says_that_it_is_typed(wheel: Path) -> None:
    """The classifier Typing :: Typed promises the marker that type checkers look for (PEP 561)."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        assert ("Typing :: Typed" in archive.read(metadata).decode()) == (
            "orpo_lite/py.typed" in archive.namelist()
        )
