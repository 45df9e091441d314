"""The step, proven on the loaded model before it trains: its own forward pass and gradient are the reference."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orpo_lite.data.packing import pack_pairs, pad_pairs
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.model import WAYS, PairModel, Way
from orpo_lite.step.attention import UnsupportedError
from orpo_lite.step.head import packed_logps
from orpo_lite.step.losses import PairLogps

log = logging.getLogger(__name__)


def prove(model: PairModel, max_length: int) -> None:
    """Let random pairs go the model's own way and ours, and take the fastest way that agrees; says so if it is another.

    The pairs are long enough to cross the smallest attention window that ``max_length`` reaches. What differs: position
    biases (ALiBi), states that run along the row (linear attention), sinks, logits that are changed by something that
    ``model.find_head`` does not know.
    """
    with model.evaluating():
        reasons = _disagreements(model, max_length)
    with model.without_dropout():
        reasons |= _wrong_gradients(model, [way for way in WAYS[WAYS.index(model.way) :] if way not in reasons])
    for way in WAYS[WAYS.index(model.way) :]:
        if way not in reasons:
            break
    if way != model.way:
        model.notes.append(f"{SAID[way]}, because {reasons[model.way]}")
        model.way = way


SHORT = [(24, 9, 13), (5, 1, 2), (1, 6, 3), (40, 2, 1), (16, 30, 20)]  # tokens of prompt, chosen, rejected
SAID: dict[Way, str] = {
    "packed": "prompts are not shared",
    "rows": "pairs are neither packed nor shared: each sequence goes through the model by itself",
    "logits": "each sequence goes through the model by itself, with all its logits",
}


def _disagreements(model: PairModel, max_length: int) -> dict[Way, str]:
    """Each way that differs from the model's own, and how."""
    config = model.config.get_text_config()
    short = _random_pairs(config, SHORT)
    if reason := _head_differs(model, short[0]):
        return dict.fromkeys(WAYS[:-1], reason)
    expected = _figures(model, short, "logits")
    bound = _bound(model, short, expected)
    reasons: dict[Way, str] = {}

    def compare(way: Way, pairs: list[TokenizedPair], wanted: Tensor, where: str = "") -> None:
        if reason := _difference(model, pairs, way, wanted, bound):
            reasons[way] = reason + where

    compare("rows", short, expected)
    packed = WAYS[WAYS.index(model.way) : WAYS.index("rows")]  # of "shared" and "packed" those that are asked for
    if _positions_switch(config, max_length):
        # Its position embedding depends on the longest sequence of a forward pass, so no two can share one.
        return reasons | dict.fromkeys(packed, f"its rotary embedding changes within {max_length:,} tokens")
    for way in packed:
        compare(way, short, expected)
    window = _smallest_window(config)
    if window and window < max_length:
        half = window // 2
        long = _random_pairs(config, [(half, window - half + 24, window - half + 9)])
        # Where the head is proven, it spares the logits of all these tokens.
        wanted = _figures(model, long, "logits" if "rows" in reasons else "rows")
        for way in packed:
            if way not in reasons:
                compare(way, long, wanted, f" beyond its window of {window:,} tokens")
    return reasons


@torch.no_grad()
def _head_differs(model: PairModel, pair: TokenizedPair) -> str:
    """Why ``model.head`` is not what the model does to its hidden states, or "".

    Of the same hidden states, so what rounding explains is known: that of the logits themselves.
    """
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    own, ours = (model.row_logits(batch, way).double() for way in ("logits", "rows"))
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(model.causal.dtype, 2**-7)
    difference = float((own - ours).norm() / own.norm())
    return "" if difference <= bound else f"its logits are not its head's: they differ by {difference:.2%}"


def _difference(model: PairModel, pairs: list[TokenizedPair], way: Way, wanted: Tensor, bound: float) -> str:
    """Why this way is not the model's own, or ""."""
    try:
        difference = float((_figures(model, pairs, way) - wanted).abs().max())
    except torch.OutOfMemoryError:
        raise
    except (UnsupportedError, *THEIR_FAULTS) as error:
        return _reason(error)
    return "" if difference <= bound else f"log-probabilities would differ by {difference:.2g} (bound {bound:.2g})"


