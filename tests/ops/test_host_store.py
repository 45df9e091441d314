"""Checkpoints in host memory: when device memory is given back, and how much host memory they take."""

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_lite.ops import layers
from orpo_lite.ops.devices import META
from orpo_lite.ops.layers import HostPool, HostStore
from orpo_lite.planning.meter import LiveBytes

MIB = 2**20


def chain(store: HostStore, count: int, *shape: int) -> Tensor:
    """``count`` products, each of which saves its own input."""
    x = torch.empty(*shape, device=META, requires_grad=True)
    with store.saving():
        for _ in range(count):
            x = x.cos()
    return x.sum()


def test_device_memory_is_given_back_after_its_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source and each copy from the host outlives the wait for its event; few are on the device at a time."""
    log: list[tuple[str, int]] = []
    started = iter(range(1_000))
    alive, most = 0, 0

    def start(_copies: Any, to: Tensor, source: Tensor) -> int:
        nonlocal alive, most
        number, device = next(started), source if layers_is_source(source) else to
        alive += 1
        most = max(most, alive)

        def freed() -> None:
            nonlocal alive
            alive -= 1
            log.append(("freed", number))

        weakref.finalize(device.untyped_storage(), freed)
        return number

    def layers_is_source(tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() == 4096

    monkeypatch.setattr(layers._Copies, "start", start)
    monkeypatch.setattr(
        layers._Copies, "wait", lambda _self, event, _device: log.append(("waited", event))
    )
    loss = chain(HostStore(6), 6, 1024)
    assert most == layers.LEAVING + 2  # one that is copied now, and the leaf, which autograd holds
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    copies = next(started)
    assert copies == 6 + 4  # the last two had not left yet
    for number in range(copies):
        assert log.index(("waited", number)) < log.index(("freed", number)), number


def test_a_pass_that_is_given_up_waits_for_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(layers._Copies, "start", lambda *_: 7)
    monkeypatch.setattr(layers._Copies, "wait", lambda _self, event, _device: waited.append(event))
    store = HostStore(1)
    loss = chain(store, 1, 1024)
    assert waited == []
    del loss
    assert waited == [7]
    assert store._pool.used == 0


@pytest.mark.parametrize("size", [24 * MIB, 30 * MIB + 1, 33 * MIB])
def test_pinned_slabs_waste_little(size: int) -> None:
    """Slabs are powers of two, which torch does not round up; alone these would take up to twice their size."""
    pool, tensor = HostPool(), torch.empty(size, dtype=torch.uint8, device=META)
    places = [pool.place_for(tensor, 32 - number) for number in range(32)]
    slabs = [len(slab.memory_B) for slab in pool._slabs]
    assert all(slab & (slab - 1) == 0 for slab in slabs)
    assert sum(slabs) < 1.1 * 32 * size
    spans = sorted((id(place.slab), place.start) for place in places)
    assert all(a != c or d - b >= size for (a, b), (c, d) in pairwise(spans))
    for place in places:
        place.give_back()
    assert [pool.place_for(tensor, 32 - number).slab for number in range(32)]
    assert [len(slab.memory_B) for slab in pool._slabs] == slabs  # the next pass takes no more


def test_the_plan_counts_slabs_and_what_is_sent() -> None:
    with LiveBytes() as meter:
        chain(HostStore(3), 3, 1024).backward()  # type: ignore[no-untyped-call]
    assert meter.sent == 3 * 4096
    assert meter.host_peak == 8192 + 4096  # two slabs, where each alone would be one as well
