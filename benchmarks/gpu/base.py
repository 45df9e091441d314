"""Random bases and pairs on disk, made within seconds: values do not matter to time and memory."""

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
    """Write pairs with the lengths of HH-RLHF's, a base of two layers, and one of all layers."""
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
    """Write a random base in bfloat16, a file a layer; returns its bytes. One layer at a time is in memory.

    On a CPU the layers have the same values: to draw 7 billion takes a minute.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".layers.")
        files.setdefault(
            f"layer-{parts[1].partition('.')[0]}" if len(parts) > 1 else "ends", []
        ).append(name)
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
    """Random values of a tensor, in host memory."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.drawn: dict[torch.Size, torch.Tensor] = {}

    def __call__(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Normal values of a matrix, ones of a norm, zeros of a bias."""
        if len(shape) == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(
                shape, dtype=torch.bfloat16
            )
        if self.device.type == "cuda":
            values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
            return values.normal_(0, 0.02).cpu()
        if shape not in self.drawn:
            values = torch.empty(shape, dtype=torch.bfloat16)
            self.drawn[shape] = values.normal_(0, 0.02)
        return self.drawn[shape].clone()  # safetensors refuses tensors that share memory


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of numbered words, a token each."""
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
    """Write pairs of random words with these numbers of tokens; returns how many."""
    rng, count = np.random.default_rng(0), vocab_size - len(SPECIAL)

    def text(length: int) -> str:
        return " ".join(f"w{number}" for number in rng.integers(0, count, max(2, length)))

    with file.open("w", encoding="utf-8") as stream:
        for prefix, chosen, rejected in triples.tolist():
            row = {
                "prompt": text(prefix),
                "chosen": text(chosen - prefix),
                "rejected": text(rejected - prefix),
            }
            stream.write(
                json.dumps(
                    {key: f" {value}" if key != "prompt" else value for key, value in row.items()}
                )
            )
            stream.write("\n")
    return len(triples)
