"""Compare a route's log-probabilities with those of the model's own forward pass.

For the routes see :data:`orpo_lite.model.pair_model.Route`. ``probe_gradients.py`` also uses
functions of this module: for random pairs, mean log-probabilities, rounding and error texts.
"""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orpo_lite.base.find import changes_frequencies
from orpo_lite.data.packing import pack_pairs, packed_tokens
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, PairModel, Route
from orpo_lite.ops.attention import UnsupportedError
from orpo_lite.ops.devices import is_device_error, is_lost, is_out_of_memory
from orpo_lite.ops.head import packed_logps

log = logging.getLogger(__name__)

PairLengths = tuple[int, int, int]
"""(tokens of the prompt, tokens of the chosen response, tokens of the rejected response)."""
SHORT_PAIRS: list[PairLengths] = [(24, 9, 13), (5, 1, 2), (1, 6, 3), (40, 2, 1), (16, 30, 20)]


class ValueComparison:
    """Compares the log-probabilities of routes with those of the model's own forward pass.

    The model's own forward pass is the route ``logits``. A result that several comparisons need is
    computed once, when it is first needed.
    """

    def __init__(self, model: PairModel, max_length: int, tokens: int) -> None:
        self.model, self.max_length, self.tokens = model, max_length, tokens
        self.config = model.config.get_text_config()
        self.short = random_pairs(self.config, SHORT_PAIRS)

    def difference(self, route: Route) -> str:
        """Describe how a route's results differ from the results of the route ``logits``.

        Return "" if the results differ only by rounding.
        """
        if self._head_difference:
            return self._head_difference
        if route == "rows":
            return self._rows_difference
        if changes_frequencies(self.config, self.max_length):
            # The position embedding depends on the longest sequence in a forward pass, so each
            # sequence needs a forward pass of its own.
            return (
                "its rotary embedding is not the same for all lengths up to "
                f"{self.max_length:,} tokens"
            )
        return (
            self._short_difference(route) or self._rows_difference or self._long_difference(route)
        )

    @cached_property
    def _head_difference(self) -> str:
        return _head_difference(self.model, self.short[0])

    @cached_property
    def _expected(self) -> tuple[Tensor, float]:
        """The short pairs' log-probabilities on the route ``logits``, and the rounding bound."""
        logps = mean_logps(self.model, self.short, "logits")
        return logps, _value_bound(self.model, self.short, logps)

    @cached_property
    def _rows_difference(self) -> str:
        return self._short_difference("rows")

    def _short_difference(self, route: Route) -> str:
        expected, bound = self._expected
        return _value_difference(self.model, self.short, route, expected, bound)

    def _long_difference(self, route: Route) -> str:
        """Compare the longest packed row with the route ``rows``, which was compared before."""
        long, count = _long_pairs(
            self.config, self.max_length, self.tokens, share=route == "shared"
        )
        if not long:
            return ""
        # Copies of the last pair fill the row. All copies must have the same log-probabilities.
        copies = count - len(long)
        short, bound = self._expected
        rows = mean_logps(self.model, long, "rows")
        expected = torch.cat([rows, rows[:, -1:].expand(-1, copies), short], 1)
        pairs = [*long, *long[-1:] * copies, *self.short]
        reason = _value_difference(self.model, pairs, route, expected, bound)
        tokens = max(self.tokens, self.max_length)
        return f"{reason} in rows of {tokens:,} tokens" if reason else ""


def _long_pairs(
    config: Any, max_length: int, tokens: int, *, share: bool
) -> tuple[list[TokenizedPair], int]:
    """Return long pairs, and the number of pairs in the row if copies of the last pair fill it.

    The replies are short, so that each token has an effect on the mean. One pair is slightly longer
    than the smallest attention window, so that its last tokens do not see its first tokens.
    """
    lengths = []
    window = _smallest_window(config)
    if window and window + 24 < max_length:
        half = window // 2
        lengths.append((half, window - half + 24, window - half + 9))
    if max_length > 80:
        lengths.append((max_length - 24, 24, 9))
    pairs = random_pairs(config, lengths)
    if not pairs:
        return [], 0
    free_tokens = tokens - sum(packed_tokens(pair, share=share) for pair in pairs)
    copies = math.ceil(free_tokens / packed_tokens(pairs[-1], share=share))
    return pairs, len(pairs) + max(0, copies)


@torch.no_grad()
def _head_difference(model: PairModel, pair: TokenizedPair) -> str:
    """Describe how the logits of ``model.head`` differ from the model's own logits; "" if equal.

    Both are computed from the same hidden states, so only the logits' rounding may differ.
    """
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    try:
        own, found = (model.row_logits(batch, route).double() for route in ("logits", "rows"))
    except MODEL_CODE_ERRORS as error:
        return error_reason(error, "logits")
    difference = float((own - found).norm() / own.norm())
    if difference <= logit_rounding(model):
        return ""
    return f"its logits differ from the output of its head by {difference:.2%}"


