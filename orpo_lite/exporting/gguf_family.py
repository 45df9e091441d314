"""Convert a model's configuration to GGUF keys, and its tensor names to llama.cpp's names.

``FAMILIES`` names the model graph of llama.cpp for each supported ``model_type``. If a
configuration has a feature that this graph does not support, the export is refused. Without this
check, llama.cpp would load the file without an error, but give slightly worse answers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orpo_lite.base.blocks import Stored, in_blocks, read_rows
from orpo_lite.errors import ModelError

VLLM = "orpo-lite export RUN --to vllm"  # the fix for models that llama.cpp cannot run
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """How llama.cpp differs from transformers for one ``model_type``."""

    arch: str
    """llama.cpp's name for the model graph."""
    pairs_adjacent: bool = False
    """True if the export must reorder the rows of the q and k projections.

    llama.cpp expects the two rows of a rotary pair next to each other. In transformers they are
    half a head apart."""
    norm_adds_one: bool = False
    """True if a norm multiplies by 1 + weight in transformers, but by weight in llama.cpp."""
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """The projections for which llama.cpp supports a bias."""
    full_attention_every: int = 0
    """If n > 0, layers n, 2n, ... have full attention and all other layers a sliding window.

    If 0, llama.cpp supports no sliding window for the family."""


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", pairs_adjacent=True, biases=(*ATTENTION, "self_attn.o_proj", *MLP)),
    "mistral": Family("llama", pairs_adjacent=True),
    "qwen2": Family("qwen2", biases=ATTENTION),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", norm_adds_one=True, activation=GELU),
    "gemma2": Family("gemma2", norm_adds_one=True, activation=GELU, full_attention_every=2),
    "gemma3_text": Family("gemma3", norm_adds_one=True, activation=GELU, full_attention_every=6),
}
# Model types that have an image encoder and a language model of one of these families.
MULTIMODAL = ("gemma3",)
# Prefixes of the language model's tensor names, in older and newer files.
LANGUAGE_MODEL = ("language_model.model.", "model.language_model.")


