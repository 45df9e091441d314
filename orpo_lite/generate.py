"""Answers from a model folder, loaded by transformers alone: what anyone will get who loads it."""

from collections.abc import Sequence
from pathlib import Path

import torch


def generate(
    folder: Path, prompts: Sequence[Sequence[int]], *, tokenizer_folder: Path, max_new_tokens: int, seed: int
) -> list[tuple[str, str]]:
    """One sampled answer (temperature 0.7) to each prompt, as (prompt, answer) texts without special tokens.

    Args:
        folder: a plain transformers model.
        prompts: token ids, as the training saw them.
        tokenizer_folder: holds the tokenizer and the generation config; the base and the merged model share them.
        max_new_tokens: length limit of an answer.
        seed: of torch's generator; prompt n is answered under ``seed + n``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    config = GenerationConfig.from_pretrained(tokenizer_folder)
    config.update(do_sample=True, temperature=0.7, max_new_tokens=max_new_tokens)
    answers = []
    for number, ids in enumerate(prompts):
        torch.manual_seed(seed + number)
        input_ids = torch.tensor([list(ids)])
        with torch.no_grad():
            output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        answers.append((tokenizer.decode(ids, skip_special_tokens=True).strip(), answer.strip()))
    return answers
