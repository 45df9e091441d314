"""What llama.cpp must be told of a model: its sizes as keys, its tensors by llama.cpp's names.

A family is one entry of ``FAMILIES``. What a configuration asks for and llama.cpp's graph of that family does not do
is refused: a file that loads and answers a little worse would be noticed by nobody.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from orpo_lite.base.blocks import Stored, in_blocks, read_rows
from orpo_lite.errors import ModelError

VLLM = "orpo-lite export RUN --to vllm"  # what remains where llama.cpp cannot
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """How llama.cpp sees one model_type of transformers."""

    arch: str
    pairs_adjacent: bool = False
    """Rotary pairs lie side by side there, half a head apart here: the rows of q and k change places."""
    norm_adds_one: bool = False
    """transformers multiplies by 1 + weight, llama.cpp by the weight."""
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    """The projections whose bias llama.cpp adds."""
    windows: int = 0
    """Every which layer attends to all; 0: llama.cpp knows no sliding window for it."""


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", pairs_adjacent=True, biases=(*ATTENTION, "self_attn.o_proj", *MLP)),
    "mistral": Family("llama", pairs_adjacent=True),
    "qwen2": Family("qwen2", biases=ATTENTION),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "gemma": Family("gemma", norm_adds_one=True, activation=GELU),
    "gemma2": Family("gemma2", norm_adds_one=True, activation=GELU, windows=2),
    "gemma3_text": Family("gemma3", norm_adds_one=True, activation=GELU, windows=6),
}
WITH_PICTURES = (
    "gemma3",
)  # a language model of one of these families, with what turns pictures into tokens
LANGUAGE_MODEL = (
    "language_model.model.",
    "model.language_model.",
)  # what its names begin with, by age


@dataclass
class Description:
    """A model as llama.cpp reads it."""

    family: Family
    keys: dict[str, Any]
    """Keys of the file and their values."""
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensors that come out of the configuration: what the rotary frequencies are divided by."""
    notes: list[str] = field(default_factory=list)
    """What is not quite the same there, for the person to know."""
    layers: int = 0
    head_dim: int = 0
    tied: bool = False
    pictures: bool = False
    """The model is more than a language model; the rest of it is left out."""


@dataclass(frozen=True)
class Target:
    """A tensor of the file to be: where it comes from and what happens to it on the way."""

    name: str
    stored: Stored
    head_dim: int = 0
    """Of a q or k whose rows change places; else 0."""
    add: float = 0.0

    def convert(self, block_RC: np.ndarray) -> np.ndarray:
        """Some rows, in float32, as llama.cpp wants them; of q and k whole heads."""
        if self.head_dim:
            block_RC = _rotary_pairs_adjacent(
                block_RC.reshape(-1, self.head_dim, self.stored_columns)
            )
        return block_RC + np.float32(self.add) if self.add else block_RC

    @property
    def stored_columns(self) -> int:
        return self.stored.shape[1] if len(self.stored.shape) == 2 else 1

    @property
    def is_matrix(self) -> bool:
        return len(self.stored.shape) == 2


