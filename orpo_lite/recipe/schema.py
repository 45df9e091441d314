"""The schema of a recipe: eight sections, their keys, types and defaults.

If TRL, transformers or peft has the same setting, the recipe uses the same name for the key.
Defaults are defined only here and in loss.py. A recipe file needs only the values that differ from
the defaults. This module does not import torch.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr

from orpo_lite.recipe.loss import LossSection
from orpo_lite.recipe.section import Section
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


class ModelSection(Section):
    """The base model. The keys have the names of TRL's ModelConfig."""

    model_name_or_path: str = Field(min_length=1)
    """The base model: a hub name (owner/name) or a local folder."""
    model_revision: str = "main"
    """Branch, tag or commit of the base's hub repository. lock.json records the commit."""
    adapter_name_or_path: str | None = None
    """A LoRA adapter to train further: a hub name or a local folder. Its configuration replaces the
    section lora of the recipe. null: train a new adapter."""
    device: Literal["auto", "cpu"] = "auto"
    """Device to train on. auto: the GPU if torch finds one, else the CPU. cpu: always the CPU. If
    there are several GPUs, CUDA_VISIBLE_DEVICES selects one; the default is the first."""
    dtype: Dtype = "auto"
    """Data type of the activations and of the weights that are not quantised. auto: float32 on a
    CPU; on a GPU bfloat16, or float16 if the GPU has no bfloat16 (such as a T4)."""
    attn_implementation: Annotated[str | None, BeforeValidator(check_attention)] = None
    """Attention implementation of transformers: sdpa, eager or flash_attention_2. null:
    transformers chooses."""


class QuantizationSection(Section):
    """4-bit quantisation of the base. The keys have the names of BitsAndBytesConfig."""

    load_in_4bit: bool = True
    """Quantise the base to 4 bit. false: keep it in model.dtype, which takes four times the
    memory."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: nf4 (NormalFloat, from the QLoRA paper) or fp4 (a 4-bit float)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales of the 4-bit weights too. This saves 0.4 bit per parameter."""
    bnb_4bit_compute_dtype: Dtype = "auto"
    """Data type of the matrix products with 4-bit weights. auto: model.dtype."""


class LoraSection(Section):
    """The LoRA adapter. The keys have the names of peft's LoraConfig."""

    r: int = Field(16, ge=1)
    """Rank of the adapter. A higher rank can learn more and takes more memory."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapter: its output is multiplied by lora_alpha / r. With use_rslora, it is
    multiplied by lora_alpha / sqrt(r)."""
    lora_dropout: Fraction = 0.0
    """Dropout probability of the adapter's input."""
    target_modules: Annotated[
        Literal["all-linear"] | Annotated[list[str], Field(min_length=1)],
        BeforeValidator(read_module_names),
    ] = "all-linear"
    """Modules that get an adapter: all-linear (every linear layer except the output head), or a
    list of names such as q_proj,v_proj."""
    use_rslora: bool = False
    """Use rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Use weight-decomposed LoRA (DoRA, arXiv 2402.09353). It is slower, and a little better at a
    low rank."""
    init_lora_weights: Annotated[
        Literal[True, "gaussian", "orthogonal"], BeforeValidator(check_lora_init)
    ] = True
    """Initial values of the adapter: true (peft's default), gaussian or orthogonal. PiSSA and
    similar methods are refused, because they rewrite the base's weights."""


