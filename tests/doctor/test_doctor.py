"""What doctor finds: each check by its own, a fault as such, and nothing private in the text for an issue."""

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
from conftest import Answer
from hub_server import Hub

from orpo_lite.doctor import run
from orpo_lite.doctor.check import Check
from orpo_lite.doctor.kernels import check_attention, check_four_bit
from orpo_lite.doctor.machine import _has_kernels, check_hub
from orpo_lite.errors import FitError
from orpo_lite.ops.attention import BACKENDS

pytestmark = pytest.mark.usefixtures("counted_once")
Call = Callable[..., Answer]


def test_this_machine_has_no_fault_and_a_recipe_without_its_data_has_one(
    small_recipe: Callable[..., Any], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_recipe()
    code, printed, _ = call("doctor", "--recipe", "./small.yaml", "--json")
    checks = {row["name"]: row for row in json.loads(printed)["checks"]}
    assert code == 0, printed
    assert {"Python", "packages", "torch", "4-bit product", "attention", "RAM", "hub"} <= set(
        checks
    )
    assert "(used)" in checks["attention"]["found"]
    assert checks["base"]["found"] == "./base is on this machine"
    Path("pairs.jsonl").rename("pears.jsonl")
    monkeypatch.setattr(run, "CHECKS", [])
    code, printed, _ = call("doctor", "--recipe", "./small.yaml")
    assert code == FitError.exit_code
    assert re.search(r"^(✗|FAULT) +data .*\n +to do: .*pears\.jsonl", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "1 fault (data), no warnings"
    assert call("doctor", "memory.budget=8GiB")[0] == 2  # of which recipe?


def test_a_wrong_four_bit_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.state for check in check_four_bit()] == ["ok"]
    product = bitsandbytes.matmul_4bit
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda *args, **options: 1.05 * product(*args, **options)
    )
    (check,) = check_four_bit()
    assert check.state == "fault"
    assert "its product is off by 5.0%" in check.found
    assert "its gradient is off by 5.0%" in check.found


def test_wrong_packed_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = bitsandbytes.functional.quantize_4bit

    def wrong(weight: Any, *args: Any, **options: Any) -> Any:
        return quantize(weight.roll(1, 0), *args, **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", wrong)
    (check,) = check_four_bit()
    assert (check.state, "its rounding is off" in check.found) == ("fault", True)


def test_wrong_attention_is_a_fault_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = BACKENDS["flash_cpu"]

    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(BACKENDS, "flash_cpu", lambda *args: 1.01 * used(*args))
    monkeypatch.setitem(BACKENDS, "sdpa", fail)
    found = {check.found.split()[0]: check for check in check_attention()}
    assert found["flash_cpu"].state == "fault"
    assert found["sdpa"].state == "warning"
    assert "no kernel image is available" in found["sdpa"].found
    assert found["correct"].found == "correct on cpu: maths"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_100", "sm_120"], True),
    ],
)
def test_a_gpu_runs_what_was_built_for_it(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    assert _has_kernels(capability, built) is runs


def test_a_check_that_crashes_or_hangs_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> list[Check]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    def hang() -> list[Check]:
        time.sleep(30)
        return []

    last = Check("last", "ok", "well")
    checks = [("crash", crash, 9.0), ("hang", hang, 0.05), ("last", lambda: [last], 9.0)]
    monkeypatch.setattr(run, "CHECKS", checks)
    crashed, hung, well = run.doctor()
    assert (crashed.state, hung.state, well) == ("fault", "fault", last)
    assert "ImportError: libcudart.so.13" in crashed.found
    assert hung.found.startswith("no answer within")


@pytest.mark.parametrize(("role", "state"), [("write", "ok"), ("read", "warning")])
def test_the_rights_of_the_token_are_told_and_not_the_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, role: str, state: str
) -> None:
    token = "hf_" + "Abcd1234" * 4
    monkeypatch.setenv("HF_TOKEN", token)
    hub.grant(role)
    reached, rights = check_hub()
    assert (reached.state, rights.state) == ("ok", state)
    assert rights.found == f"belongs to someone, with {role} access"
    assert token not in str((reached, rights))
    monkeypatch.delenv("HF_TOKEN")
    assert [check.state for check in check_hub()] == ["ok", "ok"]
    hub.stop()
    assert [check.state for check in check_hub()] == ["warning"]
    monkeypatch.setenv("HF_TOKEN", token)
    assert [check.state for check in check_hub()] == ["warning"]


def test_the_text_for_an_issue_holds_no_name_path_or_token(
    small_recipe: Callable[..., Any], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home, user, host = tmp_path / "home" / "annabel", "annabel", socket.gethostname()
    tokens = ["hf_" + "Abcd1234" * 4, "0123456789abcdef" * 2]
    home.mkdir(parents=True)
    variables = {"HOME": str(home), "USER": user, "HF_TOKEN": tokens[0], "WANDB_API_KEY": tokens[1]}
    for name, value in (variables | {"ORPO_LITE_CACHE": str(home / "cache")}).items():
        monkeypatch.setenv(name, value)

    def crash() -> list[Check]:
        raise OSError(f"{host}: {user}@{host} may not read {home}/client/x.csv with {tokens}, ~/x")

    kept = [check for check in run.CHECKS if check[0] in ("packages", "disk")]
    monkeypatch.setattr(run, "CHECKS", [*kept, ("crash", crash, 9.0)])
    small_recipe()
    private = ["data.dataset_name=my-secret-pairs.jsonl", f"training.output_dir={home}/runs"]
    Path("my-secret-pairs.jsonl").write_text("{}\n")
    code, printed, _ = call("doctor", "--recipe", "./small.yaml", *private, "--bug-report")
    assert code == FitError.exit_code
    assert "- FAULT: crash: the check failed: OSError: " in printed
    assert re.search(r"^- ok: packages: orpo-lite .* transformers \d", printed, re.MULTILINE)
    assert "ok: disk, tokens: " in printed
    for secret in (*tokens, user, host, str(home), str(tmp_path), "my-secret", "client", "~/x"):
        assert secret not in printed, printed
