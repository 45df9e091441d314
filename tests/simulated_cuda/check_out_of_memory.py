"""The simulated device's memory runs out, in each of its ways, in each part of a run: what is said, done and kept."""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda
from check_training import unplanned  # noqa: F401 - a fixture
from conftest import SMALL, Answer

from orpo_lite.runs.records import read_metrics

Call = Callable[..., Answer]
KINDS = ("allocator", "driver", "cublas")
pytestmark = pytest.mark.usefixtures("unplanned")


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets memory run out in the n-th call of a function, some allocations or products after its beginning."""

    def arrange(kind: str, function: str, *, call: int = 1, after: int = 0) -> None:
        module, _, name = function.rpartition(".")
        honest = getattr(__import__(module, fromlist=[name]), name)
        calls = []

        def failing(*given: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                simulated_cuda.fail(kind, after)
            return honest(*given, **options)

        monkeypatch.setattr(function, failing)

    yield arrange
    simulated_cuda.fail("")


def train(call: Call, *keys: str) -> Answer:
    """Train by the command line; memory must have run out on the way."""
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    keys = (
        "training.learning_rate=1e-2",
        "training.eval_steps=1",
        "training.max_steps=3",
        "output.samples=1",
        *keys,
    )
    answer = call("train", "--recipe", "./small.yaml", *keys)
    assert not simulated_cuda.will_fail(), "memory has not run out"
    return answer


def fix_of(complaint: str) -> list[str]:
    """The line that an error ends with, as words."""
    line = re.search(r"orpo-lite (train --resume .*?)(, to |$)", complaint, re.M)
    assert line, complaint
    return shlex.split(line[1])


def without_fault(answer: Answer) -> Answer:
    """An answer that takes the lack of memory for what it is."""
    code, said, complaint = answer
    for wrong in (
        "Traceback",
        "fault of orpo-lite",
        "its code fails",
        "does not take packed rows",
        "not used:",
    ):
        assert wrong not in said + complaint
    return code, said, complaint


def checkpoints() -> list[int]:
    return sorted(
        int(folder.name.removeprefix("step-")) for folder in Path("run/checkpoints").glob("step-*")
    )


def combined(shown: str, places: Iterable[Any], *, no_product: Collection[Any] = ()) -> list[Any]:
    """Each kind with each place, but cuBLAS where nothing is multiplied; one of them when nothing long is asked for."""
    cases = [
        (kind, place)
        for place in places
        for kind in KINDS
        if kind != "cublas" or place not in no_product
    ]
    first = next(i for i, (kind, _) in enumerate(cases) if kind == shown)
    return [
        case if i == first else pytest.param(*case, marks=pytest.mark.long)
        for i, case in enumerate(cases)
    ]


# (the function in whose n-th call it happens, n, after so many allocations or products, the last checkpoint then)
ENDS = {
    "load": ("orpo_lite.training.session.load_pair_model", 1, 10, []),
    "comparison": ("orpo_lite.training.session.probe", 1, 50, []),
    "first evaluation": ("orpo_lite.training.loop.evaluate", 1, 10, []),
    "update": ("orpo_lite.training.step.update", 2, 0, [1]),
    "later evaluation": ("orpo_lite.training.loop.evaluate", 3, 10, [2]),
}


@pytest.mark.parametrize(
    ("kind", "place"), combined("allocator", ENDS, no_product=("load", "update"))
)
def test_a_run_ends_with_what_to_do_and_goes_on_so(
    kind: str, place: str, out_of_memory: Callable[..., None], call: Call, workspace: Path
) -> None:
    """The line that it prints goes on from the last whole step, and comes to an end."""
    function, number, after, kept = ENDS[place]
    out_of_memory(kind, function, call=number, after=after)
    code, _, complaint = without_fault(train(call))
    assert code == 6
    assert "out of memory" in complaint
    assert ("CUBLAS_STATUS_ALLOC_FAILED" in complaint) == (kind == "cublas")
    assert ("while the weights are loaded" in complaint) == (place == "load")
    assert ("from the last checkpoint" in complaint) == bool(kept)
    assert checkpoints()[-1:] == kept
    assert not Path("run/adapter/adapter_model.safetensors").exists()
    code, _, complaint = call(*fix_of(complaint))
    assert code == 0, complaint
    assert Path("run/merged/config.json").exists()


def test_the_answers_and_then_a_step_run_short(
    out_of_memory: Callable[..., None], call: Call, workspace: Path
) -> None:
    """In one training: the answers cost no adapter, and the step is repeated in smaller pieces."""
    out_of_memory("driver", "orpo_lite.evaluation.samples.Answerer", after=5)
    out_of_memory("cublas", "orpo_lite.training.step.accumulate", call=2)
    code, said, complaint = without_fault(train(call))
    assert code == 0, complaint
    assert "out of memory at step 2: the step is repeated" in said
    assert [row["step"] for row in read_metrics(Path("run")) if "loss" in row] == [1, 2, 3]
    assert "prompts are not answered: CUDA" in said
    assert Path("run/adapter/adapter_model.safetensors").exists()
    assert Path("run/merged/config.json").exists()
    assert Path("run/README.md").exists()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "after"), combined("cublas", [0, 40, 90]))
def test_a_step_is_done_again_in_smaller_pieces(
    kind: str, after: int, out_of_memory: Callable[..., None], call: Call, workspace: Path
) -> None:
    out_of_memory(kind, "orpo_lite.training.step.accumulate", call=2, after=after)
    code, said, complaint = without_fault(train(call))
    assert code == 0, complaint
    assert "out of memory at step 2: the step is repeated" in said
    steps = [row["step"] for row in read_metrics(Path("run")) if "loss" in row]
    assert steps == [1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "after"), combined("driver", [5, 60]))
def test_answers_cost_no_adapter(
    kind: str, after: int, out_of_memory: Callable[..., None], call: Call, workspace: Path
) -> None:
    out_of_memory(kind, "orpo_lite.evaluation.samples.Answerer", after=after)
    code, said, complaint = without_fault(train(call))
    assert code == 0, complaint
    assert "prompts are not answered: CUDA" in said
    assert Path("run/adapter/adapter_model.safetensors").exists()
    assert Path("run/merged/config.json").exists()
    assert Path("run/README.md").exists()


def files(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


LOADS = [("load_base", 1, 5), ("load_pair_model", 2, 5)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "place"), combined("cublas", [*LOADS, ("_score", 1, 20)], no_product=LOADS)
)
def test_verify_says_how_it_can_be_done(
    kind: str,
    place: tuple[str, int, int],
    out_of_memory: Callable[..., None],
    call: Call,
    trained: Any,
) -> None:
    """Of a model that was merged, which takes no memory of the device whatever happens there."""
    name, number, after = place
    simulated_cuda.fail("allocator")
    code, _, complaint = call("merge", "run")
    assert code == 0, complaint
    assert simulated_cuda.will_fail()
    simulated_cuda.fail("")
    before = files("run/merged")
    out_of_memory(kind, f"orpo_lite.evaluation.verify.{name}", call=number, after=after)
    code, _, complaint = without_fault(call("merge", "run", "--verify"))
    assert not simulated_cuda.will_fail()
    assert code == 6
    assert "fix: CUDA_VISIBLE_DEVICES= orpo-lite merge run --verify" in complaint
    assert files("run/merged") == before
    code, _, complaint = call("merge", "run", "--verify")
    assert code == 0, complaint
