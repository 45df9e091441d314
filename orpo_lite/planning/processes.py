"""Plan a training on several GPUs of one machine: memory, bytes over the wire, and time.

All figures are counted from the plan for one GPU and data sheets. Nothing is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_lite.planning.gpus import Gpu, find_link
from orpo_lite.planning.search import MemoryPlan, Planner
from orpo_lite.planning.share import possible_shares

GATHERS_PER_PASS = 2
"""Times that a pass gathers each layer: for the forward and for the backward pass."""


@dataclass(frozen=True)
class ProcessPlan:
    """A training on several GPUs, where ``shards`` of them share a copy of the base."""

    processes: int
    shards: int
    memory: MemoryPlan
    """The plan of each GPU."""
    pairs: int
    """Pairs of a step for each GPU, at most."""
    divided: int
    """Bytes of the layers' matrices, which processes that share the base divide."""
    link: tuple[str, float]
    """Name of the link between two GPUs, and its bytes per second in one direction."""

    @property
    def passes(self) -> int:
        """Forward and backward passes of each GPU in a step."""
        return -(-self.pairs // self.memory.measured.pairs)

    @property
    def gradient_bytes(self) -> int:
        """Bytes that each GPU sends in a step to sum the adapter's gradients, in a ring."""
        gradients = self.memory.measured.held["gradients"]
        return 2 * (self.processes - 1) * gradients // self.processes

    @property
    def weight_bytes(self) -> int:
        """Bytes of layers that each GPU receives in a step."""
        return GATHERS_PER_PASS * self.passes * (self.shards - 1) * self.divided // self.shards

    @property
    def sending_seconds(self) -> float:
        """Seconds of a step for what goes over the wire, as if nothing else ran meanwhile."""
        return (self.gradient_bytes + self.weight_bytes) / self.link[1]

    @property
    def computing_seconds(self) -> float:
        """Seconds of a step on one GPU without what goes over the wire."""
        return self.pairs * (self.memory.seconds_per_pair or 0.0)

    @property
    def seconds(self) -> float:
        """Seconds of a step, if computing and sending do not overlap."""
        return self.computing_seconds + self.sending_seconds

    def formulas(self) -> Sequence[str]:
        """Return the formulas of the figures with their inputs, one line each."""
        count, shards, gradients = (
            self.processes,
            self.shards,
            self.memory.measured.held["gradients"],
        )
        name, rate = self.link
        lines = [
            f"passes = {self.pairs} pairs a GPU / {self.memory.measured.pairs} pairs a pass = "
            f"{self.passes}",
            f"gradients sent = 2 x ({count} - 1) / {count} x {gradients:,} B = "
            f"{self.gradient_bytes:,} B",
        ]
        if shards > 1:
            base = self.memory.measured.held["base"]
            whole = base - self.divided // shards
            lines.append(
                f"base = {self.divided:,} B of matrices / {shards} + {whole:,} B of each process, "
                f"such as the statistics of the quantisation = {base:,} B"
            )
            lines.append(
                f"layers received = {GATHERS_PER_PASS} gathers x {self.passes} passes x "
                f"({shards} - 1) / {shards} x {self.divided:,} B = {self.weight_bytes:,} B"
            )
        lines.append(
            f"sending = {self.gradient_bytes + self.weight_bytes:,} B / {rate / 1e9:g} GB/s "
            f"({name}, one direction) = {self.sending_seconds:.3g} s"
        )
        lines.append(
            f"computing = {self.pairs} pairs x {self.memory.seconds_per_pair or 0:.3g} s = "
            f"{self.computing_seconds:.3g} s"
        )
        return lines

    def to_json(self) -> Mapping[str, Any]:
        """Return the plan as a dict for JSON. Sizes are in bytes, and times in seconds."""
        return {
            "shard": self.shards if self.shards > 1 else "off",
            "gpu": self.memory.gpu.name if self.memory.gpu else None,
            "fits": self.memory.fits,
            "needed_bytes": self.memory.needed,
            "parts": self.memory.parts,
            "allowances": self.memory.allowances,
            "loading_bytes": self.memory.measured.loading,
            "levers": dict(self.memory.settings),
            "pairs": self.pairs,
            "passes": self.passes,
            "link": self.link[0],
            "link_bytes_per_second": self.link[1],
            "gradient_bytes_sent": self.gradient_bytes,
            "layer_bytes_received": self.weight_bytes,
            "computing_seconds": self.computing_seconds,
            "sending_seconds": self.sending_seconds,
        }


def plan_processes(
    planner: Planner,
    whole: MemoryPlan,
    gpu: Gpu,
    budget: int,
    processes: int,
    *,
    can_share: bool,
) -> list[ProcessPlan]:
    """Return the plans with the whole base on each GPU, and with a shared base.

    The base is shared by ``memory.shard`` processes. With off, there is no such plan. With auto, it
    is shared by the smallest number of processes that fits, or by all.

    Args:
        planner: the planner of a recipe, for one GPU.
        whole: its plan with the whole base.
        gpu: the kind of all GPUs.
        budget: bytes that each GPU may use.
        processes: the number of GPUs.
        can_share: whether processes can share this base. If not, there is only the first plan.
    """
    recipe = planner.recipe
    pairs = -(-recipe.training.global_batch_size // processes)
    divided, link = planner.divided, find_link(gpu)
    found = [ProcessPlan(processes, 1, whole, pairs, divided, link)]
    numbers: Sequence[int] = [recipe.memory.shards] if recipe.memory.shards > 1 else []
    wanted = numbers or possible_shares(recipe, processes)
    for shards in wanted if can_share else []:
        plan = planner.sharing(shards).plan(budget, gpu)
        if plan.fits or shards == processes or numbers:
            found.append(ProcessPlan(processes, shards, plan, pairs, divided, link))
            break
    return found