def _value_difference(
    model: PairModel, pairs: list[TokenizedPair], route: Route, expected: Tensor, bound: float
) -> str:
    """Describe how a route's log-probabilities differ from ``expected``; "" within ``bound``."""
    try:
        difference = float((mean_logps(model, pairs, route) - expected).abs().max())
    except MODEL_CODE_ERRORS as error:
        return error_reason(error, route)
    if difference <= bound:
        return ""
    return f"log-probabilities would differ by {difference:.2g} (bound {bound:.2g})"


def mean_logps(model: PairModel, pairs: list[TokenizedPair], route: Route) -> Tensor:
    """Return mean log-probabilities of P pairs, shape (3, P), float64.

    The rows are: chosen response, rejected response, prompt and chosen response together.
    """
    batch = pack_pairs(pairs, completion_only_loss=False, share=route == "shared").to(model.device)
    logps = packed_logps(model.score(batch, route), batch.spans)
    return torch.stack(
        [logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]
    ).double()


# --- rounding


def _value_bound(model: PairModel, pairs: list[TokenizedPair], expected: Tensor) -> float:
    """Return the largest difference of log-probabilities that rounding can cause.

    In half precision this is four times the effect of rounding the first layer's input once more,
    but at least 0.01 and at most 0.3.
    """
    dtype = coarsest_dtype(model)
    if dtype in (torch.float64, torch.float32):
        return 1e-9 if dtype == torch.float64 else 2e-4
    with rounded_input(model):
        effect = float((mean_logps(model, pairs, "logits") - expected).abs().max())
    return min(max(4 * effect, 0.01), 0.3)


def logit_rounding(model: PairModel) -> float:
    """Return the largest relative difference of logits that rounding can cause."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(coarsest_dtype(model), 2**-7)


def coarsest_dtype(model: PairModel) -> torch.dtype:
    """Return the least precise dtype in which the model computes.

    Even if hidden states are float32, 4-bit layers may compute in a less precise
    bnb_4bit_compute_dtype.
    """
    dtypes: set[torch.dtype] = {model.causal.dtype}
    for module in model.modules():
        dtype = getattr(module, "compute_dtype", None)
        if dtype is not None:
            dtypes.add(dtype)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def rounded_input(model: PairModel) -> Iterator[None]:
    """Add noise to the embeddings while the context is open.

    The noise is as large as a rounding error.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        eps = torch.finfo(coarsest_dtype(model)).eps
        noise = torch.randn(out.shape, generator=generator) * eps / 2
        return out * (1 + noise).to(out)

    hook = model.causal.get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


# --- errors of the model's code


def error_reason(error: Exception, route: Route) -> str:
    """Return why ``route`` fails, as text for a note. ``error``: raised by the model's code."""
    if isinstance(error, UnsupportedError):
        return str(error)
    what = "does not take packed rows" if route in ("shared", "packed") else "fails"
    return f"its code {what} ({describe_error(error)})"


def describe_error(error: Exception) -> str:
    """Log the traceback of an error that the model's code raised, and return a text for a note.

    The text is "TypeError; train.log has the traceback" for a TypeError. An error of the device or
    of another process is raised again, because the model's code did not cause it.
    """
    if is_out_of_memory(error) or is_device_error(error) or is_lost(error):
        raise error
    log.warning("the model's code failed on random tokens", exc_info=error)
    return f"{type(error).__name__}; train.log has the traceback"


# --- random pairs


def random_pairs(config: Any, lengths: list[PairLengths]) -> list[TokenizedPair]:
    """Return pairs of random tokens with the given lengths, the same pairs in every process."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(config.vocab_size)
    pad_id = getattr(config, "pad_token_id", None)
    if pad_id is not None:  # some models mask it at any position
        ids = ids[ids != pad_id]
    pairs = []
    for prompt, chosen, rejected in lengths:
        indices = torch.randint(len(ids), (prompt + chosen + rejected,), generator=generator)
        tokens = ids[indices].numpy()
        prompt_ids, chosen_ids, rejected_ids = np.split(tokens, [prompt, prompt + chosen])
        pairs.append(
            TokenizedPair(
                np.r_[prompt_ids, chosen_ids],
                np.r_[prompt_ids, rejected_ids],
                prompt,
                prompt,
                "probe",
            )
        )
    return pairs


WINDOW_KEY = re.compile(r"^(?!.*(layer|pattern)).*window|attention_chunk_size")
"""Matches the keys of a configuration that hold a window, but not Qwen's max_window_layers."""


def _smallest_window(config: Any) -> int | None:
    """Return the smallest attention window in the configuration; None if there is no window."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    values = [value for key, value in config.to_dict().items() if WINDOW_KEY.search(key)]
    return min((size for size in values if isinstance(size, int) and size > 1), default=None)