def _rotary_pairs_adjacent(heads_HDC: np.ndarray) -> np.ndarray:
    """Rows 0, 1, ... and D/2, D/2 + 1, ... of each head, dealt in turn; [H x D, C], of a bias [1, H x D]."""
    H, D, C = heads_HDC.shape
    dealt = heads_HDC.reshape(H, 2, D // 2, C).swapaxes(1, 2).reshape(H * D, C)
    return dealt if C > 1 else dealt.reshape(1, -1)


def describe(config: Any, where: str) -> Description:
    """The keys of a model, from its transformers configuration.

    Raises:
        ModelError: a family that this export does not know, or something that llama.cpp does not do for it.
    """
    pictures = config.model_type in WITH_PICTURES
    config = config.get_text_config() if pictures else config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            where=where,
            found=f"model_type {config.model_type!r} has no export to GGUF here",
            expected=f"one of {', '.join(FAMILIES)}",
            fix=f"{VLLM}, or llama.cpp's own converter",
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    activation = (
        config.hidden_activation if family.arch in ("gemma2", "gemma3") else config.hidden_act
    )
    if activation != family.activation:
        raise _beyond(where, f"the activation {activation!r}", family.activation)
    if getattr(config, "use_bidirectional_attention", None):
        raise _beyond(where, "attention in both directions", "causal attention")
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
    made.pictures = pictures
    if pictures:
        made.notes.append("what reads pictures is left out: the file holds the language model")
    if arch in ("qwen2", "phi3") and head_dim * heads != config.hidden_size:
        raise _beyond(
            where,
            f"{heads} heads of {head_dim} in a state of {config.hidden_size}",
            "heads that fill it",
        )
    if arch in ("gemma", "gemma2") and not made.tied:
        raise _beyond(where, "an output matrix of its own", "the embedding's")
    if arch in ("gemma2", "gemma3"):
        _gemma_keys(made, config, where)
    _window_keys(made, config, where)
    _rope_keys(made, config, where)
    return made


def _beyond(where: str, found: str, expected: str) -> ModelError:
    return ModelError(
        where=where,
        found=f"{found}, which llama.cpp does not do for this family",
        expected=expected,
        fix=VLLM,
    )


def _gemma_keys(made: Description, config: Any, where: str) -> None:
    arch, keys = made.family.arch, made.keys
    largest = (
        46 if arch == "gemma2" else 62
    )  # llama.cpp tells the 27B by its layers, and scales its scores otherwise
    scaled_by = (
        config.hidden_size // config.num_attention_heads
        if made.layers == largest
        else made.head_dim
    )
    if config.query_pre_attn_scalar != scaled_by:
        raise _beyond(
            where, f"query_pre_attn_scalar: {config.query_pre_attn_scalar}", f"{scaled_by}"
        )
    if cap := config.attn_logit_softcapping:
        if arch == "gemma3":
            raise _beyond(where, f"attn_logit_softcapping: {cap}", "none")
        keys[f"{arch}.attn_logit_softcapping"] = float(cap)
    elif arch == "gemma2":
        raise _beyond(where, "attn_logit_softcapping: null", "a number")
    if cap := config.final_logit_softcapping:
        keys[f"{arch}.final_logit_softcapping"] = float(cap)
    elif arch == "gemma2":
        raise _beyond(where, "final_logit_softcapping: null", "a number")


def _window_keys(made: Description, config: Any, where: str) -> None:
    """Sliding windows: told where llama.cpp has them; elsewhere the context ends where the window would begin to."""
    arch, keys = made.family.arch, made.keys
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    slides = [kind == "sliding_attention" for kind in kinds] or [True] * made.layers
    if set(kinds) - {"sliding_attention", "full_attention"}:
        raise _beyond(
            where, f"layer_types of {', '.join(sorted(set(kinds)))}", "full or sliding attention"
        )
    if made.family.windows:
        keys[f"{arch}.attention.sliding_window"] = int(window or 0)
        usual = [(layer + 1) % made.family.windows != 0 for layer in range(made.layers)]
        if slides != usual:
            keys[f"{arch}.attention.sliding_window_pattern"] = slides
    elif window and any(slides) and window < keys[f"{arch}.context_length"]:
        keys[f"{arch}.context_length"] = window
        made.notes.append(
            f"llama.cpp has no sliding window for {arch}: the context is {window:,} tokens; up to there all is the same"
        )


def _rope_keys(made: Description, config: Any, where: str) -> None:
    arch, keys = made.family.arch, made.keys
    rope = dict(config.rope_parameters or {})
    if "full_attention" in rope:  # Gemma 3: a kind of layer each
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _beyond(
                where, f"rope_type {local['rope_type']!r} in layers with a window", "default"
            )
        keys[f"{arch}.rope.freq_base_swa"] = float(local["rope_theta"])
        rope = dict(rope["full_attention"])
    theta, kind = float(rope["rope_theta"]), rope.get("rope_type", "default")
    turned = int(made.head_dim * rope.get("partial_rotary_factor", 1.0))
    if turned != made.head_dim and arch != "phi3":
        raise _beyond(where, f"partial_rotary_factor: {rope['partial_rotary_factor']}", "1")
    keys[f"{arch}.rope.dimension_count"] = turned
    keys[f"{arch}.rope.freq_base"] = theta
    if kind != "default":
        _scaling_keys(made, config, rope, where)


SCALINGS = {
    "llama": ("linear", "yarn", "llama3", "dynamic"),
    "gemma3": ("linear",),
    "phi3": ("longrope",),
}


def _scaling_keys(made: Description, config: Any, rope: dict[str, Any], where: str) -> None:
    arch, keys, kind = made.family.arch, made.keys, rope["rope_type"]
    allowed = SCALINGS.get(arch, ("linear", "yarn", "dynamic"))
    if kind not in allowed:
        raise _beyond(where, f"rope_type {kind!r}", f"default, {', '.join(allowed)}")
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    original = int(original or config.max_position_embeddings)
    if kind == "dynamic":
        keys[f"{arch}.context_length"] = min(original, keys[f"{arch}.context_length"])
        made.notes.append(
            f"llama.cpp has no dynamic rope: the context is {original:,} tokens, within which it rests"
        )
        return
    scaled, attention = _frequencies(config, kind)
    if kind == "llama3":
        unscaled = float(rope["rope_theta"]) ** -(np.arange(0, made.head_dim, 2) / made.head_dim)
        made.factors["rope_freqs.weight"] = (unscaled / scaled).astype(np.float32)
        return
    factor = float(factor or config.max_position_embeddings / original)
    keys[f"{arch}.rope.scaling.type"] = kind
    if (
        kind != "longrope"
    ):  # there the factors say all, and llama.cpp would divide by this one as well
        keys[f"{arch}.rope.scaling.factor"] = factor
    if kind == "linear":
        return
    keys[f"{arch}.rope.scaling.original_context_length"] = original
    if kind == "yarn":
        for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            if rope.get(key) not in (None, usual):
                raise _beyond(where, f"{key}: {rope[key]} of a yarn rope", str(usual))
        # llama.cpp multiplies by yarn's own factor; what is asked for beyond that is given here.
        keys[f"{arch}.rope.scaling.attn_factor"] = attention / (0.1 * math.log(factor) + 1.0)
        return
    keys[f"{arch}.rope.scaling.attn_factor"] = attention
    for length in ("long", "short"):
        made.factors[f"rope_factors_{length}.weight"] = np.asarray(
            rope[f"{length}_factor"], np.float32
        )
    made.notes.append(
        f"llama.cpp chooses the long or short rope by the context it is started with: up to {original:,} tokens it is "
        "transformers' for short texts, beyond it transformers' for long ones"
    )


def _frequencies(config: Any, kind: str) -> tuple[np.ndarray, float]:
    """transformers' own rotary frequencies and attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = {"layer_type": "full_attention"} if "full_attention" in config.rope_parameters else {}
    scaled, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu", **kinds)
    return scaled.double().numpy(), float(attention)


def find_targets(
    made: Description, config: Any, tensors: dict[str, Stored], where: str
) -> list[Target]:
    """Each tensor of the model under llama.cpp's name, in the order of the layers.

    Raises:
        ModelError: a tensor that llama.cpp has no place for, or tensors that are not those of the configuration.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == made.family.arch)
    names = get_tensor_name_map(arch, made.layers)
    targets = []
    tied = made.tied and not _has_own_head(tensors)
    is_only = made.tied and not any(name.endswith("embed_tokens.weight") for name in tensors)
    for stored in _in_order(tensors.values()):
        theirs = _language_model(stored.name) if made.pictures else stored.name
        if (
            is_only and theirs == "lm_head.weight"
        ):  # one of two tied tensors is in the files, and this one
            theirs = "model.embed_tokens.weight"
        # A tied output is the embedding; frequencies are counted anew.
        if (
            not theirs
            or theirs.endswith("rotary_emb.inv_freq")
            or (tied and theirs == "lm_head.weight")
        ):
            continue
        module, _, kind = theirs.rpartition(".")
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        allowed = kind == "weight" or any(
            module.endswith(projection) for projection in made.family.biases
        )
        if name is None or not allowed or len(stored.shape) not in (1, 2):
            found = (
                f"has a tensor {stored.name}, for which llama.cpp's {made.family.arch} has no place"
            )
            raise ModelError(where=where, found=found, expected="the tensors of that family")
        is_turned = made.family.pairs_adjacent and module.endswith(ATTENTION[:2])
        if is_turned and stored.shape[0] % made.head_dim:
            found = f"has a tensor {stored.name} of {stored.shape[0]} rows"
            raise ModelError(where=where, found=found, expected=f"whole heads of {made.head_dim}")
        adds_one = made.family.norm_adds_one and module.endswith("norm")
        targets.append(Target(name, stored, made.head_dim * is_turned, float(adds_one)))
    _refuse_others(config, names, {target.name: target.stored for target in targets}, where)
    return targets


