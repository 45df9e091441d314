"""The recipe: what the person chooses, in eight sections whose keys carry their owners' names.

Each default has one home, here; a recipe file holds only what differs from it. No torch.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from orpo_lite.recipe.text import read_bytes, to_text

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


def _from_home(value: str) -> str:
    """A path that begins with ~ written out, for no shell sees it."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(
            f"a folder: {value.partition('/')[0]} is nobody's home; ./{value} is a folder of that name here"
        )
    return path


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
    if str(value).lower().split("_")[0] in {
        "pissa",
        "olora",
        "loftq",
        "corda",
        "eva",
        "lora-ga",
        "lora",
    }:
        raise ValueError(
            f"true, gaussian or orthogonal: {value} rewrites the base, and the adapter fits no other copy"
        )
    return {"true": True}.get(str(value).lower(), value)


def _budget(value: object) -> object:
    if isinstance(value, str) and value != "auto" and read_bytes(value) == 0:
        raise ValueError("auto, or a size such as 24GiB")
    return value


def _attention(value: object) -> object:
    if isinstance(value, str) and "/" in value:
        raise ValueError("a name with a / fetches compiled code from the hub, which is refused")
    return value


# As the hub's own client checks it.
REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9_]([\w.-]*\w)?", re.ASCII)


def refuse_repository(name: str) -> None:
    """ValueError for what cannot be the name of a repository of the hub."""
    bare = name.rpartition("/")[2]
    whole = REPOSITORY.fullmatch(name) and len(name) <= 96
    if not whole or "--" in name or ".." in name or bare.endswith(".git"):
        raise ValueError(
            "owner/name, of letters, digits, - _ and . (no -- or .., no .git at its end, at most 96)"
        )


def _repository(name: str | None) -> str | None:
    if name is not None:
        refuse_repository(name)
    return name


Steps = Annotated[float, BeforeValidator(_steps)]


class Section(BaseModel):
    """A section of the recipe: frozen, unknown keys refused, each field documented by the string under it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )


class ModelSection(Section):
    """The base model (names of TRL's ModelConfig)."""

    model_name_or_path: str = Field(min_length=1)
    """The base: a hub name or a local folder."""
    model_revision: str = "main"
    """Branch, tag or commit; the commit it resolves to is recorded in lock.json."""
    adapter_name_or_path: str | None = None
    """A LoRA adapter to train on from, instead of a new one: it sets all of lora, which may be left out."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU, where torch has one. cpu: the CPU, next to a GPU too."""
    dtype: Dtype = "auto"
    """Of everything that is not quantised. auto: bfloat16, else float16 (T4), else float32 (CPU)."""
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
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)],
        BeforeValidator(_list_or_all_linear),
    ] = "all-linear"
    """all-linear (all but the output head), or a list of module names such as q_proj,v_proj."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): slower, a little better at low rank."""
    init_lora_weights: Annotated[
        Literal[True, "gaussian", "orthogonal"], BeforeValidator(_init_lora_weights)
    ] = True
    """true, gaussian or orthogonal. PiSSA and its kin rewrite the base and are refused."""


class DataSection(Section):
    """The preference pairs."""

    dataset_name: Annotated[
        Name | Annotated[list[Name], Field(min_length=1)], BeforeValidator(_names)
    ]
    """A hub name, a local jsonl, json, csv, tsv, parquet or arrow file, a folder, a pattern; or several, as a list."""
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
    max_bad_rows: Fraction = 0.01
    """Share of the rows that may be left out for a fault (NaN, a tool call); more stops. 3 rows may always be."""
    max_length: int = Field(2048, ge=8)
    """Tokens of prompt and response together; a longer response is cut at its end."""
    max_prompt_length: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Pairs with a longer prompt are dropped, as in the paper (Appendix C). auto: half of max_length, as there."""
    chat_template: str = "auto"
    """auto: the tokenizer's, else the paper's. none: prompt and response joined as plain text. Or a .jinja file."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain_values)] = {}
    """Passed on to the template, for instance {enable_thinking: false}."""

    @property
    def names(self) -> list[str]:
        """The sets that dataset_name names."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def prompt_limit(self) -> int:
        """max_prompt_length in tokens."""
        return self.max_length // 2 if self.max_prompt_length == "auto" else self.max_prompt_length

    @property
    def columns(self) -> dict[str, list[str]]:
        """What column_map says: our name to the columns that may hold it, of which a row is read by its first."""
        return {
            ours: [names] if isinstance(names, str) else names
            for ours, names in self.column_map.items()
        }


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
    """The optimisation (names of transformers' TrainingArguments).

    `train --resume RUN KEY=VALUE` may change how fast, how long and how often it is evaluated. The learning rate is a
    function of the step alone: from the next step on it is what it would be had the run begun with the new values.
    """

    output_dir: Annotated[str, Field(min_length=1), AfterValidator(_from_home)] = "runs/orpo"
    """The run folder; refused when it exists."""
    learning_rate: Positive = 5e-5
    """Peak learning rate. `train --resume RUN` may change it, for instance after a divergence."""
    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step over all devices; memory settings never change it."""
    num_train_epochs: Positive = 1.0
    """Passes over the training pairs."""
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(_not_zero)] = -1
    """Optimizer steps; -1 leaves it to num_train_epochs. Changed at --resume, the whole schedule has the new length."""
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
        return self.model_copy(
            update={key: value for key, value in plain.items() if getattr(self, key) == "auto"}
        )

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
            lines.append(
                f"{name}:"
                + (f"  # {(type(section).__doc__ or '').splitlines()[0]}" if comments else "")
            )
            for key, field in type(section).model_fields.items():
                body = f"  {key}: {to_text(getattr(section, key))}"
                lines += [f"  # {field.description}", body] if comments else [body]
        return "\n".join(lines) + "\n"


SECTIONS: dict[str, Any] = {
    name: field.annotation for name, field in Recipe.model_fields.items()
}  # name -> its class
KEYS: dict[str, list[str]] = {
    name: list(section.model_fields) for name, section in SECTIONS.items()
}
HOMES = {
    key: [f"{section}.{key}" for section in KEYS if key in KEYS[section]]
    for keys in KEYS.values()
    for key in keys
}