class DataSection(Section):
    """The preference pairs."""

    dataset_name: Annotated[
        Name | Annotated[list[Name], Field(min_length=1)], BeforeValidator(read_names)
    ]
    """The dataset: a hub name, a local file (jsonl, json, csv, tsv, parquet, arrow),
    a folder or a glob pattern. A list names several datasets."""
    dataset_config: str | None = None
    """Name of the configuration to read, if a hub dataset has several configurations."""
    dataset_train_split: str = "auto"
    """Split to train on. auto: train_prefs or a similar split if the dataset has one, else
    train."""
    dataset_test_split: str | None = None
    """Held-out pairs: a split of the dataset, or a local file or folder. null: test_split_size
    sets how many pairs of the training split are held out."""
    test_split_size: float = Field(0.02, ge=0, allow_inf_nan=False)
    """Size of the held-out part of the training split: a share of the prompts (below 1) or a number
    of pairs. All pairs of a prompt are in the same part. 0: hold nothing out."""
    format: Literal[
        "auto", "explicit", "implicit", "messages", "hh_rlhf", "doubled", "orca", "alpaca",
        "conversation", "sharegpt", "openai", "ranked", "judged",
    ] = "auto"  # fmt: skip
    """How a row holds its pair. auto: detect the format from the columns and values, and report
    the reason."""
    column_map: dict[str, str | Annotated[list[str], Field(min_length=1)]] = {}  # noqa: RUF012 - pydantic copies it
    """Our column name -> the dataset's column name, such as {prompt: question, chosen: good}. If
    several datasets name a column differently, write a list: {chosen: [good, win]}."""
    max_samples: int | None = Field(None, ge=1)
    """Number of rows to read from the start of each dataset. null: all rows."""
    max_bad_rows: Fraction = 0.01
    """Largest share of rows that may have an error, such as NaN or a tool call. Rows with an error
    are left out. If their share is larger, the command fails. 3 such rows are always allowed."""
    max_length: int = Field(2048, ge=8)
    """Largest number of tokens of prompt and response together. If they are longer, the end of the
    response is cut off."""
    max_prompt_length: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Largest number of tokens of a prompt. Pairs with a longer prompt are left out. auto: half of
    max_length. The ORPO paper does the same (Appendix C)."""
    chat_template: str = "auto"
    """Chat template: auto, none or the path of a .jinja file. auto: the tokenizer's template, or
    the ORPO paper's if the tokenizer has none. none: join prompt and response as plain text."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(to_json_values)] = {}  # noqa: RUF012 - pydantic copies it
    """Variables for the chat template, such as {enable_thinking: false}."""

    @property
    def names(self) -> list[str]:
        """Return the names of the datasets as a list, even if there is only one dataset."""
        return [self.dataset_name] if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def prompt_limit(self) -> int:
        """Return ``max_prompt_length`` as a number of tokens: for auto, half of ``max_length``."""
        return self.max_length // 2 if self.max_prompt_length == "auto" else self.max_prompt_length

    @property
    def columns(self) -> dict[str, list[str]]:
        """Return ``column_map`` with lists: ``{"chosen": "good"}`` -> ``{"chosen": ["good"]}``.

        A list holds names of dataset columns. If a row has several of them, the first is read.
        """
        return {
            ours: [names] if isinstance(names, str) else names
            for ours, names in self.column_map.items()
        }


