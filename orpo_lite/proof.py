"""The step, proven on the loaded model before it trains: the model's own forward pass is the reference."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo_lite.data.packing import pack_pairs, pad_pairs
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.model import WAYS, PairModel, Way
from orpo_lite.step.attention import UnsupportedError
from orpo_lite.step.head import packed_logps


def prove(model: PairModel, max_length: int) -> None:
    """Let random pairs go the model's own way and ours, and take the fastest way that agrees; says so if it is another.

    The pairs are long enough to cross the smallest attention window that ``max_length`` reaches. What differs: position
    biases (ALiBi), states that run along the row (linear attention), sinks, logits that are changed by something that
    ``model.find_head`` does not know.
    """
    with model.evaluating():
        reasons = _disagreements(model, max_length)
    for way in WAYS[WAYS.index(model.way) :]:
        if way not in reasons:
            break
    if way != model.way:
        model.notes.append(f"{SAID[way]}, because {reasons[model.way]}")
        model.way = way


SAID: dict[Way, str] = {
    "packed": "prompts are not shared",
    "rows": "pairs are neither packed nor shared: each sequence goes through the model by itself",
    "logits": "each sequence goes through the model by itself, with all its logits",
}


def _disagreements(model: PairModel, max_length: int) -> dict[Way, str]:
    """Each way that differs from the model's own, and how."""
    reasons: dict[Way, str] = {}
    short = _random_pairs(model, [(24, 9, 13), (5, 1, 2), (1, 6, 3), (40, 2, 1), (16, 30, 20)])
    expected = _figures(model, short, "logits")
    bound = _bound(model, short, expected)
    trials: list[tuple[Way, list[TokenizedPair], Tensor, str]] = []
    trials = [(way, short, expected, "") for way in ("shared", "packed", "rows")]
    config = model.config.get_text_config()
    window = _smallest_window(config)
    if window and window < max_length:
        half = window // 2
        long = _random_pairs(model, [(half, window - half + 24, window - half + 9)])
        rows = _figures(model, long, "logits")
        trials += [(way, long, rows, f" beyond its window of {window:,} tokens") for way in ("shared", "packed")]
    if _positions_switch(config, max_length):
        # Its position embedding depends on the longest sequence of a forward pass, so no two can share one.
        reasons |= dict.fromkeys(("shared", "packed"), f"its rotary embedding changes within {max_length:,} tokens")
    for way, pairs, wanted, where in trials:
        if way in reasons or WAYS.index(way) < WAYS.index(model.way):
            continue
        try:
            found = _figures(model, pairs, way)
        except (UnsupportedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reasons[way] = str(error).splitlines()[0] if isinstance(error, UnsupportedError) else repr(error)[:200]
            continue
        difference = float((found - wanted).abs().max())
        if not difference <= bound:
            reasons[way] = f"log-probabilities would differ by {difference:.2g}{where} (bound {bound:.2g})"
    return reasons


def _figures(model: PairModel, pairs: list[TokenizedPair], way: Way) -> Tensor:
    """Mean log-probabilities of chosen, rejected and of all chosen tokens, shape (3, P), float64."""
    batch = pack_pairs(pairs, completion_only_loss=False, share=way == "shared").to(model.device)
    logps = packed_logps(model.score(batch, way), batch.spans)
    return torch.stack([logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]).double()


def _bound(model: PairModel, pairs: list[TokenizedPair], expected: Tensor) -> float:
    """What rounding explains: in half precision measured between padded rows and single ones, both the model's own."""
    dtype = model.causal.dtype
    if dtype in (torch.float64, torch.float32):
        return 1e-9 if dtype == torch.float64 else 2e-4
    logps = model(pad_pairs(pairs, pad_id=0, completion_only_loss=False).to(model.device))
    padded = torch.stack([logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]).double()
    return min(max(4 * float((padded - expected).abs().max()), 0.03), 0.3)


def _random_pairs(model: PairModel, lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    """Pairs of random tokens, (prompt, chosen, rejected) tokens each; the same ones at each start."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(model.config.get_text_config().vocab_size)
    special = {model.config.get_text_config().pad_token_id}  # some models mask it wherever it stands
    ids = ids[[i not in special for i in ids.tolist()]] if len(ids) > 1 else ids
    pairs = []
    for prompt, chosen, rejected in lengths:
        drawn = ids[torch.randint(len(ids), (prompt + chosen + rejected,), generator=generator)].numpy()
        start, middle, end = drawn[:prompt], drawn[prompt : prompt + chosen], drawn[prompt + chosen :]
        pairs.append(TokenizedPair(np.r_[start, middle], np.r_[start, end], prompt, prompt, "probe"))
    return pairs


def _smallest_window(config: Any) -> int | None:
    """Tokens that the narrowest layer looks back on; None where all see everything."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    sizes = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=None)


def _positions_switch(config: Any, max_length: int) -> bool:
    """Whether the rotary embedding takes other frequencies for sequences that ``max_length`` allows."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    original = getattr(config, "original_max_position_embeddings", None)
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = kind.get("original_max_position_embeddings") or original or config.max_position_embeddings
            if max_length > limit:
                return True
    return False
