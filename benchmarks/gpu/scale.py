"""7B shapes for a GPU, or small ones for the simulated device; and how to run a module on each."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.lengths import Triples

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 32,
}  # fmt: skip


def python(module: str, *, rehearse: bool) -> list[str]:
    """Return the start of a command that runs a module from ROOT.

    ``rehearse``: on the simulated device.
    """
    through = ["tests/simulated_cuda/run.py", "module"] if rehearse else ["-m"]
    return [sys.executable, *through, module]


@dataclass(frozen=True)
class Scale:
    """The differences between a GPU and a rehearsal on the simulated device."""

    rehearse: bool
    work: Path
    """Folder of bases, pairs, runs and plans."""

    def config(self, shape: str = "mistral_7b", layers: int | None = None) -> Any:
        """Return the configuration of a model, with its own number of layers or ``layers``."""
        from benchmarks.ours import SHAPES

        config = copy.deepcopy(SHAPES[f"peak_gib_{shape}"][1])
        for name, value in (SMALL if self.rehearse else {}).items():
            setattr(config, name, value)
        layers = min(
            layers or config.num_hidden_layers,
            SMALL["num_hidden_layers"] if self.rehearse else 1_000,
        )
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return config

    def lengths(self, name: str) -> "Triples":
        """Return the lengths of real pairs; for a rehearsal an eighth of each length."""
        from benchmarks.lengths import shipped

        triples = shipped(name)
        return triples // 8 + 3 if self.rehearse else triples

    def of(self, on_gpu: Any, rehearsed: Any) -> Any:
        """Return the first value on a GPU, the second one in a rehearsal."""
        return rehearsed if self.rehearse else on_gpu
