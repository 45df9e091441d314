"""What the base and the trained model answer to a few prompts, for people to look at."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from orpo_lite.base.find import load_tokenizer
from orpo_lite.base.generation import SAMPLING, read_generation_config
from orpo_lite.model.pair_model import PairModel
from orpo_lite.ops.layers import embed_on_device

NEUTRAL = (
    "Name three things worth checking before a long bicycle ride.",
    "Explain in two sentences why the sea is salty.",
    "Write one polite sentence that moves a meeting from Monday to Tuesday.",
    "What is 17 plus 25? Say how you got there.",
    "Turn this into a question: The train leaves at nine.",
)
"""Prompts that are nobody's data, so that a model card can show the answers."""
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Prompt:
    """A text to be answered."""

    source: Literal["neutral", "held-out"]
    text: str
    """For people; "" where only the tokens are known."""
    ids: Sequence[int]
    """As the training would have seen it."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what is said to it; texts without special tokens."""

    source: Literal["neutral", "held-out"]
    prompt: str
    before: str
    """By the base, as the training loaded it."""
    after: str
    """By the base with the adapter."""
    temperature: float
    """That it was sampled at."""


def answers(
    model: PairModel, prompts: Sequence[Prompt], folder: Path, *, max_new_tokens: int, seed: int
) -> Iterator[Sample]:
    """Each prompt answered without the adapter and with it, sampled; the model is the one that trained, in its memory.

    Args:
        model: after its training.
        prompts: one is answered at a time, the nth of its source under ``seed + n``; none where no position is left.
        folder: of the result, with its tokenizer and generation config.
        max_new_tokens: length limit of an answer, less where the model has no positions for more.
        seed: of torch's generators.
    """
    from transformers import GenerationConfig

    # Not the config as a whole: one may ask for beams, for other outputs, or for what a tokenizer has to stop at.
    tokenizer, (given, _) = load_tokenizer(folder), read_generation_config(folder)
    kept = {
        key: given[key]
        for key in (*SAMPLING, "eos_token_id", "pad_token_id")
        if given.get(key) is not None
    }
    config = GenerationConfig(**kept, do_sample=True, temperature=TEMPERATURE)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    # A sum that sampling needs has no deterministic kernel on a GPU (full_determinism); all that is trained is saved.
    torch.use_deterministic_algorithms(False)
    wrapped: Any = model.model
    # generate() makes what it needs on the device of the first parameter, which may be the embedding in host memory.
    embed_on_device(model.causal.get_input_embeddings(), model.device)
    seeds = {source: itertools.count(seed) for source in ("neutral", "held-out")}
    for prompt in prompts:
        its_seed = next(seeds[prompt.source])
        config.max_new_tokens = min(max_new_tokens, positions - len(prompt.ids))
        if config.max_new_tokens < 1:
            continue
        ids = torch.tensor([list(prompt.ids)], device=model.device)
        found = []
        with model.evaluating():
            for adapter in (wrapped.disable_adapter(), nullcontext()):
                torch.manual_seed(its_seed)
                with adapter:
                    said = wrapped.generate(
                        ids, attention_mask=torch.ones_like(ids), generation_config=config
                    )
                found.append(
                    str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()
                )
        text = prompt.text or str(tokenizer.decode(prompt.ids, skip_special_tokens=True)).strip()
        before, after = found
        yield Sample(prompt.source, text, before, after, TEMPERATURE)
