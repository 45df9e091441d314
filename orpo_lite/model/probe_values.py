"""Compare the log-probabilities of a route with those of the model's own forward pass.

The module also has functions for both comparisons, of values and of gradients: random pairs,
rounding and error texts.
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
from orpo_lite.ops.devices import is_device_error, is_out_of_memory
from orpo_lite.ops.head import packed_logps

log = logging.getLogger(__name__)

PairLengths = tuple[int, int, int]
"""Tokens of prompt, chosen, rejected."""
SHORT_PAIRS: list[PairLengths] = [(24, 9, 13), (5, 1, 2), (1, 6, 3), (40, 2, 1), (16, 30, 20)]


class ValueComparison:
    """Compare the log-probabilities of other routes with those of the model's own route.

    Each value is computed when it is first needed: a plainer route is not compared if a faster one
    agrees.
    """

    def __init__(self, model: PairModel, max_length: int, tokens: int) -> None:
        self.model, self.max_length, self.tokens = model, max_length, tokens
        self.config = model.config.get_text_config()
        self.short = random_pairs(self.config, SHORT_PAIRS)

    def difference(self, route: Route) -> str:
        """Return how this route, any but "logits", differs from the model's own; "" if equal."""
        if self._head_difference:
            return self._head_difference
        if route == "rows":
            return self._rows_difference
        if changes_frequencies(self.config, self.max_length):
            # Its position embedding depends on the longest sequence of a forward pass, so no two
            # sequences can share one.
            return f"its rotary embedding changes within {self.max_length:,} tokens"
        return (
            self._short_difference(route) or self._rows_difference or self._long_difference(route)
        )

    @cached_property
    def _head_difference(self) -> str:
        return _head_difference(self.model, self.short[0])

    @cached_property
    def _expected(self) -> tuple[Tensor, float]:
        """The log-probabilities of the short pairs, and the difference that rounding may cause."""
        logps = mean_logps(self.model, self.short, "logits")
        return logps, _value_bound(self.model, self.short, logps)

    @cached_property
    def _rows_difference(self) -> str:
        return self._short_difference("rows")

    def _short_difference(self, route: Route) -> str:
        expected, bound = self._expected
        return _value_difference(self.model, self.short, route, expected, bound)

    def _long_difference(self, route: Route) -> str:
        """Compare the longest possible row with single rows. The head has been compared before."""
        long, count = _long_pairs(
            self.config, self.max_length, self.tokens, share=route == "shared"
        )
        if not long:
            return ""
        # The row is filled with copies of the last pair, whose log-probabilities are all the same.
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
    """Return the longest pairs, and how many fill the row if the last one is repeated.

    Their replies are short, so that each token has an effect on the mean. One pair is slightly
    longer than the smallest attention window, so that its last tokens do not see its first ones.
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
    """Return how ``model.head`` differs from the model's own logits, or "".

    Both get the same hidden states, so only the rounding of the logits explains a difference.
    """
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    try:
        own, found = (model.row_logits(batch, route).double() for route in ("logits", "rows"))
    except MODEL_CODE_ERRORS as error:
        return error_reason(error, "logits")
    difference = float((own - found).norm() / own.norm())
    if difference <= logit_rounding(model):
        return ""
    return f"its logits are not its head's: they differ by {difference:.2%}"


def _value_difference(
    model: PairModel, pairs: list[TokenizedPair], route: Route, expected: Tensor, bound: float
) -> str:
    """Return how the log-probabilities of this route differ from the expected ones, or ""."""
    try:
        difference = float((mean_logps(model, pairs, route) - expected).abs().max())
    except MODEL_CODE_ERRORS as error:
        return error_reason(error, route)
    if difference <= bound:
        return ""
    return f"log-probabilities would differ by {difference:.2g} (bound {bound:.2g})"


def mean_logps(model: PairModel, pairs: list[TokenizedPair], route: Route) -> Tensor:
    """Return mean log-probabilities of chosen, of rejected, and of all tokens of the chosen one.

    Shape (3, P), float64.
    """
    batch = pack_pairs(pairs, completion_only_loss=False, share=route == "shared").to(model.device)
    logps = packed_logps(model.score(batch, route), batch.spans)
    return torch.stack(
        [logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]
    ).double()


# --- rounding


def _value_bound(model: PairModel, pairs: list[TokenizedPair], expected: Tensor) -> float:
    """Return the difference that rounding explains.

    In half precision it is four times the effect of rounding the first layer's input once more.
    """
    dtype = coarsest_dtype(model)
    if dtype in (torch.float64, torch.float32):
        return 1e-9 if dtype == torch.float64 else 2e-4
    with rounded_input(model):
        effect = float((mean_logps(model, pairs, "logits") - expected).abs().max())
    return min(max(4 * effect, 0.01), 0.3)


def logit_rounding(model: PairModel) -> float:
    """Return the relative rounding of logits."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(coarsest_dtype(model), 2**-7)


def coarsest_dtype(model: PairModel) -> torch.dtype:
    """Return the dtype that rounds most.

    float32 hidden states may go through matrix products in bnb_4bit_compute_dtype.
    """
    dtypes: set[torch.dtype] = {model.causal.dtype}
    for module in model.modules():
        dtype = getattr(module, "compute_dtype", None)
        if dtype is not None:
            dtypes.add(dtype)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def rounded_input(model: PairModel) -> Iterator[None]:
    """Change the input embedding's output by about one rounding inside the ``with`` block."""
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
    """Return the reason not to use a route on which the model's code raised an error."""
    if isinstance(error, UnsupportedError):
        return str(error)
    what = "does not take packed rows" if route in ("shared", "packed") else "fails"
    return f"its code {what} ({describe_error(error)})"


def describe_error(error: Exception) -> str:
    """Return the type of an error of the model's code, and log its traceback.

    An error of the device is raised again: the model's code did not cause it.
    """
    if is_out_of_memory(error) or is_device_error(error):
        raise error
    log.warning("random tokens failed to go through the model", exc_info=error)
    return f"{type(error).__name__}; train.log has the traceback"


# --- random pairs


def random_pairs(config: Any, lengths: list[PairLengths]) -> list[TokenizedPair]:
    """Return pairs of random tokens with these lengths; the same pairs in every process."""
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
"""Keys of a configuration that hold a window; not Qwen's max_window_layers."""


def _smallest_window(config: Any) -> int | None:
    """Return the tokens that the narrowest layer sees, under any key; None if all see all."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    values = [value for key, value in config.to_dict().items() if WINDOW_KEY.search(key)]
    return min((size for size in values if isinstance(size, int) and size > 1), default=None)
