"""7B shapes, or small ones on the simulated device; and how a module is run on either."""

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
    """The beginning of a command that runs a module from ROOT; for a rehearsal on the simulated device."""
    through = ["tests/simulated_cuda/run.py", "module"] if rehearse else ["-m"]
    return [sys.executable, *through, module]


@dataclass(frozen=True)
class Scale:
    """What differs between a GPU and a rehearsal."""

    rehearse: bool
    work: Path
    """Bases, pairs, runs and plans."""

    def config(self, shape: str = "mistral_7b", layers: int | None = None) -> Any:
        """A configuration of that family: its width and, where they are not given, its layers."""
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
        """Those of real pairs; for a rehearsal an eighth of them."""
        from benchmarks.lengths import shipped

        triples = shipped(name)
        return triples // 8 + 3 if self.rehearse else triples

    def of(self, on_gpu: Any, rehearsed: Any) -> Any:
        """The one or the other."""
        return rehearsed if self.rehearse else on_gpu
