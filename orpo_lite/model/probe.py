"""The step, compared on the loaded model before it trains: the model's own outputs and gradient are the reference."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from orpo_lite.base.find import positions_switch
from orpo_lite.data.packing import pack_pairs, packed_tokens
from orpo_lite.data.pair import TokenizedPair
from orpo_lite.errors import ModelError, Overrides
from orpo_lite.model.pair_model import MODEL_CODE_ERRORS, ROUTES, PairModel, Route
from orpo_lite.ops.attention import UnsupportedError, flash_attn
from orpo_lite.ops.devices import is_device_error, is_out_of_memory
from orpo_lite.ops.head import packed_logps
from orpo_lite.ops.outputs import PairLogps

log = logging.getLogger(__name__)

SHORT = [
    (24, 9, 13),
    (5, 1, 2),
    (1, 6, 3),
    (40, 2, 1),
    (16, 30, 20),
]  # tokens of prompt, chosen, rejected
FEW = [SHORT[0], SHORT[4]]  # for gradients
TILE = 16  # tokens meanwhile, so that each of these sequences takes several
TINY = [(5, 3, 4)]  # for a gradient for which all layers keep everything


def probe(model: PairModel, max_length: int, tokens: int = 0) -> None:
    """Send random pairs the model's own route and ours; fall back to the fastest route that agrees, and note why.

    What differs: position biases (ALiBi), states that run along the row (linear attention), sinks, sparse attention,
    logits that are changed by something that ``pair_model.find_head`` does not know, positions counted along the row.

    Args:
        model: as it is to be trained. Its adapter is set to random numbers meanwhile where it is new, for then one half
            of it would have no gradient.
        max_length: tokens of the longest sequence; windows beyond it do not matter.
        tokens: of the longest packed row; 0 for that of one pair.

    Raises:
        ModelError: its own forward pass fails, or looks at tokens that come after.
    """
    reasons: dict[Route, str] = {}
    with _random_adapter(model):
        own = _compare_operations(model)
        comparison = _Comparison(model, max_length, tokens)
        for route in ROUTES[ROUTES.index(model.route) :]:
            if route == "logits":
                break
            with model.evaluating():
                reason = comparison.difference(route)
            if not reason:
                with model.without_dropout():
                    reason = _differs(model, route, own)
            if not reason:
                break
            reasons[route] = reason
    if route != model.route:
        model.fall_back(route, reasons[model.route])
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if (
        capped
        and route in ("shared", "packed")
        and model.device.type == "cuda"
        and flash_attn() is None
    ):
        model.notes.append(
            "attention with a softcap runs by the plain formula, slowly: flash-attn has a kernel for it"
        )


def probe_operations(model: PairModel) -> None:
    """The part of :func:`probe` that matters where nothing is packed: that our layers are the model's own."""
    with _random_adapter(model):
        _compare_operations(model)


def _compare_operations(model: PairModel) -> "Gradient":
    """Go back to the model's own layers where ours are not; returns its own gradient."""
    with model.evaluating(), plain(model):
        _refuse_others(model)
    with model.without_dropout():
        with plain(model):
            _refuse_wrong_reruns(model)
        own = _own_gradient(model)
        _drop_wrong_operations(model, own)
    return own


