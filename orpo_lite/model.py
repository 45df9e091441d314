"""The base in 4 bit with LoRA on top, loaded and wrapped as a :class:`PairModel`; and the step, proven on it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.base import Base, find_adapter, read_adapter_config
from orpo_lite.data.packing import Batch, Batching, PackedPairs, pack_pairs, pad_pairs
from orpo_lite.data.tokens import TokenizedPair
from orpo_lite.errors import FitError, ModelError, RecipeError
from orpo_lite.recipe import MemorySection, Recipe
from orpo_lite.step import attention
from orpo_lite.step.attention import Layout, Segment, UnsupportedError, pair_attention, using
from orpo_lite.step.head import Head, chunk_rows, packed_logps, padded_logps, pick, row_logps
from orpo_lite.step.layers import checkpoint_layers, embed_on_host, tile_mlps
from orpo_lite.step.lora import fuse_lora
from orpo_lite.step.losses import PairLogps, at_least_float32

AttentionInterface.register(attention.NAME, pair_attention)

Way = Literal["shared", "packed", "rows", "logits"]
"""How packed pairs go through the model, from the fastest way to the plainest. shared: one row, each prompt once.
packed: one row, each sequence whole. rows: a row a sequence, with the model's own attention. logits: so, and with the
model's own logits."""
WAYS: tuple[Way, ...] = ("shared", "packed", "rows", "logits")


