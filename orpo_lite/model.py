"""The base in 4 bit with LoRA on top and the step installed, as a :class:`PairModel`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from orpo_lite.base import Base, find_adapter, read_adapter_config
from orpo_lite.data.packing import Batch, Batching, PackedPairs
from orpo_lite.errors import FitError, ModelError, Overrides, RecipeError
from orpo_lite.recipe import MemorySection, Recipe, gib
from orpo_lite.step import attention
from orpo_lite.step.attention import Layout, Segment, UnsupportedError, device_kind, pair_attention, scoreless, using
from orpo_lite.step.head import Head, chunk_rows, packed_logps, padded_logps, pick, row_logps
from orpo_lite.step.layers import checkpoint_layers, embed_on_host, tile_mlps
from orpo_lite.step.lora import fuse_lora
from orpo_lite.step.memory import is_on_host
from orpo_lite.step.outputs import PairLogps, at_least_float32

AttentionInterface.register(attention.NAME, pair_attention)
META = torch.device("meta")
SCORELESS = "orpo_lite_scoreless"  # attention of padded rows on meta

# What a model's own code raises that does not take packed rows, or does not run without values.
ITS_FAULTS = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, UnsupportedError)

Way = Literal["shared", "packed", "rows", "logits"]
"""How packed pairs go through the model, from the fastest way to the plainest. shared: one row, each prompt once.
packed: one row, each sequence whole. rows: a row a sequence, with the model's own attention. logits: so, and with the
model's own logits."""
WAYS: tuple[Way, ...] = ("shared", "packed", "rows", "logits")
SAID: dict[Way, str] = {
    "packed": "prompts are not shared",
    "rows": "pairs are neither packed nor shared: each sequence goes through the model by itself",
    "logits": "each sequence goes through the model by itself, with all its logits",
}