@dataclass
class Description:
    """A model's GGUF keys, and the values that the conversion of its tensors needs."""

    family: Family
    keys: dict[str, Any]
    """GGUF key -> value."""
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensor name -> divisors of the rotary frequencies, computed from the configuration."""
    notes: list[str] = field(default_factory=list)
    """Messages to the user about differences between llama.cpp and transformers."""
    layers: int = 0
    head_dim: int = 0
    tied: bool = False
    is_multimodal: bool = False
    """True if the model also has an image encoder. Only the language model is exported."""


@dataclass(frozen=True)
class Target:
    """A tensor of the GGUF file: its name, its source tensor and its conversion."""

    name: str
    stored: Stored
    head_dim: int = 0
    """The head size if the rows of a q or k projection must be reordered, else 0."""
    add: float = 0.0
    """The number that the conversion adds to each weight."""

    def convert(self, block_RC: np.ndarray) -> np.ndarray:
        """Convert a block of float32 rows of shape (R, C) to llama.cpp's form.

        If ``head_dim`` is set, the block must contain only complete heads.
        """
        if self.head_dim:
            block_RC = _rotary_pairs_adjacent(
                block_RC.reshape(-1, self.head_dim, self.stored_columns)
            )
        return block_RC + np.float32(self.add) if self.add else block_RC

    @property
    def stored_columns(self) -> int:
        """Return the number of columns, or 1 for a vector."""
        return self.stored.shape[1] if len(self.stored.shape) == 2 else 1

    @property
    def is_matrix(self) -> bool:
        """Return True if the tensor has two dimensions."""
        return len(self.stored.shape) == 2


def _rotary_pairs_adjacent(heads_HDC: np.ndarray) -> np.ndarray:
    """Reorder the rows of each head to 0, D/2, 1, D/2 + 1, ...

    The heads have shape (H, D, C). The result has shape (H * D, C), or (1, H * D) for a bias.
    """
    H, D, C = heads_HDC.shape
    permuted = heads_HDC.reshape(H, 2, D // 2, C).swapaxes(1, 2).reshape(H * D, C)
    return permuted if C > 1 else permuted.reshape(1, -1)


def describe(config: Any, where: str) -> Description:
    """Return a model's GGUF keys, which are made from its configuration.

    Args:
        config: the configuration from transformers.
        where: the name of the model for error messages.

    Raises:
        ModelError: ``FAMILIES`` does not contain the ``model_type``, or llama.cpp does not support
            a feature of the model.
    """
    is_multimodal = config.model_type in MULTIMODAL
    config = config.get_text_config() if is_multimodal else config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            where=where,
            found=f"orpo-lite cannot export model_type {config.model_type!r} to GGUF",
            expected=f"one of these model types: {', '.join(FAMILIES)}",
            fix=f"{VLLM}, or use llama.cpp's own converter",
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    has_own_key = family.arch in ("gemma2", "gemma3")
    activation = config.hidden_activation if has_own_key else config.hidden_act
    if activation != family.activation:
        raise _beyond(
            where, f"the activation {activation!r}", f"the activation {family.activation!r}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise _beyond(where, "bidirectional attention", "causal attention")
    arch = family.arch
    keys: dict[str, Any] = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.vocab_size": config.vocab_size,
    }
    made = Description(family, keys, layers=config.num_hidden_layers, head_dim=head_dim)
    made.tied = bool(config.tie_word_embeddings)
    made.is_multimodal = is_multimodal
    if is_multimodal:
        made.notes.append("the file holds only the language model, without the image encoder")
    if arch in ("qwen2", "phi3") and head_dim * heads != config.hidden_size:
        found = f"{heads} heads of size {head_dim} with hidden_size {config.hidden_size}"
        raise _beyond(where, found, "num_attention_heads * head_dim = hidden_size")
    if arch in ("gemma", "gemma2") and not made.tied:
        raise _beyond(where, "an untied output head", "an output head tied to the embedding")
    if arch in ("gemma2", "gemma3"):
        _gemma_keys(made, config, where)
    _window_keys(made, config, where)
    _rope_keys(made, config, where)
    return made


def _beyond(where: str, found: str, expected: str) -> ModelError:
    """Return the error for a feature that llama.cpp does not support.

    ``found`` is a noun phrase that describes the feature.
    """
    return ModelError(
        where=where,
        found=f"llama.cpp does not support {found} for this model family",
        expected=expected,
        fix=VLLM,
    )


def _gemma_keys(made: Description, config: Any, where: str) -> None:
    arch, keys = made.family.arch, made.keys
    # llama.cpp recognises the 27B by its layer count and scales its attention scores differently.
    layers_of_27b = 46 if arch == "gemma2" else 62
    scaled_by = made.head_dim
    if made.layers == layers_of_27b:
        scaled_by = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scaled_by:
        raise _beyond(
            where,
            f"query_pre_attn_scalar: {config.query_pre_attn_scalar}",
            f"query_pre_attn_scalar: {scaled_by}",
        )
    if cap := config.attn_logit_softcapping:
        if arch == "gemma3":
            raise _beyond(where, f"attn_logit_softcapping: {cap}", "attn_logit_softcapping: null")
        keys[f"{arch}.attn_logit_softcapping"] = float(cap)
    elif arch == "gemma2":
        raise _beyond(where, "attn_logit_softcapping: null", "a number for attn_logit_softcapping")
    if cap := config.final_logit_softcapping:
        keys[f"{arch}.final_logit_softcapping"] = float(cap)
    elif arch == "gemma2":
        raise _beyond(
            where, "final_logit_softcapping: null", "a number for final_logit_softcapping"
        )


def _window_keys(made: Description, config: Any, where: str) -> None:
    """Add the keys of sliding windows.

    If llama.cpp has no sliding window for the family, limit the context to the window instead.
    """
    arch, keys = made.family.arch, made.keys
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []
    slides = [layer_type == "sliding_attention" for layer_type in types] or [True] * made.layers
    if set(types) - {"sliding_attention", "full_attention"}:
        found = f"layer_types of {', '.join(sorted(set(types)))}"
        raise _beyond(where, found, "only full_attention and sliding_attention")
    if made.family.full_attention_every:
        keys[f"{arch}.attention.sliding_window"] = int(window or 0)
        every = made.family.full_attention_every
        usual = [(layer + 1) % every != 0 for layer in range(made.layers)]
        if slides != usual:
            keys[f"{arch}.attention.sliding_window_pattern"] = slides
    elif window and any(slides) and window < keys[f"{arch}.context_length"]:
        keys[f"{arch}.context_length"] = window
        made.notes.append(
            f"llama.cpp has no sliding window for {arch}: the context is limited to the window "
            f"size of {window:,} tokens, because up to this length the results are the same"
        )


def _rope_keys(made: Description, config: Any, where: str) -> None:
    arch, keys = made.family.arch, made.keys
    rope = dict(config.rope_parameters or {})
    if "full_attention" in rope:  # Gemma 3: parameters for each layer type
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _beyond(
                where,
                f"rope_type {local['rope_type']!r} in sliding-window layers",
                "rope_type 'default'",
            )
        keys[f"{arch}.rope.freq_base_swa"] = float(local["rope_theta"])
        rope = dict(rope["full_attention"])
    theta, rope_type = float(rope["rope_theta"]), rope.get("rope_type", "default")
    rotated = int(made.head_dim * rope.get("partial_rotary_factor", 1.0))
    if rotated != made.head_dim and arch != "phi3":
        factor = rope["partial_rotary_factor"]
        raise _beyond(where, f"partial_rotary_factor: {factor}", "partial_rotary_factor: 1")
    keys[f"{arch}.rope.dimension_count"] = rotated
    keys[f"{arch}.rope.freq_base"] = theta
    if rope_type != "default":
        _scaling_keys(made, config, rope, where)


SCALINGS = {
    "llama": ("linear", "yarn", "llama3", "dynamic"),
    "gemma3": ("linear",),
    "phi3": ("longrope",),
}


def _scaling_keys(made: Description, config: Any, rope: dict[str, Any], where: str) -> None:
    arch, keys, rope_type = made.family.arch, made.keys, rope["rope_type"]
    allowed = SCALINGS.get(arch, ("linear", "yarn", "dynamic"))
    if rope_type not in allowed:
        raise _beyond(where, f"rope_type {rope_type!r}", f"one of default, {', '.join(allowed)}")
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    original = int(original or config.max_position_embeddings)
    if rope_type == "dynamic":
        keys[f"{arch}.context_length"] = min(original, keys[f"{arch}.context_length"])
        made.notes.append(
            f"llama.cpp has no dynamic rope: the context is limited to {original:,} tokens, "
            "because dynamic rope changes the frequencies only for longer texts"
        )
        return
    scaled, attention = _frequencies(config, rope_type)
    if rope_type == "llama3":
        unscaled = float(rope["rope_theta"]) ** -(np.arange(0, made.head_dim, 2) / made.head_dim)
        made.factors["rope_freqs.weight"] = (unscaled / scaled).astype(np.float32)
        return
    factor = float(factor or config.max_position_embeddings / original)
    keys[f"{arch}.rope.scaling.type"] = rope_type
    # With longrope, llama.cpp would divide by this key and also by the factors of each frequency.
    if rope_type != "longrope":
        keys[f"{arch}.rope.scaling.factor"] = factor
    if rope_type == "linear":
        return
    keys[f"{arch}.rope.scaling.original_context_length"] = original
    if rope_type == "yarn":
        for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            if rope.get(key) not in (None, usual):
                raise _beyond(where, f"{key}: {rope[key]} with yarn", f"{key}: {usual}")
        # llama.cpp multiplies by yarn's default factor itself, so this key has only the rest.
        keys[f"{arch}.rope.scaling.attn_factor"] = attention / (0.1 * math.log(factor) + 1.0)
        return
    keys[f"{arch}.rope.scaling.attn_factor"] = attention
    for length in ("long", "short"):
        made.factors[f"rope_factors_{length}.weight"] = np.asarray(
            rope[f"{length}_factor"], np.float32
        )
    made.notes.append(
        "llama.cpp chooses the rope factors once, when it starts: the short factors if its context "
        f"size is at most {original:,} tokens, else the long factors"
    )


def _frequencies(config: Any, rope_type: str) -> tuple[np.ndarray, float]:
    """Return the rotary frequencies and the attention factor, as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    has_types = "full_attention" in config.rope_parameters
    options = {"layer_type": "full_attention"} if has_types else {}
    scaled, attention = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", **options)
    return scaled.double().numpy(), float(attention)