def _wrong_gradients(model: PairModel, ways: Sequence[Way]) -> dict[Way, str]:
    """The first of these ways if its gradient is not the model's own, and so on with the next; {} if it is."""
    reasons: dict[Way, str] = {}
    if ways[0] == "logits":
        return reasons
    pairs = _random_pairs(model.config.get_text_config(), SHORT)
    wanted = _gradient(model, pairs, "logits")
    bound = {torch.float64: 1e-8, torch.float32: 1e-3}.get(model.causal.dtype)
    if bound is None:  # half precision: measured between padded rows and single ones, both the model's own
        bound = min(max(4 * _distance(_gradient(model, pairs, None), wanted), 0.05), 0.5)
    for way in ways[:-1]:
        try:
            difference = _distance(_gradient(model, pairs, way), wanted)
        except torch.OutOfMemoryError:
            raise
        except (UnsupportedError, *THEIR_FAULTS) as error:
            reasons[way] = _reason(error)
            continue
        if difference <= bound:
            break
        reasons[way] = f"gradients would differ by {difference:.2%} (bound {bound:.2%})"
    return reasons


def _gradient(model: PairModel, pairs: list[TokenizedPair], way: Way | None) -> list[Tensor]:
    """Of some sum of :func:`_figures`, by each trained parameter; ``way`` None is that of padded rows."""
    figures = _padded(model, pairs) if way is None else _figures(model, pairs, way)
    weights_3 = figures.new_tensor([1.0, -2.0, 0.5])
    trained = [parameter for _, parameter in model.trained()]
    return list(torch.autograd.grad((weights_3 @ figures).sum(), trained, allow_unused=True, materialize_grads=True))


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference over that of what is wanted."""
    between = sum(float((a - b).double().square().sum()) for a, b in zip(found, wanted, strict=True))
    return math.sqrt(between / max(sum(float(b.double().square().sum()) for b in wanted), 1e-300))


THEIR_FAULTS = (TypeError, ValueError, AttributeError, RuntimeError)  # of a model that does not take packed rows


def _reason(error: Exception) -> str:
    if isinstance(error, UnsupportedError):
        return str(error)
    log.warning("a packed row of random tokens failed", exc_info=error)
    return f"its code does not take packed rows ({type(error).__name__}; train.log has the place)"


def _figures(model: PairModel, pairs: list[TokenizedPair], way: Way) -> Tensor:
    """Mean log-probabilities of chosen, rejected and of all chosen tokens, shape (3, P), float64."""
    batch = pack_pairs(pairs, completion_only_loss=False, share=way == "shared").to(model.device)
    return _stacked(packed_logps(model.score(batch, way), batch.spans))


def _padded(model: PairModel, pairs: list[TokenizedPair]) -> Tensor:
    """:func:`_figures` of padded rows, by the model's own logits."""
    return _stacked(model(pad_pairs(pairs, pad_id=0, completion_only_loss=False).to(model.device)))


def _stacked(logps: PairLogps) -> Tensor:
    return torch.stack([logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]).double()


def _bound(model: PairModel, pairs: list[TokenizedPair], expected: Tensor) -> float:
    """What rounding explains: in half precision measured between padded rows and single ones, both the model's own."""
    dtype = model.causal.dtype
    if dtype in (torch.float64, torch.float32):
        return 1e-9 if dtype == torch.float64 else 2e-4
    return min(max(4 * float((_padded(model, pairs) - expected).abs().max()), 0.03), 0.3)


def _random_pairs(config: Any, lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    """Pairs of random tokens, (prompt, chosen, rejected) tokens each; the same ones at each start."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(config.vocab_size)
    if config.pad_token_id is not None:  # some models mask it wherever it stands
        ids = ids[ids != config.pad_token_id]
    pairs = []
    for prompt, chosen, rejected in lengths:
        drawn = ids[torch.randint(len(ids), (prompt + chosen + rejected,), generator=generator)].numpy()
        start, middle, end = drawn[:prompt], drawn[prompt : prompt + chosen], drawn[prompt + chosen :]
        pairs.append(TokenizedPair(np.r_[start, middle], np.r_[start, end], prompt, prompt, "probe"))
    return pairs


WINDOW = re.compile(r"^(?!.*(layer|pattern)).*window|attention_chunk_size")  # not Qwen's max_window_layers


def _smallest_window(config: Any) -> int | None:
    """Tokens that the narrowest layer looks back on, whatever the model calls them; None where all see everything."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    named = [value for key, value in config.to_dict().items() if WINDOW.search(key)]
    return min((size for size in named if isinstance(size, int) and size > 1), default=None)


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
