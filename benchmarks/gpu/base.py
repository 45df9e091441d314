"""Write random bases and pairs within seconds; time and memory do not depend on their values."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.scale import Scale

SPECIAL = ("<unk>", "<s>", "</s>")
PAIRS = 600


def make_bases(scale: Scale, figures: Figures) -> None:
    """Write pairs with HH-RLHF's lengths, a base of two layers, and a base of all layers."""
    pairs = write_pairs(
        scale.work / "pairs.jsonl", scale.lengths("hh-rlhf")[:PAIRS], scale.config().vocab_size
    )
    figures.note("pairs", pairs)
    for name, layers in (("small", 2), ("mistral", None)):
        began = time.monotonic()
        size = write_base(scale.work / name, scale.config(layers=layers))
        figures.note(f"{name}_gib", round(size / 2**30, 3))
        figures.note(f"{name}_seconds", round(time.monotonic() - began, 2))


def write_base(folder: Path, config: Any) -> int:
    """Write a random base in bfloat16, with one file per layer, and return its bytes.

    One layer at a time is in memory. On a CPU all layers have the same values, because drawing 7
    billion takes a minute.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        _, in_layer, rest = name.partition(".layers.")
        key = f"layer-{rest.partition('.')[0]}" if in_layer else "other"
        files.setdefault(key, []).append(name)
    draw, places, size = _Draw(), {}, 0
    for number, names in enumerate(files.values(), 1):
        tensors = {name: draw(name, shapes[name]) for name in names}
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    word_tokenizer(config.vocab_size).save_pretrained(folder)
    return size


class _Draw:
    """Makes the random values of a tensor, in host memory."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.drawn: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return normal values for a matrix, ones for a norm, zeros for a bias."""
        if len(shape) == 1:
            value = 0 if name.endswith("bias") else 1
            return torch.full(shape, value, dtype=torch.bfloat16)
        if self.device.type == "cuda":
            values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
            return values.normal_(0, 0.02).cpu()
        if shape not in self.drawn:
            values = torch.empty(shape, dtype=torch.bfloat16)
            self.drawn[shape] = values.normal_(0, 0.02)
        return self.drawn[shape].clone()  # safetensors refuses tensors that share memory


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words, each of which is one token."""
    words = [*SPECIAL, *(f"w{number}" for number in range(vocab_size - len(SPECIAL)))]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )


def write_pairs(file: Path, triples: Any, vocab_size: int) -> int:
    """Write pairs of random words with these lengths in tokens, and return their number."""
    rng, count = np.random.default_rng(0), vocab_size - len(SPECIAL)

    def text(length: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(0, count, max(2, length)))

    with file.open("w", encoding="utf-8") as stream:
        for prefix, chosen, rejected in triples.tolist():
            row = {
                "prompt": text(prefix),
                "chosen": f" {text(chosen - prefix)}",
                "rejected": f" {text(rejected - prefix)}",
            }
            stream.write(json.dumps(row) + "\n")
    return len(triples)