class PairModel(nn.Module):
    """A causal language model that takes pairs and answers with their log-probabilities."""

    outputs: frozenset[str] = frozenset({"policy_logps"})
    """What an objective may need of it: see :attr:`orpo_lite.objectives.objective.Objective.needs`."""

    def __init__(self, model: nn.Module, memory: MemorySection | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = self.causal.config
        self.head = find_head(self.causal)
        memory = memory or MemorySection()
        self.chunk = None
        if memory.head_chunk != "none":
            self.chunk = chunk_rows(self.config.get_text_config().vocab_size, _number(memory.head_chunk))
        self.way: Way = "shared" if memory.prompt_sharing else "packed"
        """How packed pairs go; ``proof.prove`` takes a plainer one where this model needs it."""
        self.backend = "auto"
        """Of the attention in packed rows: see :class:`orpo_lite.step.attention.Layout`."""
        self.planned: str | None = None
        """On meta: the kind of device that is meant."""
        self.notes: list[str] = []
        """What the person should know of this model's step, a line each."""
        decoder = self.causal.get_decoder()  # what reads pictures has layers too, and no pair goes through them
        self.layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        """The decoder layers."""
        self.checkpointed = 0
        """How many of them, from the first on, keep their input only."""
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            self.notes.append("its routers' auxiliary loss (output_router_logits) is not added: ORPO's is all")
        self.own_attention = self.config._attn_implementation

    @property
    def causal(self) -> Any:
        """The model without peft's wrapper."""
        wrapped: Any = self.model
        return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped

    @property
    def backbone(self) -> Any:
        """All but the head: hidden states after the last norm."""
        causal = self.causal
        return causal.model if causal.base_model is causal else causal.base_model  # some have a prefix of no attribute

    def forward(self, batch: Batch) -> PairLogps:
        """One forward pass over all pairs of a batch."""
        if isinstance(batch, PackedPairs):
            return packed_logps(self.score(batch, self.way), batch.spans)
        output = self.model(input_ids=batch.input_ids_RT, attention_mask=batch.attention_RT, use_cache=False)
        return padded_logps(output.logits, batch.input_ids_RT, batch.response_RT, batch.counted_RT)

    def score(self, batch: PackedPairs, way: Way) -> Tensor:
        """Log-probabilities of the batch's scored rows by one of the ways, shape (N,)."""
        if way == "logits" or self.chunk is None:
            return pick(at_least_float32(self.row_logits(batch, way)), batch.targets_N)
        return row_logps(self._hidden(batch, way), batch.rows_N, batch.targets_N, self.head, self.chunk)

    def row_logits(self, batch: PackedPairs, way: Way) -> Tensor:
        """The logits of the batch's scored rows, shape (N, V): all of them are held."""
        if way == "logits":
            return torch.cat([output.logits[0] for output in self._each_row(self.model, batch)])[batch.rows_N]
        return self.head.logits(self._hidden(batch, way)[batch.rows_N])

    def _hidden(self, batch: PackedPairs, way: Way) -> Tensor:
        """After the last norm, shape (T, D)."""
        if way in ("shared", "packed"):
            return self._packed_hidden(batch)
        return torch.cat([output.last_hidden_state[0] for output in self._each_row(self.backbone, batch)])

    @staticmethod
    def _each_row(run: Any, batch: PackedPairs) -> Iterator[Any]:
        """A sequence at a time, each by the model's own attention."""
        for start, stop, *_ in batch.segments:
            yield run(input_ids=batch.input_ids_T[start:stop].unsqueeze(0), use_cache=False)

    def _packed_hidden(self, batch: PackedPairs) -> Tensor:
        """After the last norm, shape (T, D); all segments in one row, each with its own positions."""
        layout = Layout(tuple(Segment(*numbers) for numbers in batch.segments), self.backend, self.planned)
        ids, positions = batch.input_ids_T.unsqueeze(0), batch.position_ids_T.unsqueeze(0)
        with self.attending(layout):
            output = self.backbone(input_ids=ids, position_ids=positions, use_cache=False)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    @contextmanager
    def attending(self, layout: Layout | None) -> Iterator[None]:
        """Attend by segments while this lasts; by the model's own attention for None."""
        before = self.config._attn_implementation
        self.config._attn_implementation = attention.NAME if layout else self.own_attention
        try:
            with using(layout):
                yield
        finally:
            self.config._attn_implementation = before

    def take(self, way: Way, reason: str) -> None:
        """Let packed pairs go a plainer way from now on, and note why."""
        self.notes.append(f"{SAID[way]}, because {reason}")
        self.way = way

    def batching(self, recipe: Recipe, pad_id: int) -> Batching:
        """How the recipe's pairs are to be cut for this model."""
        return Batching(
            packed=recipe.memory.packing,
            share=recipe.memory.packing and self.way == "shared",
            tokens=recipe.micro_batch_tokens,
            pairs=recipe.memory.micro_batch_size,
            pad_id=pad_id,
            completion_only_loss=recipe.loss.completion_only_loss,
        )

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

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Training as it is, but for the noise; gradients flow."""
        noisy = [module for module in self.modules() if isinstance(module, nn.Dropout) and module.training]
        for module in noisy:
            module.eval()
        try:
            yield
        finally:
            for module in noisy:
                module.train()


def choose_dtype(name: str, kind: str) -> torch.dtype:
    """``auto``: bfloat16 where the card has it, else float16 (T4, V100), else float32 (CPU).

    ``kind`` of a device is what :func:`orpo_lite.step.attention.device_kind` says.
    """
    by_kind = {"ampere": torch.bfloat16, "cuda": torch.float16, "cpu": torch.float32}
    dtype: torch.dtype = by_kind[kind] if name == "auto" else getattr(torch, name)
    return dtype


def load_pair_model(recipe: Recipe, base: Base, device: torch.device) -> PairModel:
    """Load the base, quantised as the recipe says and frozen, with a LoRA adapter whose parameters are float32.

    ``peft.prepare_model_for_kbit_training`` is not used: it copies embeddings, head and norms to float32.
    """
    model = load_base(recipe, base, device)
    name = recipe.model.adapter_name_or_path
    folder = find_adapter(name) if name else None
    pair_model = _with_step(model, recipe, folder)
    how = getattr(model.config, "quantization_config", None)
    if left := getattr(how, "llm_int8_skip_modules", None):
        said = f"{left[0]} and such stay as they are: on this CPU bitsandbytes' kernel errs on rows of their width"
        pair_model.notes.append(f"quantization.load_in_4bit: {said}")
    if folder:
        set_adapter(pair_model, load_file(folder / "adapter_model.safetensors"))
    return pair_model


def bare_pair_model(recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META) -> PairModel:
    """The same model from its configuration alone: on meta shapes and storages only, elsewhere random weights."""
    return _with_step(bare_base(recipe, config, dtype, device), recipe, None)


def bare_base(recipe: Recipe, config: Any, dtype: torch.dtype, device: torch.device = META) -> Any:
    """The base of :func:`bare_pair_model`, quantised as the recipe says."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(_without_dropout(config), dtype=dtype)
    if device == META:
        model.config.pad_token_id = None  # some models look for it among the tokens, which have no values here
    if recipe.quantization.load_in_4bit:
        _quantise(model, recipe, dtype)
    return model


def _with_step(model: nn.Module, recipe: Recipe, folder: Path | None) -> PairModel:
    """Frozen, with its adapter and the levers of ``memory``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    experts = sum(p.nbytes for n, p in model.named_parameters() if "expert" in n and p.ndim == 3)  # a layer's in one
    pair_model = PairModel(_add_lora(model, recipe, folder), recipe.memory).train()
    if recipe.quantization.load_in_4bit and experts:
        said = f"{gib(experts)} of its experts stay as they are: bitsandbytes quantises linear layers only"
        pair_model.notes.append(f"quantization.load_in_4bit: {said}")
    install_step(pair_model, recipe)
    return pair_model


def load_base(recipe: Recipe, base: Base, device: torch.device) -> nn.Module:
    """The base alone, loaded as the recipe says. Raises FitError, ModelError."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = choose_dtype(recipe.model.dtype, device_kind(device))
    options: dict[str, Any] = {
        "config": _without_dropout(base.config),
        "dtype": dtype,
        "device_map": {"": str(device)},
        "use_safetensors": True,
    }
    if recipe.model.attn_implementation:
        options["attn_implementation"] = recipe.model.attn_implementation
    if recipe.quantization.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped_modules(recipe, base.config, device) or None,  # its name for 4 bit too
            bnb_4bit_quant_type=recipe.quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=recipe.quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=_compute_dtype(recipe, dtype),
        )
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(base.path, output_loading_info=True, **options)
    except ImportError as error:
        found = str(error).splitlines()[0]
        raise FitError(
            where=f"model {base.name}", found=found, fix=Overrides({"quantization.load_in_4bit": False})
        ) from error
    except (OSError, SafetensorError) as error:
        found = f"its weights cannot be read: {str(error).splitlines()[0]}"
        raise ModelError(
            where=f"model {base.path}", found=found, expected="whole safetensors", fix="download it again"
        ) from error
    # transformers would leave these random
    lacking = [*loading["missing_keys"], *(str(name) for name, *_ in loading["mismatched_keys"]), *_misshapen(model)]
    if lacking:
        found = f"lacks {len(lacking)} weights of the right shape ({', '.join(sorted(lacking)[:3])} ...)"
        raise ModelError(where=f"model {base.name}", found=found, expected="all of them")
    loaded: nn.Module = model
    return loaded