@contextmanager
def _random_adapter(model: PairModel) -> Iterator[None]:
    """A new adapter's B is zero, and with it A's gradient and the adapter's part of every output; not here."""
    zeros = [
        parameter for name, parameter in model.trained() if "lora_B" in name and not parameter.any()
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in zeros:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _refuse_others(model: PairModel) -> None:
    """Refuse a model whose own forward pass fails or changes its weights, or whose tokens see those that come after.

    Raises ModelError.
    """
    pair = _random_pairs(model.config.get_text_config(), [(24, 9, 13)])[0]
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    stop = batch.segments[0][1]
    changed = batch.input_ids_T[:stop].clone()
    changed[-1] = batch.input_ids_T[0]
    before = _beginnings(model)
    try:
        both = [
            model.causal(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]
            for ids in (batch.input_ids_T[:stop], changed)
        ]
    except MODEL_CODE_ERRORS as error:
        found = f"its own forward pass fails with this adapter ({_kind(error)})"
        fix = "other lora.target_modules (or another model.adapter_name_or_path), or quantization.load_in_4bit=false"
        raise ModelError(where=f"model {model.config.model_type}", found=found, fix=fix) from error
    if not all(bool(logits.isfinite().all()) for logits in both):
        found = f"its logits are not finite in {_name(model.causal.dtype)}"
        fix = Overrides(
            {"model.dtype": "float32"}, " if they overflow; else its weights are broken"
        )
        raise ModelError(
            where=f"model {model.config.model_type}", found=found, expected="numbers", fix=fix
        )
    written = [
        name
        for name, some in _beginnings(model).items()
        if not torch.equal(some, before.get(name, some))
    ]
    if written:
        found = f"its forward pass changes its weights ({written[0]} ...), and not the adapter with them"
        fix = (
            "rescale_every: 0 in its config.json"
            if hasattr(model.config, "rescale_every")
            else "another base"
        )
        raise ModelError(where=f"model {model.config.model_type}", found=found, fix=fix)
    difference = float(
        (both[0].double() - both[1].double()).norm() / both[0].double().norm().clamp_min(1e-300)
    )
    if not difference <= _rounding(model):
        found = "its tokens see those that come after: it was made to fill in, not to write on"
        raise ModelError(
            where=f"model {model.config.model_type}",
            found=found,
            expected="a causal language model",
        )


def _beginnings(model: PairModel) -> dict[str, Tensor]:
    """A few numbers of each parameter."""
    some = {}
    for name, parameter in model.causal.named_parameters():
        row = parameter.detach()
        while row.dim() > 1:
            row = row[0]
        some[name] = row[:8].clone() if row.dim() else row.clone()
    return some


def _refuse_wrong_reruns(model: PairModel) -> None:
    """Layers that run again, their inputs perhaps back from host memory, give the gradient that they give at once."""
    found = _gradient(model, "logits", TINY)
    again: list[Any] = [layer for layer in model.layers if layer.gradient_checkpointing]
    for layer in again:
        layer.gradient_checkpointing = layer.training = False
    try:
        wanted = _gradient(model, "logits", TINY)
    finally:
        for layer in again:
            layer.gradient_checkpointing = layer.training = True
    where = f"model {model.config.model_type}"
    if not all(bool(part.isfinite().all()) for part in wanted):
        said = f"its gradient is not finite in {_name(model.causal.dtype)}"
        raise ModelError(
            where=where, found=said, expected="numbers", fix=Overrides({"model.dtype": "float32"})
        )
    bound = {torch.float64: 1e-8, torch.float32: 1e-3}.get(_coarsest(model), 0.01)
    if not (difference := _distance(found, wanted)) <= bound:
        said = (
            f"where its layers run again gradients differ by {difference:.2%} (bound {bound:.2%})"
        )
        raise ModelError(
            where=where,
            found=said,
            fix=Overrides(
                {"memory.activation_checkpointing": "none", "memory.checkpoint_offload": False}
            ),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Gradient(NamedTuple):
    """The model's own, by each trained parameter, and how far another may be from it."""

    parts: list[Tensor]
    bound: float


def _own_gradient(model: PairModel) -> Gradient:
    """By the model's and peft's own layers and all logits; the bound is what rounding explains.

    In half precision that is three times what comes of rounding the first layer's input once more: as much as two
    orders of the same operations differ by, from 1% of a Llama's gradient to 10% of a Gemma's.
    """
    with plain(model):
        parts = _gradient(model, "logits")
        _say_unused(model, parts)
        if _coarsest(model) in (torch.float64, torch.float32):
            return Gradient(parts, 1e-8 if _coarsest(model) == torch.float64 else 1e-3)
        with _rounded_input(model):
            return Gradient(
                parts, min(max(3 * _distance(_gradient(model, "logits"), parts), 0.01), 0.3)
            )


def _drop_wrong_operations(model: PairModel, own: Gradient) -> None:
    """Go back to peft's and the model's own layers where ours have another gradient; says so."""
    tiled = [module.forward for module in ours(model) if hasattr(module.forward, "tokens")]
    sizes = [forward.tokens for forward in tiled]
    for forward in tiled:
        forward.tokens = min(forward.tokens, TILE)
    reason = _differs(model, "logits", own) if ours(model) else ""
    for forward, size in zip(tiled, sizes, strict=True):
        forward.tokens = size
    if reason:
        used = [
            *["memory.fused_lora"] * (len(ours(model)) > len(tiled)),
            *["memory.mlp_tile"] * bool(tiled),
        ]
        for module in ours(model):
            del module.forward
        model.notes.append(f"not used: {' and '.join(used)}, because {reason}")


class _Comparison:
    """The log-probabilities of one model by its own route, and how another route differs from them.

    Each figure is computed when it is first asked for: a plainer route is not compared where a faster one agrees.
    """

    def __init__(self, model: PairModel, max_length: int, tokens: int) -> None:
        self.model, self.max_length, self.tokens = model, max_length, tokens
        self.config = model.config.get_text_config()
        self.short = _random_pairs(self.config, SHORT)

    def difference(self, route: Route) -> str:
        """Return how this route, any but "logits", differs from the model's own; "" where it does not."""
        if self._head_difference:
            return self._head_difference
        if route == "rows":
            return self._rows_difference
        if positions_switch(self.config, self.max_length):
            # Its position embedding depends on the longest sequence of a forward pass, so no two can share one.
            return f"its rotary embedding changes within {self.max_length:,} tokens"
        return (
            self._short_difference(route) or self._rows_difference or self._long_difference(route)
        )

    @cached_property
    def _head_difference(self) -> str:
        return _head_differs(self.model, self.short[0])

    @cached_property
    def _expected(self) -> tuple[Tensor, float]:
        """The figures of the short pairs, and what rounding explains of a difference."""
        figures = _figures(self.model, self.short, "logits")
        return figures, _bound(self.model, self.short, figures)

    @cached_property
    def _rows_difference(self) -> str:
        return self._short_difference("rows")

    def _short_difference(self, route: Route) -> str:
        expected, bound = self._expected
        return _difference(self.model, self.short, route, expected, bound)

    def _long_difference(self, route: Route) -> str:
        """In the longest row that there is, against the rows one by one: the head has been compared by then."""
        long, count = _long_pairs(
            self.config, self.max_length, self.tokens, share=route == "shared"
        )
        if not long:
            return ""
        again = count - len(long)  # of the last one: its figures are the same each time
        short, bound = self._expected
        rows = _figures(self.model, long, "rows")
        expected = torch.cat([rows, *[rows[:, -1:]] * again, short], 1)
        pairs = [*long, *long[-1:] * again, *self.short]
        reason = _difference(self.model, pairs, route, expected, bound)
        tokens = max(self.tokens, self.max_length)
        return f"{reason} in rows of {tokens:,} tokens" if reason else ""


def _long_pairs(
    config: Any, max_length: int, tokens: int, *, share: bool
) -> tuple[list[TokenizedPair], int]:
    """Return pairs as long as there are, and how many fill the row, the last one being repeated.

    Their replies are short, so that each of their tokens counts. Among them is one whose replies lie across the border
    of the smallest attention window.
    """
    lengths = []
    if (window := _smallest_window(config)) and window + 24 < max_length:
        half = window // 2
        lengths.append((half, window - half + 24, window - half + 9))
    if max_length > 80:
        lengths.append((max_length - 24, 24, 9))
    pairs = _random_pairs(config, lengths)
    if not pairs:
        return [], 0
    room = tokens - sum(packed_tokens(pair, share=share) for pair in pairs)
    return pairs, len(pairs) + max(0, math.ceil(room / packed_tokens(pairs[-1], share=share)))


@torch.no_grad()
def _head_differs(model: PairModel, pair: TokenizedPair) -> str:
    """Why ``model.head`` is not what the model does to its hidden states, or "".

    Of the same hidden states, so what rounding explains is known: that of the logits themselves.
    """
    batch = pack_pairs([pair], completion_only_loss=False, share=False).to(model.device)
    try:
        theirs, found = (model.row_logits(batch, route).double() for route in ("logits", "rows"))
    except MODEL_CODE_ERRORS as error:
        return _reason(error, "logits")
    difference = float((theirs - found).norm() / theirs.norm())
    return (
        ""
        if difference <= _rounding(model)
        else f"its logits are not its head's: they differ by {difference:.2%}"
    )


def _difference(
    model: PairModel, pairs: list[TokenizedPair], route: Route, wanted: Tensor, bound: float
) -> str:
    """Why this route is not the model's own, or ""."""
    try:
        difference = float((_figures(model, pairs, route) - wanted).abs().max())
    except MODEL_CODE_ERRORS as error:
        return _reason(error, route)
    return (
        ""
        if difference <= bound
        else f"log-probabilities would differ by {difference:.2g} (bound {bound:.2g})"
    )


def _differs(model: PairModel, route: Route, own: Gradient) -> str:
    """Why the gradient of this route is not the model's own, or ""."""
    try:
        difference = _distance(_gradient(model, route), own.parts)
    except MODEL_CODE_ERRORS as error:
        return _reason(error, route)
    return (
        ""
        if difference <= own.bound
        else f"gradients would differ by {difference:.2%} (bound {own.bound:.2%})"
    )


@contextmanager
def _rounded_input(model: PairModel) -> Iterator[None]:
    """The input embedding's output off by about a rounding while this lasts."""
    generator = torch.Generator().manual_seed(0)

    def rounded(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        off = torch.randn(out.shape, generator=generator) * torch.finfo(_coarsest(model)).eps / 2
        return out * (1 + off).to(out)

    hook = model.causal.get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()


def _say_unused(model: PairModel, gradient: list[Tensor]) -> None:
    """Note the adapters that the loss does not reach: they only take memory."""
    names = [name for name, _ in model.trained()]
    dead = [
        name
        for name, part in zip(names, gradient, strict=True)
        if "lora_A" in name and not part.any()
    ]
    if dead:
        layer = dead[0].split(".lora_A")[0].split("base_model.model.")[-1]
        of_all = sum("lora_A" in name for name in names)
        model.notes.append(
            f"{len(dead)} of {of_all} adapted layers get no gradient ({layer} ...): they learn nothing"
        )


def _gradient(
    model: PairModel, route: Route, lengths: list[tuple[int, int, int]] = FEW
) -> list[Tensor]:
    """Of some sum of :func:`_figures` of a few pairs, by each trained parameter."""
    figures = _figures(model, _random_pairs(model.config.get_text_config(), lengths), route)
    weights_3 = figures.new_tensor([1.0, -2.0, 0.5])
    trained = [parameter for _, parameter in model.trained()]
    return list(
        torch.autograd.grad(
            (weights_3 @ figures).sum(), trained, allow_unused=True, materialize_grads=True
        )
    )


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference over that of what is wanted."""
    between = sum(
        float((a - b).double().square().sum()) for a, b in zip(found, wanted, strict=True)
    )
    return math.sqrt(between / max(sum(float(b.double().square().sum()) for b in wanted), 1e-300))


def ours(model: PairModel) -> list[nn.Module]:
    """The modules whose forward pass is an operation of ours that equals their own: fused LoRA, tiles."""
    return [m for m in model.modules() if getattr(m.__dict__.get("forward"), "equals_plain", False)]


@contextmanager
def plain(model: PairModel) -> Iterator[None]:
    """The model's and peft's own layers while this lasts; what is in host memory stays there."""
    modules = ours(model)
    forwards = [module.__dict__.pop("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def _reason(error: Exception, route: Route) -> str:
    if isinstance(error, UnsupportedError):
        return str(error)
    what = "does not take packed rows" if route in ("shared", "packed") else "fails"
    return f"its code {what} ({_kind(error)})"


def _kind(error: Exception) -> str:
    """What a fault of the model's code is, its traceback being in the log; an error of the device is none of its."""
    if is_out_of_memory(error) or is_device_error(error):
        raise error
    log.warning("random tokens failed to go through the model", exc_info=error)
    return f"{type(error).__name__}; train.log has the place"


def _figures(model: PairModel, pairs: list[TokenizedPair], route: Route) -> Tensor:
    """Mean log-probabilities of chosen, rejected and of all chosen tokens, shape (3, P), float64."""
    batch = pack_pairs(pairs, completion_only_loss=False, share=route == "shared").to(model.device)
    return _stacked(packed_logps(model.score(batch, route), batch.spans))


def _stacked(logps: PairLogps) -> Tensor:
    return torch.stack(
        [logps.chosen_P, logps.rejected_P, logps.nll_P / logps.nll_tokens_P]
    ).double()


def _rounding(model: PairModel) -> float:
    """Of logits, relative."""
    return {torch.float64: 1e-12, torch.float32: 1e-5}.get(_coarsest(model), 2**-7)


def _coarsest(model: PairModel) -> torch.dtype:
    """The dtype that rounds most: a float32 stream may go through products in bnb_4bit_compute_dtype."""
    dtypes = {
        model.causal.dtype,
        *(getattr(module, "compute_dtype", None) for module in model.modules()),
    }
    coarsest: torch.dtype = max(
        (dtype for dtype in dtypes if dtype is not None), key=lambda d: torch.finfo(d).eps
    )
    return coarsest


def _bound(model: PairModel, pairs: list[TokenizedPair], expected: Tensor) -> float:
    """What rounding explains; in half precision four times what comes of rounding the first layer's input once more."""
    dtype = _coarsest(model)
    if dtype in (torch.float64, torch.float32):
        return 1e-9 if dtype == torch.float64 else 2e-4
    with _rounded_input(model):
        return min(
            max(4 * float((_figures(model, pairs, "logits") - expected).abs().max()), 0.01), 0.3
        )


def _random_pairs(config: Any, lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    """Pairs of random tokens, (prompt, chosen, rejected) tokens each; the same ones at each start."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(config.vocab_size)
    if (
        pad := getattr(config, "pad_token_id", None)
    ) is not None:  # some models mask it wherever it stands
        ids = ids[ids != pad]
    pairs = []
    for prompt, chosen, rejected in lengths:
        drawn = ids[
            torch.randint(len(ids), (prompt + chosen + rejected,), generator=generator)
        ].numpy()
        start, middle, end = (
            drawn[:prompt],
            drawn[prompt : prompt + chosen],
            drawn[prompt + chosen :],
        )
        pairs.append(
            TokenizedPair(np.r_[start, middle], np.r_[start, end], prompt, prompt, "probe")
        )
    return pairs


WINDOW = re.compile(
    r"^(?!.*(layer|pattern)).*window|attention_chunk_size"
)  # not Qwen's max_window_layers


def _smallest_window(config: Any) -> int | None:
    """Tokens that the narrowest layer looks back on, whatever the model calls them; None where all see everything."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    named = [value for key, value in config.to_dict().items() if WINDOW.search(key)]
    return min((size for size in named if isinstance(size, int) and size > 1), default=None)
