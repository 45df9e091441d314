"""What doctor tries on a GPU: the 4-bit product and the kernels of attention, of each generation."""

import pytest
import simulated_cuda

from orpo_lite.doctor.kernels import check_attention, check_four_bit
from orpo_lite.doctor.machine import check_device, check_host_memory
from orpo_lite.ops.attention import BACKENDS


@pytest.mark.parametrize(
    ("capability", "dtype", "used"),
    [
        ((9, 0), "bfloat16", "varlen (used), efficient, sdpa, maths"),
        ((7, 5), "float16", "efficient (used), sdpa, maths"),
    ],
)
def test_the_kernels_of_a_gpu_are_tried(
    capability: tuple[int, int], dtype: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_cuda, "capability", capability)
    (product,) = check_four_bit()
    assert f"correct on cuda, {dtype}" in product.found
    assert [check.found for check in check_attention()] == [f"correct on cuda: {used}"]
    checks = [*check_device(), *check_host_memory()]
    assert dtype in checks[1].found
    assert [check.name for check in checks if check.state == "fault"] == []
    name = used.split()[0]
    right = BACKENDS[name]
    monkeypatch.setitem(BACKENDS, name, lambda *args: 1.1 * right(*args))
    assert [check.state for check in check_attention()] == ["fault", "ok"]