class TrainingSection(Section):
    """The optimisation. The keys have the names of transformers' TrainingArguments.

    ``train --resume RUN KEY=VALUE`` may change the learning rate, its schedule, the number of steps
    and the evaluations. The learning rate of a step depends only on these values and on the step's
    number. So a resumed run has the same learning rates as a run that began with the new values.
    """

    output_dir: Annotated[str, Field(min_length=1), AfterValidator(expand_home)] = "runs/orpo"
    """Path of the run folder, which train creates. An existing folder must be empty."""
    learning_rate: Positive = 5e-5
    """Highest learning rate, after the warm-up. `train --resume RUN` may change it, for instance if
    the loss diverged."""
    global_batch_size: int = Field(32, ge=1)
    """Number of pairs in an optimizer step, over all devices. Memory settings do not change it."""
    num_train_epochs: Positive = 1.0
    """Number of passes over the training pairs. It may be a fraction, such as 0.5."""
    max_steps: Annotated[int, Field(ge=-1), AfterValidator(refuse_zero)] = -1
    """Number of optimizer steps. -1: as many as num_train_epochs needs. The learning-rate schedule
    always has this number of steps, even if --resume changes the number."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How the learning rate falls after the warm-up. constant: it does not fall."""
    warmup_steps: Steps = 0.1
    """Length of the warm-up: a share of all steps (below 1) or a number of steps."""
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch"] = "paged_adamw_8bit"
    """Optimizer. The paged optimizers are from bitsandbytes. They move their state to host memory
    if the GPU's memory is full."""
    adam_beta1: Fraction = 0.9
    """Decay rate of AdamW's first moment, the running mean of the gradient."""
    adam_beta2: Fraction = 0.999
    """Decay rate of AdamW's second moment, the running mean of the squared gradient."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon, which is added to the denominator of the update."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Largest norm of the gradient. A gradient with a larger norm is scaled down to it. 0: no
    clipping."""
    eval_steps: Annotated[Steps, Field(gt=0)] = 0.1
    """Interval between two evaluations on the held-out pairs: a share of all steps (below 1) or a
    number of steps. Each evaluation also saves a checkpoint."""
    load_best_model_at_end: bool = True
    """true: keep the adapter with the lowest held-out loss. false: keep the last adapter. Without
    held-out pairs, the last adapter is always kept."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a new lowest held-out loss. null: never
    stop early."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed for the order of the data, the held-out split, the adapter's initial values and
    dropout."""
    full_determinism: bool = False
    """Use only deterministic kernels on a GPU. They are slower. A training on a CPU is always
    deterministic."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(read_trackers)
    ] = []  # noqa: RUF012 - pydantic copies it
    """Trackers that receive the recipe and the metrics of each step and evaluation: tensorboard,
    wandb, trackio, or several of them. none: no tracker."""


class MemorySection(Section):
    """The memory settings of a step. These settings do not change loss or gradient.

    The keys have names of orpo-lite, not of transformers' TrainingArguments. The plan
    (``orpo-lite plan``) chooses each value that is auto, except the budget.
    """

    budget: Annotated[str, BeforeValidator(check_budget)] = "auto"
    """Device memory that the training may use, such as 24GiB. auto: the free memory of the GPU. On
    a CPU, auto means that no plan is made."""
    packing: bool = True
    """true: put pairs end to end into one row, without padding. false: pad each sequence and hold
    all logits at once. This plain step is the reference for checks of the packed step."""
    prompt_sharing: bool = True
    """Compute a pair's prompt only once, for both responses. If the responses begin with the same
    tokens, these are also computed once. Needs packing."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Largest number of tokens in one packed forward pass. A pair with more tokens gets a pass of
    its own. auto: the plan chooses. Without a plan: twice data.max_length."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Largest number of pairs in one forward pass. null: with packing, as many pairs as
    micro_batch_tokens allows; without packing, one pair."""
    head_chunk: Literal["auto", "none"] | Annotated[int, Field(ge=1)] = "auto"
    """Number of tokens whose logits are computed at a time. auto: as many as fit into 96 MiB, or
    fewer if the plan needs that. none: all tokens of a forward pass, as in other trainers."""
    fused_lora: bool = True
    """Compute a linear layer and its adapter in one operation. The input that they share is then
    kept only once, in the model's data type."""
    activation_checkpointing: Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)] = "auto"
    """Decoder layers that do not keep their activations but are computed again in the backward
    pass: all, none, or a number of layers. auto: the plan chooses. Without a plan: all."""
    checkpoint_offload: Literal["auto"] | bool = "auto"
    """Keep the inputs of checkpointed layers in host memory. This takes less GPU memory and is a
    little slower. auto: the plan chooses. Without a plan: false."""
    mlp_tile: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    """Number of tokens that an MLP computes at a time. Fewer tokens take less memory. null: all at
    once. auto: the plan chooses. Without a plan: null."""
    embedding_on_cpu: Literal["auto"] | bool = "auto"
    """Keep the input embedding in host memory. This is not possible if the embedding is tied to the
    output head. auto: the plan chooses. Without a plan: false."""

    shard: Literal["auto", "off"] | Annotated[int, Field(ge=2)] = "auto"
    """Number of processes that share one copy of the base: each holds a part of every layer. off:
    each process holds the whole base. auto: off if the whole base fits each GPU; otherwise as few
    processes of one machine as fit. Needs `orpo-lite launch` or `accelerate launch`."""

    def unplanned(self) -> "MemorySection":
        """Return a copy for a training without a plan.

        In the copy, the value auto of four keys is replaced: activation_checkpointing -> all,
        mlp_tile -> null, checkpoint_offload -> false, embedding_on_cpu -> false.
        """
        plain: dict[str, Any] = {"activation_checkpointing": "all", "mlp_tile": None}
        plain |= {"checkpoint_offload": False, "embedding_on_cpu": False}
        return self.model_copy(
            update={key: value for key, value in plain.items() if getattr(self, key) == "auto"}
        )

    @property
    def shards(self) -> int:
        """Return the number of processes that share one copy of the base; 1 if none do.

        It is also 1 for the value auto, which a plan replaces.
        """
        return self.shard if isinstance(self.shard, int) else 1

    def checkpointed(self, layers: int) -> int:
        """Return the number of checkpointed layers. They are the first layers of the model.

        ``layers``: the number of decoder layers of the model.
        """
        amount = self.activation_checkpointing
        if isinstance(amount, int):
            return min(layers, amount)
        return 0 if amount == "none" else layers  # auto: all

    @property
    def budget_bytes(self) -> int | None:
        """Return ``budget`` in bytes, or None for auto."""
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
    """Settings of the merge, the report, the sample answers and the push to the hub."""

    merge: bool = True
    """Merge the adapter into the 16-bit base at the end of the training."""
    report: bool = True
    """Write report.html into the run folder, after evaluations and at the end. It shows verdicts,
    curves, data and answers. false: only `orpo-lite report` writes it."""
    samples: int = Field(3, ge=0, le=20)
    """Number of held-out prompts that are answered before the training, at each evaluation and at
    the end. The same number of neutral prompts (at most five) is answered too. Neutral prompts are
    not from the data, so the model card can show them."""
    max_new_tokens: int = Field(64, ge=1)
    """Largest number of tokens of each answer to these prompts (see samples)."""
    push_to_hub: bool = False
    """Push the adapter and its model card to the hub at the end. The permission to push is checked
    before the training."""
    hub_model_id: Annotated[str | None, AfterValidator(check_repository)] = None
    """Repository to push to: owner/name, or only a name for your own account. If the repository
    does not exist, it is created."""
    hub_private_repo: bool = True
    """true: create a private repository, which only you or your organisation can see. false: create
    a public repository."""
    send_report: bool = False
    """Send report.html to wandb and trackio at the end. The default is false, because the report
    quotes prompts and answers."""


