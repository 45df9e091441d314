"""The processes of a training: what a launch sets in the environment is all there, or nothing of it."""

import pytest
from accelerate import PartialState

from orpo_lite.errors import Command, RecipeError
from orpo_lite.model.parallel import DEVICE, LAUNCH, SHARDED, Processes

WHOLE = {
    "LOCAL_RANK": "0",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCH, *SHARDED, DEVICE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "3"}, "RANK=3 without LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "RANK=0, WORLD_SIZE=2 without LOCAL_RANK"),
        (
            {name: value for name, value in WHOLE.items() if name != "LOCAL_RANK"} | {"RANK": "1"},
            "without LOCAL_RANK",
        ),
        ({"RANK": "first"}, "RANK is not a number"),
        (WHOLE | {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true"),
        (WHOLE | {"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1"),
    ],
)
def test_a_part_of_a_launch_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError) as raised:
        Processes()
    fix = raised.value.fix
    assert found in raised.value.found
    assert isinstance(fix, Command)
    for name in fix.line.removeprefix("unset ").split():
        monkeypatch.delenv(name)
    if not WHOLE.items() <= environment.items():  # else it is a launch, which a test is not
        assert Processes().is_main


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
    ],
)
def test_what_says_nothing_of_several_processes_is_no_launch(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Processes().count == 1


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState._reset_state()
    monkeypatch.setenv(DEVICE, "cuda:97")
    try:
        with pytest.raises(RecipeError, match=f"{DEVICE}=cuda:97") as raised:
            Processes()
    finally:
        PartialState._reset_state()
    assert isinstance(raised.value.fix, Command)
    monkeypatch.delenv(raised.value.fix.line.removeprefix("unset "))
    assert Processes().is_main