def find_targets(
    made: Description, config: Any, tensors: dict[str, Stored], where: str
) -> list[Target]:
    """Return the tensors for the GGUF file, with llama.cpp's names and sorted by layer.

    Raises:
        ModelError: llama.cpp does not support a tensor, a tensor is missing, or the shape of a
            tensor does not fit the configuration.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == made.family.arch)
    names = get_tensor_name_map(arch, made.layers)
    targets = []
    is_tied = made.tied and not _has_own_head(tensors)
    # If embedding and head are tied, the files may hold only the head.
    only_head = made.tied and not any(name.endswith("embed_tokens.weight") for name in tensors)
    for stored in _in_order(tensors.values()):
        source = _language_model_name(stored.name) if made.is_multimodal else stored.name
        if only_head and source == "lm_head.weight":
            source = "model.embed_tokens.weight"
        if not source or source.endswith("rotary_emb.inv_freq"):  # llama.cpp computes frequencies
            continue
        if is_tied and source == "lm_head.weight":
            continue
        module, _, suffix = source.rpartition(".")
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        is_allowed = suffix == "weight" or module.endswith(made.family.biases)
        if name is None or not is_allowed or len(stored.shape) not in (1, 2):
            raise ModelError(
                where=where,
                found=f"llama.cpp does not support the tensor {stored.name}",
                expected=f"only tensors that llama.cpp supports for {made.family.arch} models",
            )
        head_dim = 0
        if made.family.pairs_adjacent and module.endswith(ATTENTION[:2]):
            head_dim = made.head_dim
            if stored.shape[0] % head_dim:
                raise ModelError(
                    where=where,
                    found=f"the tensor {stored.name} has {stored.shape[0]} rows",
                    expected=f"a multiple of {head_dim} rows, because the head size is {head_dim}",
                )
        adds_one = made.family.norm_adds_one and module.endswith("norm")
        targets.append(Target(name, stored, head_dim, float(adds_one)))
    _check_shapes(config, names, {target.name: target.stored for target in targets}, where)
    return targets


def _check_shapes(config: Any, names: Any, found: Mapping[str, Stored], where: str) -> None:
    """Raise :class:`ModelError` for missing tensors and shapes that do not fit the configuration.

    Without this check, llama.cpp would fail later, when it loads the file.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # a tied head is not among them
        stored = found.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        shape = None if stored is None else "x".join(map(str, stored.shape))
        expected = "x".join(map(str, parameter.shape))
        if shape != expected:
            raise ModelError(
                where=where,
                found=(
                    f"the tensor {name} is missing"
                    if shape is None
                    else f"the tensor {name} has the shape {shape}"
                ),
                expected=f"the shape {expected}, which follows from config.json",
                fix="run orpo-lite merge RUN to write the merged model again",
            )