class PairModel(nn.Module):
    """A causal language model that takes pairs and answers with their log-probabilities."""

    def __init__(self, model: nn.Module, memory: MemorySection | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = self._causal.config
        self.head = find_head(self._causal)
        memory = memory or MemorySection()
        self.chunk = None
        if memory.head_chunk != "none":
            self.chunk = chunk_rows(self.config.get_text_config().vocab_size, _number(memory.head_chunk))
        self.way: Way = "shared" if memory.prompt_sharing else "packed"
        """How packed pairs go; :func:`prove` takes a plainer one where this model needs it."""
        self.backend = "auto"
        """Of the attention in packed rows: see :class:`orpo_lite.step.attention.Layout`."""
        self.notes: list[str] = []
        """What the person should know of this model's step, a line each."""
        self._own_attention = self.config._attn_implementation

    @property
    def _causal(self) -> Any:
        """The model without peft's wrapper."""
        wrapped: Any = self.model
        return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped

    def forward(self, batch: Batch) -> PairLogps:
        """One forward pass over all pairs of a batch."""
        if isinstance(batch, PackedPairs):
            return packed_logps(self.score(batch, self.way), batch.spans)
        output = self.model(input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        return padded_logps(output.logits, batch.input_ids_RT, batch.response_RT, batch.counted_RT)

    def score(self, batch: PackedPairs, way: Way) -> Tensor:
        """Log-probabilities of the batch's scored rows by one of the ways, shape (N,)."""
        if way in ("shared", "packed"):
            hidden_TD = self._packed_hidden(batch)
        else:
            run = self.model if way == "logits" else self._causal.base_model
            outputs = (
                run(input_ids=batch.input_ids_T[start:stop].unsqueeze(0), use_cache=False)
                for start, stop, *_ in batch.segments
            )
            if way == "logits":
                logits_TV = torch.cat([output.logits[0] for output in outputs])
                return pick(at_least_float32(logits_TV[batch.rows_N]), batch.targets_N)
            hidden_TD = torch.cat([output.last_hidden_state[0] for output in outputs])
        if self.chunk is None:
            return pick(self.head.logits(hidden_TD[batch.rows_N]), batch.targets_N)
        return row_logps(hidden_TD, batch.rows_N, batch.targets_N, self.head, self.chunk)

    def _packed_hidden(self, batch: PackedPairs) -> Tensor:
        """After the last norm, shape (T, D); all segments in one row, each with its own positions."""
        layout = Layout(tuple(Segment(*numbers) for numbers in batch.segments), self.backend)
        ids, positions = batch.input_ids_T.unsqueeze(0), batch.position_ids_T.unsqueeze(0)
        with self.attending(layout):
            output = self._causal.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    @contextmanager
    def attending(self, layout: Layout | None) -> Iterator[None]:
        """Attend by segments while this lasts; by the model's own attention for None."""
        before = self.config._attn_implementation
        self.config._attn_implementation = attention.NAME if layout else self._own_attention
        try:
            with using(layout):
                yield
        finally:
            self.config._attn_implementation = before

    def batching(self, recipe: Recipe, pad_id: int) -> Batching:
        """How the recipe's pairs are to be cut for this model."""
        memory = recipe.memory
        tokens = _number(memory.micro_batch_tokens) or 2 * recipe.data.max_length
        only = recipe.loss.completion_only_loss
        return Batching(memory.packing, self.way == "shared", tokens, memory.micro_batch_size, pad_id, only)

    @property
    def device(self) -> torch.device:
        """Where a batch is to be."""
        return self.head.module.weight.device  # type: ignore[return-value]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's parameters, by name."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients, and without touching the 4-bit weights.

        A Linear4bit in eval mode repacks its weights on CPUs with AVX512-BF16 at the first forward without
        gradients, and its input loses its gradient from then on (bitsandbytes 0.50, Linear4bit.forward).
        """
        import bitsandbytes as bnb

        was_training = self.training
        self.eval()
        for module in self.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.training = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the card has it, else float16 (T4, V100), else float32 (CPU)."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_pair_model(recipe: Recipe, base: Base, device: torch.device) -> PairModel:
    """Load the base, quantised as the recipe says and frozen, with a LoRA adapter whose parameters are float32.

    ``peft.prepare_model_for_kbit_training`` is not used: it copies embeddings, head and norms to float32.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = choose_dtype(recipe.model.dtype, device)
    options: dict[str, Any] = {
        "config": _without_dropout(base.config),
        "dtype": dtype,
        "device_map": {"": str(device)},
        "use_safetensors": True,
    }
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization.load_in_4bit:
        compute = recipe.quantization.bnb_4bit_compute_dtype
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype if compute == "auto" else getattr(torch, compute),
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(base.path, output_loading_info=True, **options)
    except ImportError as error:
        found = str(error).splitlines()[0]
        raise FitError(f"model {base.name}", found, "", "quantization.load_in_4bit=false") from error
    except (OSError, SafetensorError) as error:
        found = f"its weights cannot be read: {str(error).splitlines()[0]}"
        raise ModelError(f"model {base.path}", found, "whole safetensors", "download it again") from error
    # transformers would leave these random
    lacking = [*loading["missing_keys"], *(str(name) for name, *_ in loading["mismatched_keys"]), *_misshapen(model)]
    if lacking:
        found = f"lacks {len(lacking)} weights of the right shape ({', '.join(sorted(lacking)[:3])} ...)"
        raise ModelError(f"model {base.name}", found, "all of them")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    name = recipe.model.adapter_name_or_path
    folder = find_adapter(name) if name else None
    pair_model = PairModel(_add_lora(model, recipe, folder), recipe.memory).train()
    if folder:
        set_adapter(pair_model, load_file(folder / "adapter_model.safetensors"))
    install_step(pair_model, recipe)
    if recipe.memory.packing:
        prove(pair_model, recipe.data.max_length)
    return pair_model


def _misshapen(model: nn.Module) -> list[str]:
    """4-bit layers whose weights are not of the layer's shape, which transformers looks at in other layers only."""
    import bitsandbytes as bnb

    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    return [
        f"{name}.weight"
        for name, layer in layers.items()  # in either orientation, for GPT-2 stores its matrices transposed
        if (state := getattr(layer.weight, "quant_state", None)) is not None  # a missing weight has none
        and sorted(state.shape) != sorted((layer.in_features, layer.out_features))
    ]


def _add_lora(model: nn.Module, recipe: Recipe, folder: Path | None) -> nn.Module:
    """The model with a new adapter, of the recipe's shape or of that of the adapter in ``folder``."""
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    if folder:
        config = read_adapter_config(folder)
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=True if lora.init_lora_weights == "orthogonal" else lora.init_lora_weights,
        )
    torch.manual_seed(recipe.training.seed)  # of the adapter's initialisation
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # no such layers
        raise ModelError("adapter", str(error).splitlines()[0], "layers of this base") from error
    if lora.init_lora_weights == "orthogonal" and not folder:
        _init_orthogonal(model, recipe)
    return model


@torch.no_grad()
def _init_orthogonal(model: nn.Module, recipe: Recipe) -> None:
    """peft's orthogonal_init, which takes the dtype of the base's weights and so fails on a 4-bit one."""
    from peft.tuners.lora import LoraLayer

    rank = recipe.lora.r
    if rank % 2:
        where = recipe.sources["lora.r"]
        raise RecipeError(
            where, f"lora.r={rank}", "an even number for lora.init_lora_weights=orthogonal", f"{rank + 1}"
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rows_RR = torch.linalg.qr(torch.randn(rank, rank)).Q
            a_RI.copy_(rows_RR[0::2].T @ torch.randn(rank // 2, a_RI.shape[1]) / 10)
            b_OR.copy_(torch.randn(b_OR.shape[0], rank // 2) @ rows_RR[1::2] / 10)


def _without_dropout(config: Any) -> Any:
    """The base's own dropout off, which is TRL's default; that of the adapter is lora.lora_dropout."""
    config = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


# --- the step


def install_step(model: PairModel, recipe: Recipe) -> None:
    """Give the loaded model the levers of ``memory``; none of them changes loss or gradient."""
    memory, causal = recipe.memory, model.model
    has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if memory.fused_lora and (left := fuse_lora(causal)):
        model.notes.append(f"memory.fused_lora: {len(left)} adapted layers keep peft's own operation ({left[0]} ...)")
    if memory.mlp_tile and not tile_mlps(layers, memory.mlp_tile, has_dropout=has_dropout):
        model.notes.append("memory.mlp_tile: this model has no MLP that takes tokens one by one; nothing is tiled")
    amount = memory.activation_checkpointing
    count = {"auto": len(layers), "all": len(layers), "none": 0}[amount] if isinstance(amount, str) else amount
    checkpoint_layers(layers[:count], model.attending, offload=memory.checkpoint_offload, has_dropout=has_dropout)
    if memory.embedding_on_cpu:
        embed_on_host(model._causal.get_input_embeddings())


def find_head(causal: Any) -> Head:
    """The output embedding and what transformers' models do to its logits; :func:`prove` finds what is not here."""
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(causal.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))


def _number(value: str | int) -> int | None:
    return None if isinstance(value, str) else value


# --- the proof


def prove(model: PairModel, max_length: int) -> None:
    """Let random pairs go the model's own way and ours, and take the fastest way that agrees; says so if it is another.

    The pairs are long enough to cross the smallest attention window that ``max_length`` reaches. What differs: position
    biases (ALiBi), states that run along the row (linear attention), sinks, logits that are changed by something that
    :func:`find_head` does not know.
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
        rows = _figures(model, long, "rows")
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
    dtype = model._causal.dtype
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


# --- the adapter's tensors


def adapter_tensors(model: PairModel) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model.model)
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}


def set_adapter(model: PairModel, tensors: dict[str, Tensor]) -> None:
    """Load :func:`adapter_tensors` back. Raises :class:`ModelError` when names or shapes differ."""
    from peft import set_peft_model_state_dict

    own = {name: tensor.shape for name, tensor in adapter_tensors(model).items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if differing := {name for name, _ in own.items() ^ given.items()}:
        found = f"{len(differing)} tensors have no counterpart of their shape ({min(differing)} ...)"
        raise ModelError("adapter", found, "the adapter of this recipe")
    set_peft_model_state_dict(model.model, tensors)