class Recipe(Section):
    """A complete recipe: all sections. :attr:`sources` tells where each value was set."""

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
        """Return ``section.key`` -> place of its value.

        A place is "default", "NAME.yaml:LINE" or "command line".
        """
        places = self._sources  # looked up once: pydantic searches for a private attribute
        return {key: places.get(key, "default") for key, _ in self.items()}

    @property
    def micro_batch_tokens(self) -> int:
        """Return ``memory.micro_batch_tokens`` as a number: for auto, 2 * ``data.max_length``."""
        tokens = self.memory.micro_batch_tokens
        return 2 * self.data.max_length if tokens == "auto" else tokens

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield every ``section.key`` with its value, in the order of the schema."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            for key in type(section).model_fields:
                yield f"{name}.{key}", getattr(section, key)

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a validated copy with new values, given as ``section.key`` -> value.

        :attr:`sources` does not change. Raises pydantic's ValidationError for an invalid value.
        """
        tree = self.model_dump()
        for key, value in values.items():
            section, _, field = key.partition(".")
            tree[section][field] = value
        copy = Recipe.model_validate(tree)
        copy._sources.update(self._sources)
        return copy

    def with_memory(self, settings: Mapping[str, Any]) -> "Recipe":
        """Return a copy with new values of the section memory, given as key -> value."""
        return self.override({f"memory.{key}": value for key, value in settings.items()})

    def to_yaml(self, *, comments: bool = False) -> str:
        """Return the whole recipe as YAML. ``comments`` adds a comment above each key."""
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
"""Section -> its class."""
KEYS: dict[str, list[str]] = {
    name: list(section.model_fields) for name, section in SECTIONS.items()
}
"""Section -> its keys."""


def _full_keys() -> dict[str, list[str]]:
    full_keys: dict[str, list[str]] = {}
    for section, keys in KEYS.items():
        for key in keys:
            full_keys.setdefault(key, []).append(f"{section}.{key}")
    return full_keys


FULL_KEYS = _full_keys()
"""Key -> each ``section.key`` with that key."""