def _has_own_head(tensors: Mapping[str, Stored]) -> bool:
    """Return True if the files hold an output head that differs from the embedding.

    transformers uses such a head even if config.json says that head and embedding are tied.
    """
    heads = [stored for name, stored in tensors.items() if name.endswith("lm_head.weight")]
    inputs = [stored for name, stored in tensors.items() if name.endswith("embed_tokens.weight")]
    if not heads or not inputs or heads[0].shape != inputs[0].shape:
        return bool(heads)
    pairs = zip(in_blocks(heads[0]), in_blocks(inputs[0]), strict=True)
    return not all(torch.equal(read_rows(head), read_rows(embed)) for head, embed in pairs)


def _language_model_name(name: str) -> str:
    """Return a tensor's name in the language model, or "" if it belongs to another part."""
    for prefix in LANGUAGE_MODEL:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return "lm_head.weight" if name.endswith("lm_head.weight") else ""


def _in_order(tensors: Any) -> Iterator[Stored]:
    """Yield tensors by layer number, then by name: layer 2 comes before layer 10."""

    def layer_and_name(stored: Stored) -> tuple[int, str]:
        parts = stored.name.split(".")
        numbers = [int(part) for part in parts if part.isdigit()]
        return (numbers[0] if numbers and "layers" in parts else -1), stored.name

    yield from sorted(tensors, key=layer_and_name)