def skipped_modules(recipe: Recipe, config: Any, device: torch.device) -> list[str]:
    """transformers' ``llm_int8_skip_modules``: layers for which bitsandbytes' kernel is wrong here, and heads.

    Its kernel for CPUs (0.50) dequantises rows of an odd multiple of 32 elements wrongly. [] where nothing is wrong.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    if device.type != "cpu" or not recipe.quantization.load_in_4bit:
        return []
    with META:
        model = AutoModelForCausalLM.from_config(config)
    widths = {name: _shape(layer)[0] for name, layer in quantisable(model).items()}
    wrong = {width for width in set(widths.values()) if _is_wrong(width)}
    names = [name for name, width in widths.items() if width in wrong]
    return [*names, *(name for name in get_keys_to_not_convert(model) if name not in names)] if names else []


def quantisable(model: Any) -> dict[str, Any]:
    """The layers that transformers puts into 4 bit, by name: plain linear ones, GPT-2's Conv1D too, but no head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or is_transposed(module)) and module is not head
    }


def is_transposed(layer: Any) -> bool:
    """Whether a layer's matrix is (inputs, outputs), as GPT-2's are."""
    return type(layer).__name__ == "Conv1D"


def _shape(layer: Any) -> tuple[int, int]:
    """(inputs, outputs)."""
    rows, columns = layer.weight.shape
    return (rows, columns) if is_transposed(layer) else (columns, rows)


