"""Generate answers of the base and of the trained model to prompts, for people to read."""

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
"""Prompts that belong to nobody's data, so that a model card can show the answers."""
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered."""

    source: Literal["neutral", "held-out"]
    text: str
    """The text for people; "" if only the tokens are known."""
    ids: Sequence[int]
    """The prompt's tokens, as in training."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its two answers, as texts without special tokens."""

    source: Literal["neutral", "held-out"]
    prompt: str
    before: str
    """Answer of the base, as the training loaded it."""
    after: str
    """Answer of the base with the adapter."""
    temperature: float
    """Sampling temperature."""


def answers(
    model: PairModel, prompts: Sequence[Prompt], folder: Path, *, max_new_tokens: int, seed: int
) -> Iterator[Sample]:
    """Yield sampled answers to each prompt, without the adapter and with it.

    The model is the one that was trained, with its memory settings.

    Args:
        model: the trained model.
        prompts: answered one at a time, the nth of its source with seed ``seed + n``. A prompt is
            skipped if the model has no position left for an answer.
        folder: folder of the result, with its tokenizer and generation config.
        max_new_tokens: length limit of an answer; less if the model has fewer positions left.
        seed: first seed of torch's generators.
    """
    from transformers import GenerationConfig

    # Not the whole config: it may ask for beams, other outputs, or stop strings, which need a
    # tokenizer.
    tokenizer, (given, _) = load_tokenizer(folder), read_generation_config(folder)
    kept = {
        key: given[key]
        for key in (*SAMPLING, "eos_token_id", "pad_token_id")
        if given.get(key) is not None
    }
    config = GenerationConfig(**kept, do_sample=True, temperature=TEMPERATURE)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    # Sampling needs a sum that has no deterministic kernel on a GPU (full_determinism). All that is
    # trained is saved by now.
    torch.use_deterministic_algorithms(False)
    wrapped: Any = model.model
    # generate() allocates on the device of the first parameter, which may be the embedding in host
    # memory.
    embed_on_device(model.causal.get_input_embeddings(), model.device)
    seeds = {source: itertools.count(seed) for source in ("neutral", "held-out")}
    for prompt in prompts:
        prompt_seed = next(seeds[prompt.source])
        config.max_new_tokens = min(max_new_tokens, positions - len(prompt.ids))
        if config.max_new_tokens < 1:
            continue
        ids = torch.tensor([list(prompt.ids)], device=model.device)
        answers = []
        with model.evaluating():
            for adapter in (wrapped.disable_adapter(), nullcontext()):
                torch.manual_seed(prompt_seed)
                with adapter:
                    output = wrapped.generate(
                        ids, attention_mask=torch.ones_like(ids), generation_config=config
                    )
                answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                answers.append(str(answer).strip())
        text = prompt.text or str(tokenizer.decode(prompt.ids, skip_special_tokens=True)).strip()
        before, after = answers
        yield Sample(prompt.source, text, before, after, TEMPERATURE)
