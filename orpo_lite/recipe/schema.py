"""The schema of a recipe: eight sections, their keys, types and defaults.

Keys have the names of the library that owns them (TRL, transformers, peft). Defaults are defined
here only; a recipe file holds only what differs. This module does not import torch.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from orpo_lite.recipe.text import read_bytes, to_text
from orpo_lite.recipe.values import (
    check_attention,
    check_budget,
    check_lora_init,
    check_repository,
    expand_home,
    read_module_names,
    read_names,
    read_steps,
    read_trackers,
    refuse_zero,
    to_json_values,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Steps = Annotated[float, BeforeValidator(read_steps)]


class Section(BaseModel):
    """A section of a recipe. It is immutable, and unknown keys are refused.

    The text under each field documents it, here and in ``orpo-lite recipes show``.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put the documentation of each field on one line: messages quote it."""
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())


class ModelSection(Section):
    """The base model (key names of TRL's ModelConfig)."""

    model_name_or_path: str = Field(min_length=1)
    """The base model: a hub name (owner/name) or a local folder."""
    model_revision: str = "main"
    """Branch, tag or commit of the repository. lock.json records the commit that was used."""
    adapter_name_or_path: str | None = None
    """Continue to train this LoRA adapter instead of a new one. Its configuration replaces the
    section lora, which may be left out."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU if torch finds one, else the CPU. cpu: always the CPU. Of several GPUs the
    first one that CUDA_VISIBLE_DEVICES leaves is used."""
    dtype: Dtype = "auto"
    """Data type of the weights that are not quantised, and of the activations. auto: bfloat16 if
    the GPU supports it, else float16 (T4); float32 on a CPU."""
    attn_implementation: Annotated[str | None, BeforeValidator(check_attention)] = None
    """Attention of transformers: sdpa, eager or flash_attention_2. null: transformers chooses."""


class QuantizationSection(Section):
    """4-bit quantisation of the base (key names of transformers' BitsAndBytesConfig)."""

    load_in_4bit: bool = True
    """Quantise the base to 4 bit. false: keep it in model.dtype, in four times the memory."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type. nf4 is the QLoRA paper's."""
    bnb_4bit_use_double_quant: bool = True
    """Also quantise the scales, which saves 0.4 bit per parameter."""
    bnb_4bit_compute_dtype: Dtype = "auto"
    """Data type of the matrix products with 4-bit weights. auto: model.dtype."""


class LoraSection(Section):
    """The LoRA adapter (key names of peft's LoraConfig)."""

    r: int = Field(16, ge=1)
    """Rank of the adapter. A higher rank can learn more and takes more memory."""
    lora_alpha: int = Field(32, ge=1)
    """Scale: the adapter's output is multiplied by lora_alpha / r (with use_rslora by
    lora_alpha / sqrt(r))."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of the adapter's input."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)],
        BeforeValidator(read_module_names),
    ] = "all-linear"
    """Modules that get an adapter: all-linear (every linear layer but the output head), or a list
    of names such as q_proj,v_proj."""
    use_rslora: bool = False
    """Use rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Use weight-decomposed LoRA (DoRA, arXiv 2402.09353): slower, a little better at low rank."""
    init_lora_weights: Annotated[
        Literal[True, "gaussian", "orthogonal"], BeforeValidator(check_lora_init)
    ] = True
    """Initial values of the adapter: true (peft's default), gaussian or orthogonal. PiSSA and
    similar ones rewrite the base and are refused."""


class DataSection(Section):
    """The preference pairs."""

    dataset_name: Annotated[
        Name | Annotated[list[Name], Field(min_length=1)], BeforeValidator(read_names)
    ]
    """The dataset: a hub name, a local file (jsonl, json, csv, tsv, parquet, arrow),
    a folder or a glob pattern. A list names several datasets."""
    dataset_config: str | None = None
    """Configuration of a hub dataset that has several."""
    dataset_train_split: str = "auto"
    """Split to train on. auto: train_prefs or a similar split if the dataset has one, else
    train."""
    dataset_test_split: str | None = None
    """Held-out pairs: a split of the dataset, or a local file or folder. null: take
    test_split_size from the training split."""
    test_split_size: float = Field(0.02, ge=0, allow_inf_nan=False)
    """Held-out part of the training split: a share of the prompts (below 1) or a number of pairs.
    All pairs of a prompt go to the same split. 0: hold nothing out."""
    format: Literal[
        "auto", "explicit", "implicit", "messages", "hh_rlhf", "doubled", "orca", "alpaca",
        "conversation", "sharegpt", "openai", "ranked", "judged",
    ] = "auto"  # fmt: skip
    """How a row holds its pair. auto: detect it from the columns and values, and report why."""
    column_map: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}
    """Which columns hold prompt, chosen and so on: {prompt: question, chosen: good}. For several
    datasets a list of columns: {chosen: [good, win]}."""
    max_samples: int | None = Field(None, ge=1)
    """Read only this many rows of each dataset, from its start. null: all rows."""
    max_bad_rows: Fraction = 0.01
    """Largest share of rows that may be left out because of an error, such as NaN or a tool call.
    With more, the command fails. 3 rows are always allowed."""
    max_length: int = Field(2048, ge=8)
    """Most tokens of prompt and response together. A longer response is cut at its end."""
    max_prompt_length: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens of a prompt. Pairs with a longer prompt are left out, as in the ORPO paper
    (Appendix C). auto: half of max_length, also as in the paper."""
    chat_template: str = "auto"
    """auto: the tokenizer's chat template, or the ORPO paper's if it has none. none: join prompt
    and response as plain text. Or the path of a .jinja file."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(to_json_values)] = {}
    """Variables for the chat template, for instance {enable_thinking: false}."""

    @property
    def names(self) -> list[str]:
        """The names of the datasets, as a list."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def prompt_limit(self) -> int:
        """The largest number of tokens of a prompt: ``max_prompt_length``, or what auto means."""
        return self.max_length // 2 if self.max_prompt_length == "auto" else self.max_prompt_length

    @property
    def columns(self) -> dict[str, list[str]]:
        """``column_map`` with lists only: our name -> the dataset's columns.

        A row is read by the first of these columns that it has.
        """
        return {
            ours: [names] if isinstance(names, str) else names
            for ours, names in self.column_map.items()
        }


class LossSection(Section):
    """The ORPO loss (arXiv 2403.07691)."""

    type: Literal["orpo"] = "orpo"
    """The loss: L = NLL(chosen) + beta * L_OR (Eq. 6)."""
    beta: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Weight of the odds-ratio term: λ in the paper, alpha in the authors' code. 0: plain
    supervised fine-tuning on the chosen responses."""
    completion_only_loss: bool = False
    """Leave the prompt's tokens out of the NLL, as the paper's text does. false: count them, as
    the authors' code and TRL do."""
    nll_reduction: Literal["token", "pair"] = "token"
    """Mean of the NLL. token: over all counted tokens of the optimizer step. pair: over the tokens
    of each response, then over the pairs."""


class TrainingSection(Section):
    """The optimisation (key names of transformers' TrainingArguments).

    ``train --resume RUN KEY=VALUE`` may change the learning rate and its schedule, the number of
    steps and the evaluations. The learning rate depends only on the number of the step. So the
    steps after the resume have the learning rate of a run that began with the new values.
    """

    output_dir: Annotated[str, Field(min_length=1), AfterValidator(expand_home)] = "runs/orpo"
    """The run folder that is created. A folder that exists is refused."""
    learning_rate: Positive = 5e-5
    """Peak learning rate. `train --resume RUN` may change it, for instance after a divergence."""
    global_batch_size: int = Field(32, ge=1)
    """Pairs per optimizer step, over all devices. Memory settings do not change it."""
    num_train_epochs: Positive = 1.0
    """Passes over the training pairs. Fractions are allowed."""
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(refuse_zero)] = -1
    """Optimizer steps. -1: as many as num_train_epochs needs. Changed with --resume, it also
    changes the length of the learning-rate schedule."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Steps = 0.1
    """Length of the warm-up: a share of all steps (below 1) or a number of steps."""
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = "paged_adamw_8bit"
    """Optimizer. Paged: bitsandbytes moves its state to host memory when the GPU's runs short."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay rate of the second moment."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Largest norm of the gradient; a larger one is clipped to it. 0: no clipping."""
    eval_steps: Annotated[Steps, Field(gt=0)] = 0.1
    """Steps between two evaluations on the held-out pairs: a share of all steps (below 1) or a
    number of steps. Each evaluation also saves a checkpoint."""
    load_best_model_at_end: bool = True
    """Keep the adapter with the lowest held-out loss. Without held-out pairs, or if false: keep
    the last one."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a lower held-out loss. null: never stop
    early."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the data order, the held-out split, the adapter's initial values and dropout."""
    full_determinism: bool = False
    """Use only deterministic kernels on a GPU, which is slower. A CPU run is always
    deterministic."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(read_trackers)
    ] = []
    """Trackers that get the metrics of each step and evaluation, and the recipe: tensorboard,
    wandb, trackio, or several of them. none: no tracker."""


class MemorySection(Section):
    """The memory settings of a step (our own keys). They do not change the loss or the gradient.

    The plan (``orpo-lite plan``) chooses the values that are auto.
    """

    budget: Annotated[str, BeforeValidator(check_budget)] = "auto"
    """Memory that the run may take on the device, such as 24GiB. auto: what is free on the GPU;
    on a CPU no plan is made."""
    packing: bool = True
    """Put pairs end to end into one row, without padding. false: padded rows and all logits at
    once, the plain step that the packed one is compared with."""
    prompt_sharing: bool = True
    """Compute the tokens that both responses of a pair begin with only once. Needs packing."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens in one packed forward pass; a pair that has more gets a pass of its own. auto
    without a plan: twice data.max_length."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Most pairs in one forward pass. null: as many as micro_batch_tokens allows; without packing
    one."""
    head_chunk: Literal["auto", "none"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows of logits that the output head computes at a time. auto: as many as fit into 96 MiB.
    none: all rows of a forward pass at once, as other trainers do."""
    fused_lora: bool = True
    """Compute a linear layer and its adapter in one operation, which keeps its input only once, in
    the model's data type."""
    activation_checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """Decoder layers that are computed again in the backward pass instead of keeping their
    activations: all, none, or a number of layers. auto without a plan: all."""
    checkpoint_offload: Literal["auto"] | bool = "auto"
    """Keep the inputs of checkpointed layers in host memory: less GPU memory, a little slower.
    auto without a plan: false."""
    mlp_tile: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    """Tokens that an MLP computes at a time; fewer take less memory. null: all at once. auto
    without a plan: null."""
    embedding_on_cpu: Literal["auto"] | bool = "auto"
    """Keep the input embedding in host memory. Not possible if it is also the output head. auto
    without a plan: false."""

    def unplanned(self) -> "MemorySection":
        """Return a copy with the values that auto has without a plan."""
        plain: dict[str, Any] = {"activation_checkpointing": "all", "mlp_tile": None}
        plain |= {"checkpoint_offload": False, "embedding_on_cpu": False}
        return self.model_copy(
            update={key: value for key, value in plain.items() if getattr(self, key) == "auto"}
        )

    def checkpointed(self, layers: int) -> int:
        """Return how many of ``layers`` decoder layers, from the first, are checkpointed."""
        amount = self.activation_checkpointing
        if isinstance(amount, int):
            return min(layers, amount)
        return 0 if amount == "none" else layers  # auto: all

    @property
    def budget_bytes(self) -> int | None:
        """``budget`` in bytes; None for auto."""
        return None if self.budget == "auto" else read_bytes(self.budget)


PLANNED_SETTINGS = (
    "micro_batch_tokens",
    "head_chunk",
    "activation_checkpointing",
    "checkpoint_offload",
    "mlp_tile",
    "embedding_on_cpu",
)
"""Keys of ``memory`` that a plan sets if they are auto."""


class OutputSection(Section):
    """Settings of the merge, the samples and the push after the last step (our own keys)."""

    merge: bool = True
    """Merge the adapter into the 16-bit base after the training."""
    report: bool = True
    """Write report.html into the run, after evaluations and at the end: verdicts, curves, data and
    answers. false: only `orpo-lite report` writes it."""
    samples: int = Field(3, ge=0, le=20)
    """Prompts that are answered before the training, at each evaluation and at the end: this many
    held-out ones, and at most this many of five neutral ones that a model card may show."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of each of these answers."""
    push_to_hub: bool = False
    """Push the adapter and its model card to the hub at the end. Whether that is allowed is
    checked before the training."""
    hub_model_id: Annotated[str | None, AfterValidator(check_repository)] = None
    """Repository to push to: owner/name, or only a name for one of your own. It is created if it
    does not exist."""
    hub_private_repo: bool = True
    """Create the repository as private: only you or your organisation can see it. false: public."""
    send_report: bool = False
    """Send report.html to wandb and trackio at the end. It quotes prompts and answers, so it is
    only sent if this is true."""


class Recipe(Section):
    """A complete recipe: all sections, and the source of each value (:attr:`sources`)."""

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
        """The source of each ``section.key``: "default", "NAME.yaml:LINE" or "command line"."""
        return {key: self._sources.get(key, "default") for key, _ in self.items()}

    @property
    def micro_batch_tokens(self) -> int:
        """``memory.micro_batch_tokens``. For auto, two sequences of ``data.max_length`` fit."""
        tokens = self.memory.micro_batch_tokens
        return 2 * self.data.max_length if tokens == "auto" else tokens

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield every ``section.key`` with its value, in the order of the schema."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            for key in type(section).model_fields:
                yield f"{name}.{key}", getattr(section, key)

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a copy with these ``section.key`` values, validated. The sources are kept."""
        tree = self.model_dump()
        for key, value in values.items():
            section, _, field = key.partition(".")
            tree[section][field] = value
        copy = Recipe.model_validate(tree)
        copy._sources.update(self._sources)
        return copy

    def with_memory(self, settings: Mapping[str, Any]) -> "Recipe":
        """Return a copy with these values of ``memory``; the keys are without their section."""
        return self.override({f"memory.{key}": value for key, value in settings.items()})

    def to_yaml(self, *, comments: bool = False) -> str:
        """Return the whole recipe as YAML; ``comments`` adds the documentation of each key."""
        lines = []
        for name in type(self).model_fields:
            section = getattr(self, name)
            title = (type(section).__doc__ or "").partition("\n")[0]
            lines.append(f"{name}:  # {title}" if comments else f"{name}:")
            for key, field in type(section).model_fields.items():
                if comments:
                    wrapped = textwrap.wrap(field.description or "", COMMENT_WIDTH)
                    lines += [f"  # {line}" for line in wrapped]
                lines.append(f"  {key}: {to_text(getattr(section, key))}")
        return "\n".join(lines) + "\n"


COMMENT_WIDTH = 96

SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
"""The class of each section."""
KEYS: dict[str, list[str]] = {
    name: list(section.model_fields) for name, section in SECTIONS.items()
}
"""The keys of each section."""


def _full_keys() -> dict[str, list[str]]:
    full_keys: dict[str, list[str]] = {}
    for section, keys in KEYS.items():
        for key in keys:
            full_keys.setdefault(key, []).append(f"{section}.{key}")
    return full_keys


FULL_KEYS = _full_keys()
"""Each key without its section -> every ``section.key`` that it may be."""