def _is_wrong(width: int) -> bool:
    """Whether rows of so many elements come back from 4 bit otherwise than the same elements as one row do."""
    from bitsandbytes import functional

    matrix = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    quantised = (functional.quantize_4bit(part, quant_type="nf4") for part in (matrix, matrix.view(1, -1)))
    rows, row = (functional.dequantize_4bit(*pair) for pair in quantised)
    return not torch.equal(rows.flatten(), row.flatten())


def _compute_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    name = recipe.quantization.bnb_4bit_compute_dtype
    compute: torch.dtype = dtype if name == "auto" else getattr(torch, name)
    return compute


def _quantise(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """What loading with a BitsAndBytesConfig does: every linear layer but the head as a Linear4bit."""
    import bitsandbytes as bnb

    settings = recipe.quantization
    # bitsandbytes keeps this table from its first use on, wherever it was made; on meta it would spoil a later loading.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    options = {"compress_statistics": settings.bnb_4bit_use_double_quant, "quant_type": settings.bnb_4bit_quant_type}
    for name, layer in quantisable(model).items():
        weight = layer.weight.data.t().contiguous() if is_transposed(layer) else layer.weight.data
        packed, state = bnb.functional.quantize_4bit(weight, **options)
        compute, bias = _compute_dtype(recipe, dtype), layer.bias
        linear = bnb.nn.Linear4bit(*_shape(layer), bias is not None, compute, **options, device=weight.device)
        linear.source_cls = type(layer)  # as transformers notes it
        linear.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear, **options
        )
        if bias is not None:
            linear.bias = bias
        model.set_submodule(name, linear)


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
            exclude_modules=_not_adapted(model) or None,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=True if lora.init_lora_weights == "orthogonal" else lora.init_lora_weights,
        )
    torch.manual_seed(recipe.training.seed)  # of the adapter's initialisation
    here = next(model.parameters()).device
    try:
        with here if here == META else nullcontext():  # else each matrix is made in memory, to be dropped
            model = get_peft_model(model, config)
    except ValueError as error:
        if "ParamWrapper" in str(error):  # of a mixture's experts, which are no layers of their own
            found = "adapts experts, which takes neither DoRA nor dropout"
            fix = Overrides(
                {"lora.use_dora": False, "lora.lora_dropout": 0}, ", or lora.target_modules=q_proj,k_proj,v_proj,o_proj"
            )
            raise ModelError(where="adapter", found=found, expected="plain LoRA there", fix=fix) from error
        raise ModelError(where="adapter", found=str(error).splitlines()[0], expected="layers of this base") from error
    if lora.init_lora_weights == "orthogonal" and not folder:
        _init_orthogonal(model, recipe)
    return model


def _not_adapted(model: Any) -> list[str]:
    """Layers that peft would adapt in vain: those that read pictures or sound, through which no pair goes; and routers
    that are linear layers by birth and return more than one tensor."""
    inside = set(model.get_decoder().modules())
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module not in inside and module is not model.get_output_embeddings())
        or "router" in type(module).__name__.lower()
    ]