def _refuse_others(config: Any, names: Any, found: Mapping[str, Stored], where: str) -> None:
    """Refuse tensors that are not those of the configuration, which llama.cpp would notice when it loads the file."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():  # a tied head is none of its own
        stored = found.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        shape = None if stored is None else "x".join(map(str, stored.shape))
        told = "x".join(map(str, parameter.shape))
        if shape != told:
            raise ModelError(
                where=where,
                found=f"has no {name}" if shape is None else f"has a {name} of {shape}",
                expected=f"{told}, by its config.json",
                fix="orpo-lite merge RUN makes it again",
            )


def _has_own_head(tensors: Mapping[str, Stored]) -> bool:
    """Whether a head that is said to be tied has numbers of its own in the files; transformers takes those."""
    heads = [stored for name, stored in tensors.items() if name.endswith("lm_head.weight")]
    inputs = [stored for name, stored in tensors.items() if name.endswith("embed_tokens.weight")]
    if not heads or not inputs or heads[0].shape != inputs[0].shape:
        return bool(heads)
    pairs = zip(in_blocks(heads[0]), in_blocks(inputs[0]), strict=True)
    return not all(torch.equal(read_rows(mine), read_rows(theirs)) for mine, theirs in pairs)


def _language_model(name: str) -> str:
    """The name within the language model; "" for a tensor of another part."""
    for prefix in LANGUAGE_MODEL:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return "lm_head.weight" if name.endswith("lm_head.weight") else ""


def _in_order(tensors: Any) -> Iterator[Stored]:
    """By layer, then as in the file: shards list names by the alphabet, layer 10 before layer 2."""

    def place(stored: Stored) -> tuple[int, str]:
        parts = stored.name.split(".")
        number = next((int(part) for part in parts if part.isdigit()), -1)
        return (number if "layers" in parts else -1), stored.name

    yield from sorted(tensors, key=place)
