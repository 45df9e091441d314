"""The recipe: what the person chooses, in eight sections whose keys carry their owners' names.

``load_recipe`` reads a shipped name or a path, applies ``section.key=value`` overrides and returns a frozen
:class:`Recipe`. Each default has one home, here; a recipe file holds only what differs from it. No torch.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from orpo_lite.errors import TOKEN, Overrides, RecipeError, raise_all

MAX_BYTES = 1 << 20  # a recipe is a page of text; anything larger is another file
MAX_DEPTH = 32
DEEPER = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken
)  # fmt: skip
BACK = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
SHIPPED = Path(__file__).parent / "recipes"  # in a wheel
CHECKOUT = Path(__file__).parent.parent / "recipes"  # in a checkout or an editable install

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]


def _steps(value: object) -> float:
    """A share of all steps below 1, a whole number of steps from 1 on (TrainingArguments' convention)."""
    try:
        steps = float(value)  # type: ignore[arg-type]
    except TypeError:  # of null or a list
        raise ValueError("should be a valid number") from None
    if not 0 <= steps < float("inf"):
        raise ValueError("should be a share of the steps (0.1) or a whole number of them (100)")
    if steps > 1 and steps != int(steps):
        raise ValueError("a share of all steps below 1, or a whole number of steps")
    return steps


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("-1, or at least one step")
    return value


def _list_or_all_linear(value: object) -> object:
    if not isinstance(value, str) or value == "all-linear":
        return value
    return [name.strip(" \"'") for name in value.strip("[] ").split(",") if name.strip()]


def _names(value: object) -> object:
    """Several names as a list; a comma parts them, unless a file has one in its name. So it may in a list of JSON."""
    if not isinstance(value, str) or Path(value).expanduser().exists():
        return value
    try:
        return json.loads(value) if value.startswith('["') else _parted(value)
    except ValueError:
        return _parted(value)


def _parted(value: str) -> str | list[str]:
    if "," not in value:
        return value
    names = [name.strip(" \"'") for name in value.strip("[] ").split(",")]
    return [name for name in names if name]


def _plain_values(value: dict[str, Any]) -> dict[str, Any]:
    """What JSON can say, for a template: YAML makes a date of 2024-07-26, and the template wants the text."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


def _init_lora_weights(value: object) -> object:
    if str(value).lower().split("_")[0] in {"pissa", "olora", "loftq", "corda", "eva", "lora-ga", "lora"}:
        raise ValueError(f"true, gaussian or orthogonal: {value} rewrites the base, and the adapter fits no other copy")
    return {"true": True}.get(str(value).lower(), value)


UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def read_bytes(text: str) -> int:
    """A size such as 24GiB or 23.5 GiB in bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError("auto, or a size such as 24GiB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def gib(size: int) -> str:
    """A size in bytes as people read it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.1f} MiB"


def _budget(value: object) -> object:
    if isinstance(value, str) and value != "auto" and read_bytes(value) == 0:
        raise ValueError("auto, or a size such as 24GiB")
    return value


def _attention(value: object) -> object:
    if isinstance(value, str) and "/" in value:
        raise ValueError("a name with a / fetches compiled code from the hub, which is refused")
    return value


REPOSITORY = re.compile(
    r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII
)  # as the hub's own client checks it


def refuse_repository(name: str) -> None:
    """ValueError for what cannot be the name of a repository of the hub."""
    bare = name.rpartition("/")[2]
    whole = REPOSITORY.fullmatch(name) and len(name) <= 96
    if not whole or "--" in name or ".." in name or bare.endswith(".git"):
        raise ValueError("owner/name, of letters, digits, - _ and . (no -- or .., no .git at its end, at most 96)")


def _repository(name: str | None) -> str | None:
    if name is not None:
        refuse_repository(name)
    return name


Steps = Annotated[float, BeforeValidator(_steps)]


class Section(BaseModel):
    """A section of the recipe: frozen, unknown keys refused, each field documented by the string under it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class ModelSection(Section):
    """The base model (names of TRL's ModelConfig)."""

    model_name_or_path: str = Field(min_length=1)
    """The base: a hub name or a local folder."""
    model_revision: str = "main"
    """Branch, tag or commit; the commit it resolves to is recorded in lock.json."""
    adapter_name_or_path: str | None = None
    """A LoRA adapter to train on from, instead of a new one."""
    dtype: Dtype = "auto"
    """Of everything that is not quantised. auto: bfloat16, else float16 (T4, V100), else float32 (CPU)."""
    attn_implementation: Annotated[str | None, BeforeValidator(_attention)] = None
    """transformers' attention back-end: sdpa, eager, flash_attention_2; null lets transformers choose."""


class QuantizationSection(Section):
    """The base in 4 bit (names of transformers' BitsAndBytesConfig)."""

    load_in_4bit: bool = True
    """false keeps the base in model.dtype: four times the memory."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """NF4 is the QLoRA paper's data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales as well: 0.4 bit less per parameter."""
    bnb_4bit_compute_dtype: Dtype = "auto"
    """Of the matrix products. auto: model.dtype."""


class LoraSection(Section):
    """The adapter (names of peft's LoraConfig)."""

    r: int = Field(16, ge=1)
    """Rank; higher: more capacity, more memory."""
    lora_alpha: int = Field(32, ge=1)
    """The adapter's product is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)], BeforeValidator(_list_or_all_linear)
    ] = "all-linear"
    """all-linear (all but the output head), or a list of module names such as q_proj,v_proj."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): slower, a little better at low rank."""
    init_lora_weights: Annotated[Literal[True, "gaussian", "orthogonal"], BeforeValidator(_init_lora_weights)] = True
    """true, gaussian or orthogonal. PiSSA and its kin rewrite the base and are refused."""


class DataSection(Section):
    """The preference pairs."""

    dataset_name: Annotated[Name | Annotated[list[Name], Field(min_length=1)], BeforeValidator(_names)]
    """A hub name, or a local jsonl, csv, tsv or parquet file, a folder or a pattern of such; or several, as a list."""
    dataset_config: str | None = None
    """The configuration of a hub data set that has several."""
    dataset_train_split: str = "auto"
    """The split to train on; auto takes train_prefs or the like where the set has one, else train."""
    dataset_test_split: str | None = None
    """Held-out split, or a local file or folder; null takes test_split_size from the training split."""
    test_split_size: float = Field(0.02, ge=0, allow_inf_nan=False)
    """Held-out share of the prompts (below 1) or number of pairs; split by prompt, never by row. 0: none."""
    format: Literal[
        "auto", "explicit", "implicit", "messages", "hh_rlhf", "doubled", "orca", "alpaca", "conversation", "sharegpt",
        "openai", "ranked", "judged",
    ] = "auto"  # fmt: skip
    """How a row holds its pair; auto detects it by structure and says why."""
    column_map: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    """Our column names to the set's, {prompt: question, chosen: good}; of several sets: {chosen: [good, win]}."""
    max_samples: int | None = Field(None, ge=1)
    """Use only the first rows of each set."""
    max_length: int = Field(2048, ge=8)
    """Tokens of prompt and response together; a longer response is cut at its end."""
    max_prompt_length: int = Field(1024, ge=1)
    """Pairs with a longer prompt are dropped, as in the paper (Appendix C)."""
    chat_template: str = "auto"
    """auto: the tokenizer's, else the paper's. none: prompt and response joined as plain text. Or a .jinja file."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain_values)] = {}
    """Passed on to the template, for instance {enable_thinking: false}."""

    @property
    def names(self) -> list[str]:
        """The sets that dataset_name names."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def columns(self) -> dict[str, list[str]]:
        """What column_map says: our name to the columns that may hold it, of which a row is read by its first."""
        return {ours: [names] if isinstance(names, str) else names for ours, names in self.column_map.items()}


class LossSection(Section):
    """The ORPO loss (arXiv 2403.07691)."""

    type: Literal["orpo"] = "orpo"
    """L = NLL(chosen) + beta * L_OR, Eq. 6."""
    beta: float = Field(0.1, ge=0, allow_inf_nan=False)
    """λ in the paper, alpha in the authors' code. 0 is plain supervised fine-tuning on the chosen responses."""
    completion_only_loss: bool = False
    """false: the NLL counts the prompt too, as in the authors' code and TRL. true: the response, as in the text."""
    nll_reduction: Literal["token", "pair"] = "token"
    """token: mean over all counted tokens of the optimizer step. pair: mean per response, then over pairs."""


class TrainingSection(Section):
    """The optimisation (names of transformers' TrainingArguments)."""

    output_dir: str = Field("runs/orpo", min_length=1)
    """The run folder; refused when it exists."""
    learning_rate: Positive = 5e-5
    """Peak learning rate."""
    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step over all devices; memory settings never change it."""
    num_train_epochs: Positive = 1.0
    """Passes over the training pairs."""
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(_not_zero)] = -1
    """Optimizer steps; -1 leaves it to num_train_epochs."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Steps = 0.1
    """Below 1 a share of all steps, else a number of steps."""
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = "paged_adamw_8bit"
    """Paged: bitsandbytes moves the state to host memory when the card runs short."""
    adam_beta1: Fraction = 0.9
    """AdamW's first decay rate."""
    adam_beta2: Fraction = 0.999
    """AdamW's second decay rate."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Gradients are clipped to this norm; 0 clips nothing."""
    eval_steps: Annotated[Steps, Field(gt=0)] = 0.1
    """Evaluate on the held-out pairs and save a checkpoint this often: a share of all steps, or a number."""
    load_best_model_at_end: bool = True
    """End with the adapter of the lowest evaluation loss; without held-out pairs, with the last one."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a better loss; null never stops."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Of the data order, the split, the adapter's initialisation and dropout."""
    full_determinism: bool = False
    """Deterministic kernels on a GPU, slower; a CPU run is deterministic without it."""


class MemorySection(Section):
    """How the step fits into memory (ours); it never changes the maths. The plan sets what is auto."""

    budget: Annotated[str, BeforeValidator(_budget)] = "auto"
    """Memory that a run may take on the device, such as 24GiB. auto: what is free on the GPU; no plan on a CPU."""
    packing: bool = True
    """Pairs laid end to end, without padding. false: padded rows and all logits, the plain step that ours equals."""
    prompt_sharing: bool = True
    """What both replies of a pair begin with goes through the model once; needs packing."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens in one packed forward pass; a longer pair goes alone. auto, unplanned: twice data.max_length."""
    micro_batch_size: int | None = Field(None, ge=1)
    """At most so many pairs in one forward pass. null: as many as the tokens allow; without packing, one."""
    head_chunk: Literal["auto", "none"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows of logits held at once. auto: 96 MiB of them; none: all of a forward pass, as peers do."""
    fused_lora: bool = True
    """A linear layer and its adapter as one operation that keeps its input once, in the dtype of the model."""
    activation_checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """Decoder layers that run again in the backward pass: all, none, or a number. auto, unplanned: all."""
    checkpoint_offload: Literal["auto"] | bool = "auto"
    """What checkpointed layers keep waits in host memory: less on the card, a little slower. auto, unplanned: false."""
    mlp_tile: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    """Tokens that an MLP works on at a time, for less memory; null: all. auto, unplanned: null."""
    embedding_on_cpu: Literal["auto"] | bool = "auto"
    """The input embedding stays in host memory; not where it is also the output head. auto, unplanned: false."""

    def unplanned(self) -> "MemorySection":
        """The same with each lever that no plan has set at its plain value."""
        plain: dict[str, Any] = {"activation_checkpointing": "all", "mlp_tile": None}
        plain |= {"checkpoint_offload": False, "embedding_on_cpu": False}
        return self.model_copy(update={key: value for key, value in plain.items() if getattr(self, key) == "auto"})

    def checkpointed(self, layers: int) -> int:
        """How many of so many decoder layers, the first ones, keep their input only; auto: all."""
        amount = self.activation_checkpointing
        return min(layers, {"none": 0}.get(amount, layers) if isinstance(amount, str) else amount)

    @property
    def budget_bytes(self) -> int | None:
        """None for auto."""
        return None if self.budget == "auto" else read_bytes(self.budget)


LEVERS = (
    "micro_batch_tokens", "head_chunk", "activation_checkpointing", "checkpoint_offload", "mlp_tile", "embedding_on_cpu"
)  # fmt: skip  # what a plan may set where it is auto


class OutputSection(Section):
    """What happens after the last step (ours)."""

    merge: bool = True
    """Merge the adapter into the 16-bit base when training has ended."""
    samples: int = Field(3, ge=0, le=20)
    """So many held-out prompts, and of five neutral ones that a model card may show, are answered before and after."""
    max_new_tokens: int = Field(64, ge=1)
    """Length limit of those answers."""
    push_to_hub: bool = False
    """Push the adapter and its model card when all else is done; whether it may be is checked before training."""
    hub_model_id: Annotated[str | None, AfterValidator(_repository)] = None
    """Where to: owner/name, or a name alone, which is then yours. Made if it is not there."""
    hub_private_repo: bool = True
    """Only you, or your organisation, can see it. false: everybody can."""


class Recipe(Section):
    """All sections. ``sources`` maps each ``section.key`` to where its value comes from."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    loss: LossSection = LossSection()
    training: TrainingSection = TrainingSection()
    memory: MemorySection = MemorySection()
    output: OutputSection = OutputSection()

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def sources(self) -> Mapping[str, str]:
        """``section.key`` -> "default", "NAME.yaml:LINE" or "command line"."""
        return {key: self._sources.get(key, "default") for key, _ in self.items()}

    @property
    def micro_batch_tokens(self) -> int:
        """What memory.micro_batch_tokens comes to: auto lets the longest pair that shares nothing fit."""
        tokens = self.memory.micro_batch_tokens
        return 2 * self.data.max_length if tokens == "auto" else tokens

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every ``section.key`` with its value, in the order of the schema."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            for key in type(section).model_fields:
                yield f"{name}.{key}", getattr(section, key)

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with ``section.key`` values replaced and validated; sources are kept."""
        tree = self.model_dump()
        for key, value in values.items():
            section, _, field = key.partition(".")
            tree[section][field] = value
        copy = Recipe.model_validate(tree)
        copy._sources.update(self._sources)
        return copy

    def with_memory(self, levers: Mapping[str, Any]) -> "Recipe":
        """:meth:`override` of keys of ``memory``, named without their section."""
        return self.override({f"memory.{key}": value for key, value in levers.items()})

    def to_yaml(self, *, comments: bool = False) -> str:
        """The whole recipe as YAML; with ``comments`` each key carries its field's documentation."""
        lines = []
        for name in type(self).model_fields:
            section = getattr(self, name)
            lines.append(f"{name}:" + (f"  # {(type(section).__doc__ or '').splitlines()[0]}" if comments else ""))
            for key, field in type(section).model_fields.items():
                body = f"  {key}: {to_text(getattr(section, key))}"
                lines += [f"  # {field.description}", body] if comments else [body]
        return "\n".join(lines) + "\n"


class _OneLine(yaml.SafeDumper):
    """Writes a text with line breaks in one quoted line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines() not in ([], [text]) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_OneLine.add_representer(str, _represent_text)


def to_text(value: Any) -> str:
    """A value as a recipe holds it, on one line."""
    text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip("\n")  # not a no-break space, which may be the text's own


SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}  # name -> its class
KEYS: dict[str, list[str]] = {name: list(section.model_fields) for name, section in SECTIONS.items()}
HOMES = {
    key: [f"{section}.{key}" for section in KEYS if key in KEYS[section]] for keys in KEYS.values() for key in keys
}

# What other tools call our keys: {their key: (ours or "", what to know)}. Sources: TrainingArguments, TRL's ORPOConfig,
# LLaMA-Factory's and Axolotl's documented options.
FOREIGN: dict[str, tuple[str, str]] = {
    "per_device_train_batch_size": (
        "training.global_batch_size",
        "it counts pairs per optimizer step over all devices",
    ),
    "gradient_accumulation_steps": (
        "training.global_batch_size",
        "it counts pairs per optimizer step over all devices",
    ),
    "micro_batch_size": (
        "memory.micro_batch_size",
        "pairs in one forward pass; training.global_batch_size sets the step",
    ),
    "per_device_eval_batch_size": ("memory.micro_batch_size", "evaluation uses the same forward pass"),
    "batch_size": ("training.global_batch_size", "it counts pairs per optimizer step over all devices"),
    "warmup_ratio": ("training.warmup_steps", "a value below 1 is a share of all steps"),
    "gradient_checkpointing": ("memory.activation_checkpointing", "all, none, or a number of layers"),
    "activation_offloading": ("memory.checkpoint_offload", ""),
    "padding_free": ("memory.packing", "on by default: pairs end to end, without padding"),
    "sample_packing": ("memory.packing", "on by default: pairs end to end, without padding"),
    "use_liger_kernel": ("memory.head_chunk", "auto by default: logits are never held"),
    "lora_r": ("lora.r", ""),
    "lora_rank": ("lora.r", ""),
    "lora.rank": ("lora.r", ""),
    "lora.alpha": ("lora.lora_alpha", ""),
    "lora.dropout": ("lora.lora_dropout", ""),
    "lora_target": ("lora.target_modules", "all-linear, or a list of module names"),
    "lora_target_modules": ("lora.target_modules", "all-linear, or a list of module names"),
    "lora_target_linear": ("lora.target_modules", "write all-linear"),
    "base_model": ("model.model_name_or_path", ""),
    "revision": ("model.model_revision", ""),
    "load_in_8bit": ("quantization.load_in_4bit", "4 bit or none"),
    "quantization_bit": ("quantization.load_in_4bit", "true for 4 bit"),
    "bf16": ("model.dtype", "bfloat16, float16, float32 or auto"),
    "fp16": ("model.dtype", "bfloat16, float16, float32 or auto"),
    "torch_dtype": ("model.dtype", ""),
    "flash_attn": ("model.attn_implementation", "flash_attention_2"),
    "flash_attention": ("model.attn_implementation", "flash_attention_2"),
    "dataset": ("data.dataset_name", ""),
    "datasets": ("data.dataset_name", "a name or file, or a list of them"),
    "dataset_split": ("data.dataset_train_split", ""),
    "val_set_size": ("data.test_split_size", "split by prompt"),
    "val_size": ("data.test_split_size", "split by prompt"),
    "cutoff_len": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_completion_length": ("data.max_length", "it limits prompt and response together"),
    "template": ("data.chat_template", "auto, none or a .jinja file"),
    "orpo_alpha": ("loss.beta", "λ in the paper"),
    "orpo_lambda": ("loss.beta", "λ in the paper"),
    "pref_beta": ("loss.beta", "λ in the paper"),
    "alpha": ("loss.beta", "λ in the paper; the adapter's alpha is lora.lora_alpha"),
    "pref_loss": ("loss.type", ""),
    "rl": ("loss.type", ""),
    "lr": ("training.learning_rate", ""),
    "num_epochs": ("training.num_train_epochs", ""),
    "epochs": ("training.num_train_epochs", ""),
    "optimizer": ("training.optim", ""),
    "lr_scheduler": ("training.lr_scheduler_type", ""),
    "save_steps": ("training.eval_steps", "each evaluation saves a checkpoint"),
    "save_strategy": ("training.eval_steps", "each evaluation saves a checkpoint"),
    "eval_strategy": ("training.eval_steps", "a share of all steps, or a number"),
    "evals_per_epoch": ("training.eval_steps", "a share of all steps, or a number"),
    "logging_steps": ("", "every step is logged to metrics.jsonl; leave the line out"),
    "report_to": ("", "metrics.jsonl in the run folder holds every step; leave the line out"),
    "export_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_model_id": ("output.hub_model_id", ""),
    "push_to_hub_organization": ("output.hub_model_id", "owner/name"),
    "hub_private": ("output.hub_private_repo", ""),
    "hub_strategy": ("", "what is pushed is the result, once, at the end; leave the line out"),
    "hub_always_push": ("", "what is pushed is the result, once, at the end; leave the line out"),
    "hf_use_auth_token": ("", "the token is that of `hf auth login`, or of HF_TOKEN; leave the line out"),
    "trust_remote_code": ("", "code from the hub is never run; leave the line out"),
    "remove_unused_columns": ("", "unused columns are ignored; leave the line out"),
}


@dataclass(frozen=True)
class _Written:
    """One value as it was written: a string, None, a list or a mapping of these; and where."""

    value: Any
    where: str


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe ``name`` (a shipped name, or a path when it has a / or ends in .yaml), then ``overrides``.

    Args:
        name: for instance ``"mistral-qlora"`` or ``"./mine.yaml"``.
        overrides: ``"section.key=value"`` texts; the value is read by the key's type, not by YAML.

    Raises:
        RecipeError: every fault found, at once.
    """
    path = find_recipe(name)
    written: dict[str, _Written] = {}
    faults: list[RecipeError] = list(_read_file(path, written))
    faults += _read_overrides(overrides, written)
    faults += _refuse_secrets(written)
    faults += _answer_unknown(written)
    recipe = _validate(written, path.name, faults)
    raise_all(faults)
    assert recipe is not None  # noqa: S101 - a recipe that could not be built has left its faults
    raise_all(list(_contradictions(recipe)))
    return recipe


def find_recipe(name: str) -> Path:
    """The file of a shipped name or path. Raises :class:`RecipeError` with the nearest names."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if path.is_dir():
            raise RecipeError(
                where=name,
                found="is a folder",
                expected="a YAML file",
                fix=f"orpo-lite recipes cp NAME {name.rstrip('/')}/recipe.yaml",
            )
        if not path.is_file():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=3)
            raise RecipeError(
                where=name,
                found="no such file",
                expected="a recipe file",
                fix=f"did you mean {', '.join(near)}?" if near else LIST,
            )
        return path
    known = shipped_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        fix = f"did you mean {', '.join(near)}? {LIST}; a path needs a / or .yaml" if near else LIST
        raise RecipeError(
            where=f"--recipe {name}",
            found="no shipped recipe of that name",
            expected="one of the shipped names, or a path",
            fix=fix,
        )
    return known[name]


LIST = "`orpo-lite recipes ls` lists the shipped ones"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted; a checkout's own folder wins over a wheel's copy."""
    checkout = CHECKOUT.is_dir() and (CHECKOUT.parent / "pyproject.toml").is_file()
    return {path.stem: path for path in sorted((CHECKOUT if checkout else SHIPPED).glob("*.yaml"))}


def _read_file(path: Path, written: dict[str, _Written]) -> Iterator[RecipeError]:
    """Fill ``written`` from the file; yield its faults. Every scalar stays the text it is."""
    root = _compose(path)
    yield from _duplicates(root, path)
    for section, node, line in _entries(root):
        if section in KEYS and isinstance(node, yaml.MappingNode):
            for field, child, child_line in _entries(node):
                key = f"{section}.{field}"
                written[key] = _Written(_plain(child, typed=key in TYPED), f"{path.name}:{child_line}")
        elif section in KEYS and _plain(node) is not None:
            yield RecipeError(
                where=f"{path}:{line}",
                found=f"section {section} holds {_shown(_plain(node))}",
                expected="indented `key: value` lines",
            )
        elif section not in KEYS:
            written[section] = _Written(_plain(node), f"{path.name}:{line}")


def _compose(path: Path) -> yaml.MappingNode:
    """The YAML nodes of the file, which know their lines. Raises :class:`RecipeError`."""
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(
            where=str(path), found=f"{path.stat().st_size:,} bytes", expected=f"a recipe of at most {MAX_BYTES:,}"
        )
    try:
        root = _nodes(path.read_bytes().decode(), str(path))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise RecipeError(
            where=f"{path}:{line}", found=found, expected="UTF-8 text", fix="iconv -f CP1252 -t UTF-8 OLD > NEW"
        ) from None
    except OSError as error:
        raise RecipeError(
            where=str(path), found=f"cannot be read ({error.strerror})", expected="a file that you may read"
        ) from None
    if not isinstance(root, yaml.MappingNode):
        found = "is empty" if root is None else "is not a mapping"
        raise RecipeError(
            where=str(path),
            found=found,
            expected=f"the sections {', '.join(KEYS)}",
            fix="orpo-lite recipes cp NAME PATH",
        )
    return root


def _nodes(text: str, where: str) -> Any:
    """The root node of a YAML text, or None. Raises :class:`RecipeError`."""
    try:
        # An alias can make a page of text expand to gigabytes, and PyYAML takes minutes over deep brackets.
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            place = f"{where}:{token.start_mark.line + 1}"
            if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
                raise RecipeError(
                    where=place,
                    found=f"YAML anchor or alias {token.value!r}",
                    expected="plain values",
                    fix="write the value out",
                )
            depth += isinstance(token, DEEPER) - isinstance(token, BACK)
            if depth > MAX_DEPTH:
                raise RecipeError(
                    where=place,
                    found="nested too deeply",
                    expected=f"at most {MAX_DEPTH} levels",
                    fix="close the brackets",
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        problem = str(getattr(error, "problem", error))
        fix = "mend the line; quote a text that holds : # { [ or %"
        raise RecipeError(
            where=place, found=problem, expected="YAML: `key: value` lines, indented by spaces", fix=fix
        ) from None


def _entries(node: yaml.MappingNode) -> Iterator[tuple[str, Any, int]]:
    """(key, value node, line) of a mapping; of a key that stands twice, the first."""
    seen = set()
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key not in seen:
            yield key, value_node, key_node.start_mark.line + 1
        seen.add(key)


def _duplicates(node: Any, path: Path) -> Iterator[RecipeError]:
    """A fault for each key that stands twice in one mapping, at any depth; PyYAML keeps the last one silently."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _duplicates(child, path)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first:
            found = f"key {key!r} again; it stands on line {first[key]} too"
            yield RecipeError(
                where=f"{path}:{line}", found=found, expected="each key once", fix="keep one of the two lines"
            )
        first.setdefault(key, line)
        yield from _duplicates(value_node, path)


def _plain(node: Any, *, typed: bool = False) -> Any:
    """Text, None, list or dict of a YAML node, without YAML's guesses at types.

    ``typed`` is for values that no field gives a type to: true, false and numbers are then what JSON says they are.
    """
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _plain(value, typed=typed) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, typed=typed) for child in node.value]
    if node.style is None and node.value in ("", "~", "null", "Null", "NULL"):
        return None
    if typed and node.tag != "tag:yaml.org,2002:str":  # a quoted text has the tag of a text
        try:
            return json.loads(node.value)
        except ValueError:
            pass
    return str(node.value)


def _shown(value: Any) -> str:
    """A value as an error shows it: on one line, of at most 80 characters."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _read_overrides(overrides: Sequence[str], written: dict[str, _Written]) -> Iterator[RecipeError]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            near = "--recipe" if text in shipped_recipes() or text.endswith(".yaml") else ""
            fix = f"orpo-lite train {near} {text}" if near else "orpo-lite train --recipe NAME section.key=value"
            yield RecipeError(
                where=f"argument {text!r}", found="is not an override", expected="section.key=value", fix=fix
            )
            continue
        try:
            written[key.strip()] = _Written(_override_value(key.strip(), value), "command line")
        except RecipeError as fault:
            yield fault


TYPED = ("data.chat_template_kwargs",)  # passed on as they are, so true must be a truth value
MAPPINGS = ("data.column_map", *TYPED)


def _override_value(key: str, text: str) -> Any:
    """null, and {a: b} or a=b,c=d for the two keys that hold a mapping; any other text stays text.

    a=b,a=c is {a: [b, c]}.
    """
    if text in ("null", "~"):
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if key in MAPPINGS and text.lstrip().startswith("{"):
        return _plain(_nodes(text, "command line"), typed=key in TYPED)
    if key in MAPPINGS and all(name.strip() and value.strip() for name, _, value in parts):
        values: dict[str, list[Any]] = {}
        for name, _, value in parts:
            typed = _plain(_nodes(value, "command line"), typed=True) if key in TYPED else value.strip()
            values.setdefault(name.strip(), []).append(typed)
        return {name: several if several[1:] else several[0] for name, several in values.items()}
    return text


def _refuse_secrets(written: dict[str, _Written]) -> Iterator[RecipeError]:
    for key, entry in list(written.items()):
        if TOKEN.search(f"{key} {entry.value}") or key.split(".")[-1] in ("token", "hub_token", "hf_token"):
            del written[key]
            found = f"{key} holds an access token (not shown)"
            yield RecipeError(
                where=entry.where,
                found=found,
                expected="no secret in a recipe",
                fix="run `hf auth login`, or set HF_TOKEN",
            )


def _answer_unknown(written: dict[str, _Written]) -> Iterator[RecipeError]:
    """Unknown keys, answered by meaning where another tool's key is known, else by the nearest name."""
    batch = [f"{section}{key}" for section in ("", "training.") for key in BATCH_KEYS]
    product = _batch_product([written[key].value for key in batch if key in written])
    for key in [key for key in written if key not in _all_keys()]:
        entry, bare = written.pop(key), key.rsplit(".", 1)[-1]
        name = key if key in FOREIGN else bare
        ours, remark = FOREIGN.get(name, ("", ""))
        remark = f" ({remark})" if remark and ours else remark
        if key in batch and product:
            fix = f"training.global_batch_size: {product}{remark}"
        elif name in FOREIGN:
            fix = f"{ours}{remark}"
        elif bare in HOMES:
            fix = " or ".join(HOMES[bare])
        else:
            section, _, _ = key.rpartition(".")
            near = difflib.get_close_matches(bare, KEYS.get(section) or list(HOMES), n=1, cutoff=0.6)
            near = near or difflib.get_close_matches(bare, list(HOMES), n=1, cutoff=0.6)
            near_section = difflib.get_close_matches(section or bare, list(KEYS), n=1)
            fix = HOMES[near[0]][0] if near else (f"section {near_section[0]}" if near_section else "")
            fix = f"did you mean {fix}?" if fix else f"the sections are {', '.join(KEYS)}"
            yield RecipeError(
                where=entry.where,
                found=f"unknown key {key}",
                expected="a key of `orpo-lite recipes show NAME`",
                fix=fix,
            )
            continue
        yield RecipeError(
            where=entry.where, found=f"unknown key {key}", fix=f"write {fix}" if ours or bare in HOMES else fix
        )


BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def _batch_product(values: Sequence[Any]) -> int:
    """Their two keys multiplied: what global_batch_size is on one device. 0 when they are not numbers."""
    numbers = [int(value) for value in values if str(value).isdigit()]
    product = 1
    for number in numbers:
        product *= number
    return product if len(numbers) == len(values) > 0 else 0


def _all_keys() -> set[str]:
    return {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}


def _validate(written: Mapping[str, _Written], file: str, faults: list[RecipeError]) -> Recipe | None:
    """The recipe; or None, with what is wrong appended to ``faults``."""
    tree: dict[str, dict[str, Any]] = {"model": {}, "data": {}}
    for key, entry in written.items():
        section, _, field = key.partition(".")
        tree.setdefault(section, {})[field] = entry.value
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += _explain(error, written, file)
        return None
    recipe._sources.update({key: entry.where for key, entry in written.items()})
    return recipe


def _explain(error: ValidationError, written: Mapping[str, _Written], file: str) -> list[RecipeError]:
    """One fault a key: pydantic reports a union once per branch."""
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"][:2])
        message = re.sub(r"^(Input should be|Value error,|Assertion failed,) ?", "", item["msg"])
        message = "a value; it has no default" if item["type"] == "missing" else re.sub(r", unable to.*", "", message)
        messages.setdefault(key, []).append(message)
    faults = []
    for key, texts in messages.items():
        entry = written.get(key, _Written(None, file))
        found = f"{key}: {_shown(entry.value)}" if key in written else f"{key} is not set"
        faults.append(
            RecipeError(where=entry.where, found=found, expected=" or ".join(dict.fromkeys(texts)), fix=_advice(key))
        )
    return faults


def _advice(key: str) -> str:
    """A line that can be pasted, where the key has a default; and what the key means."""
    section, _, name = key.partition(".")
    field = SECTIONS[section].model_fields[name]
    if field.is_required():
        return str(field.description)
    text = f"{name}: {to_text(field.default)} is the default. {field.description}"
    return Overrides({key: field.default}, text=text)


def _contradictions(recipe: Recipe) -> Iterator[RecipeError]:
    """Values that are each valid and cannot stand together; both keys are named."""
    data, training, memory = recipe.data, recipe.training, recipe.memory

    def fault(one: str, other: str, why: str, fix: Mapping[str, Any] | str) -> RecipeError:
        values = dict(recipe.items())
        found = f"{one}: {values[one]} with {other}: {values[other]}"
        where = next((recipe.sources[k] for k in (one, other) if recipe.sources[k] != "default"), "recipe")
        return RecipeError(where=where, found=found, expected=why, fix=fix if isinstance(fix, str) else Overrides(fix))

    if data.max_prompt_length >= data.max_length:
        yield fault(
            "data.max_prompt_length", "data.max_length", "a prompt limit below the length limit, or no reply is left",
            {"data.max_prompt_length": max(1, data.max_length // 2)},
        )  # fmt: skip
    if training.early_stopping_patience and not data.dataset_test_split and data.test_split_size == 0:
        yield fault(
            "training.early_stopping_patience", "data.test_split_size", "held-out pairs to stop on",
            {"data.test_split_size": 0.02},
        )  # fmt: skip
    if data.test_split_size >= 1 and data.test_split_size != int(data.test_split_size):
        yield RecipeError(
            where=recipe.sources["data.test_split_size"], found=f"data.test_split_size: {data.test_split_size}",
            expected="a share below 1, or a whole number of pairs",
        )  # fmt: skip
    # A run's own recipe holds every key: that one stands there says nothing, that it differs from its default does.
    asked = {"prompt_sharing": recipe.sources["memory.prompt_sharing"] == "command line" and memory.prompt_sharing}
    asked |= {"micro_batch_tokens": memory.micro_batch_tokens != "auto"}
    asked |= {"head_chunk": memory.head_chunk not in ("auto", "none")}
    for key in [key for key, is_asked in asked.items() if is_asked and not memory.packing]:
        yield fault(f"memory.{key}", "memory.packing", "packed rows, not padded ones", {"memory.packing": True})
    if memory.checkpoint_offload is True and memory.activation_checkpointing in ("none", 0):
        yield fault(
            "memory.checkpoint_offload", "memory.activation_checkpointing", "checkpoints that could be moved",
            {"memory.activation_checkpointing": "all"},
        )  # fmt: skip
    if recipe.output.push_to_hub and recipe.output.hub_model_id is None:
        yield fault("output.push_to_hub", "output.hub_model_id", "a repository to push to", "output.hub_model_id=NAME")
    if not recipe.quantization.load_in_4bit and recipe.quantization.bnb_4bit_compute_dtype != "auto":
        yield fault(
            "quantization.load_in_4bit", "quantization.bnb_4bit_compute_dtype", "a 4-bit base to compute with",
            "set model.dtype instead",
        )  # fmt: skip