@torch.no_grad()
def _init_orthogonal(model: nn.Module, recipe: Recipe) -> None:
    """peft's orthogonal_init, which takes the dtype of the base's weights and so fails on a 4-bit one."""
    from peft.tuners.lora import LoraLayer

    rank = recipe.lora.r
    if rank % 2:
        where = recipe.sources["lora.r"]
        raise RecipeError(
            where=where,
            found=f"lora.r={rank}",
            expected="an even number for lora.init_lora_weights=orthogonal",
            fix=f"{rank + 1}",
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
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            noise = any(word in key for word in ("dropout", "pdrop", "layerdrop", "jitter"))
            if noise and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


# --- on meta, for a plan


def scoreless_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Attention's output and what it keeps (queries, keys, values, output, one number a query and head), no scores."""
    return scoreless(query, key, value).transpose(1, 2), None


AttentionInterface.register(SCORELESS, scoreless_attention)


def held(model: nn.Module) -> dict[str, list[Tensor]]:
    """The tensors that a model keeps on its device through all steps, each storage once."""
    parts: dict[str, list[Tensor]] = {"base": [], "embeddings, head, norms": [], "adapter": []}
    own: Any = model.causal if isinstance(model, PairModel) else model
    ends = [module.weight for module in (own.get_input_embeddings(), own.get_output_embeddings()) if module]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts["base"] += [parameter, state.absmax, state.code, state.offset]
            parts["base"] += [state.state2.absmax, state.state2.code] if state.nested else []
        elif parameter.requires_grad:
            parts["adapter"].append(parameter)
        else:
            is_end = parameter.ndim < 2 or any(parameter is end for end in ends)
            parts["embeddings, head, norms" if is_end else "base"].append(parameter)
    parts["embeddings, head, norms"] += model.buffers()
    seen: set[torch.UntypedStorage] = set()
    for name, tensors in parts.items():
        here = (t for t in tensors if isinstance(t, Tensor) and not (t.is_meta and is_on_host(t)))
        parts[name] = [t for t in here if not (t.untyped_storage() in seen or seen.add(t.untyped_storage()))]  # type: ignore[func-returns-value]
    return parts


# --- the step


def install_step(model: PairModel, recipe: Recipe) -> None:
    """Give the loaded model the levers of ``memory``; none of them changes loss or gradient."""
    memory = recipe.memory.unplanned()
    if memory.fused_lora and (left := fuse_lora(model.model)):
        model.notes.append(f"memory.fused_lora: {len(left)} adapted layers keep peft's own operation ({left[0]} ...)")
    if isinstance(memory.mlp_tile, int):
        tiled = tile_mlps(model.layers, memory.mlp_tile, has_dropout=has_dropout(model))
        if tiled < len(model.layers) or not tiled:
            which = f"{len(model.layers) - tiled} of {len(model.layers)} layers have" if tiled else "this model has"
            model.notes.append(f"memory.mlp_tile: {which} no MLP that takes tokens one by one; nothing is tiled there")
    if not model.layers and memory.checkpointed(1):
        said = "this model's layers cannot run again; each keeps all that its backward pass needs"
        model.notes.append(f"memory.activation_checkpointing: {said}")
    checkpoint_first(model, recipe)
    if memory.embedding_on_cpu:
        embed_on_host(model.causal.get_input_embeddings())


def checkpoint_first(model: PairModel, recipe: Recipe) -> None:
    """Let so many of the first layers as the recipe says keep their input only; later on, more of them."""
    memory = recipe.memory.unplanned()
    model.checkpointed = memory.checkpointed(len(model.layers))
    layers, offload = model.layers[: model.checkpointed], bool(memory.checkpoint_offload)
    checkpoint_layers(layers, model.attending, offload=offload, has_dropout=has_dropout(model))


def has_dropout(model: nn.Module) -> bool:
    """Whether a second run of a layer needs the random state of the first."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def find_head(causal: Any) -> Head:
    """The output embedding and what transformers' models do to its logits; ``proof.prove`` finds what is not here."""
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(causal.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))


def _number(value: str | int) -> int | None:
    return None if isinstance(value, str) else value


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
        raise ModelError(where="adapter", found=found, expected="the adapter of this recipe")
    set_peft_model_state_dict(model.model, tensors)
