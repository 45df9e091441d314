"""Write the model card (README.md) of a finished run.

The card contains no paths, no names of local data and no access tokens. It quotes texts from the
data only if a person requests held-out samples.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from orpo_lite.data.sources.source import is_path
from orpo_lite.errors import TOKEN
from orpo_lite.publishing.card_facts import PLACEHOLDER, CardOptions, Facts, make_metadata
from orpo_lite.publishing.card_loading import loading_section
from orpo_lite.publishing.edited_card import read_edited_card, seal
from orpo_lite.publishing.licences import is_non_commercial, licence_names, licence_text
from orpo_lite.recipe.text import to_text
from orpo_lite.runs.atomic import write_text
from orpo_lite.runs.commands import Weights

SHOWN_KEYS = (
    "lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.use_rslora",
    "lora.use_dora", "quantization.load_in_4bit", "data.max_length", "data.max_prompt_length",
    "training.learning_rate", "training.global_batch_size", "training.num_train_epochs",
    "training.max_steps", "training.lr_scheduler_type", "training.warmup_steps", "training.optim",
    "training.adam_beta1", "training.adam_beta2", "training.adam_epsilon",
    "training.weight_decay", "training.max_grad_norm", "training.seed",
)  # fmt: skip

# Keys in the configuration of a peft adapter that set its shape and are not in the recipe.
ADAPTER_SHAPE = (
    "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters",
)  # fmt: skip

ONTO: dict[Weights, str] = {
    "original": "the base's own weights",
    "dequantized": "the base's weights as rounded to 4 bit in training",
}
REWARD_LIMITS = (
    "Only rewards of replies to the same prompt can be compared, because the training compares "
    "only such replies.",
    "The reward is read at the token that ends a reply. Without this token at its end, a text gets "
    "a number that means nothing.",
    "In 16 bit, a reward is rounded to two or three digits, so that similar replies can get equal "
    'rewards. With `dtype="float32"` it is not rounded.',
)
SAMPLE_LENGTH = 1500  # characters of a sample
# Matches control characters, which a card must not contain.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

SAMPLED = {"Prompt": "prompt", "Before": "before", "After": "after"}


def make_card(path: Path, options: CardOptions | None = None) -> str:
    """Return the content of README.md for a finished run: metadata in YAML, then Markdown.

    Raises:
        CheckpointError: the run is not finished, or a file of the run is damaged.
    """
    facts = Facts.read(path, options or CardOptions())
    metadata = make_metadata(facts)
    parts = [
        _head(facts),
        _training(facts),
        _data(facts),
        _results(facts),
        loading_section(facts),
        _verification(facts),
        _samples(facts),
        _limits(facts),
        _licence(facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return seal(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def write_card(path: Path) -> None:
    """Write README.md for a finished run. Do nothing if a person has edited the file."""
    if not read_edited_card(path):
        write_text(path / "README.md", make_card(path))


def _head(facts: Facts) -> str:
    """Return the title and the summary of the card."""
    options, objective = facts.options, facts.objective
    paper = objective["paper"].replace("https://arxiv.org/abs/", "arXiv ")
    name = "Reward model" if facts.is_reward_model else f"Tuned with {objective['title']}"
    if options.repository != PLACEHOLDER:
        name = options.repository.rpartition("/")[2]
    what = (
        "The merged weights" if options.merged else f"A LoRA adapter (rank {facts.recipe.lora.r})"
    )
    how = f"tuned on {facts.data['train_pairs']:,} preference pairs with {objective['title']}"
    if facts.is_reward_model:
        head = "in place of its output head" if options.merged else "for it"
        how = f"with a score head {head}, trained on {facts.data['train_pairs']:,} preference pairs"
    text = (
        f"{what} of {facts.base}, {how} ([{paper}]({objective['paper']})) "
        f"by orpo-lite {facts.lock['orpo_lite']}."
    )
    if options.merged:
        text += f" The adapter is merged onto {ONTO[options.merged]}."
    if facts.is_reward_model:
        text += (
            " It is a reward model: it gives a reply one number, the reward, which is higher for a "
            "better reply. It writes no text."
        )
    lines = dict.fromkeys(terms.built_with for terms in facts.terms if terms.built_with)
    built_with = "".join(f"**{line}**\n\n" for line in lines)
    return f"# {name}\n\n{built_with}{text}"


def _training(facts: Facts) -> str:
    recipe = facts.recipe
    values = {key: facts.over_time(key) for key in SHOWN_KEYS}
    values["data.max_prompt_length"] = str(recipe.data.prompt_limit)
    if facts.start["training.max_steps"] > 0 and recipe.training.max_steps > 0:
        del values["training.num_train_epochs"]  # it has no effect with max_steps
    steps = "not known"
    if facts.steps is not None:
        steps = f"{facts.steps:,}; kept: step {facts.kept_step:,}"
    versions = [f"{name} {facts.over_time(f'versions.{name}')}" for name in facts.lock["versions"]]
    rows = [
        *facts.objective["settings"].items(),
        ("steps", steps),
        ("chat template", _template(facts)),
        *((f"`{key}`", _cell(value)) for key, value in values.items()),
        ("versions", ", ".join(versions)),
    ]
    if recipe.model.adapter_name_or_path:
        source = recipe.model.adapter_name_or_path
        is_local = source.startswith((".", "/", "~")) or source.count("/") != 1
        rows.insert(0, ("initial adapter", "a local adapter" if is_local else _cell(source)))
        shape = {key: facts.adapter[key] for key in ADAPTER_SHAPE if facts.adapter.get(key)}
        rows += [(f"`{key}` of the adapter", _cell(to_text(value))) for key, value in shape.items()]
    return f"## Training\n\n{facts.objective['formula']}\n\n{_table(('what', 'value'), rows)}"


def _template(facts: Facts) -> str:
    choice = facts.recipe.data.chat_template
    if choice == "none":
        return "none: prompt and response joined as plain text"
    text = "a custom template, which is in this repository"
    if choice == "auto":
        text = _cell(facts.data["chat_template"])
    if facts.is_reward_model:
        text += "; in this repository it writes nothing after the token that ends a reply"
    return text


def _data(facts: Facts) -> str:
    data, recipe = facts.data, facts.recipe
    rows: list[tuple[str, ...]] = []
    local = [name for name in recipe.data.names if is_path(name)]
    for name in recipe.data.names:
        if name in facts.datasets:
            licence = licence_text(facts.data_licences.get(name, {})) or "not stated"
            link = f"[{name}](https://huggingface.co/datasets/{name})"
            rows.append((link, _cell(licence)))
        elif name.startswith("builtin:"):
            rows.append(("the built-in pairs of orpo-lite", "not stated"))
        else:
            number = local.index(name) + 1 if len(local) > 1 else 0
            rows.append((_local(name, number), "not stated"))
    head: tuple[str, ...] = ("data", "licence")
    if len(data.get("rows_of_sets", ())) == len(rows):
        head = (*head, "training rows")
        rows = [(*row, f"{count:,}") for row, count in zip(rows, data["rows_of_sets"], strict=True)]
    parts = ["## Data", _table(head, rows)]
    if facts.datasets:
        split = recipe.data.dataset_train_split
        parts.append(f"Split: {'chosen automatically' if split == 'auto' else _cell(split)}.")
    if recipe.data.max_samples:
        parts.append(f"Only the first {recipe.data.max_samples:,} rows of each dataset are used.")
    if test := recipe.data.dataset_test_split:
        parts.append(f"Held out: {'local files' if is_path(test) else f'split {_cell(test)}'}.")
    elif any(name.startswith("builtin:") for name in recipe.data.names):
        parts.append("Held out: pairs that were made for this purpose.")
    elif data["held_out_pairs"]:
        parts.append("Held out: some of the prompts, with all of their pairs.")
    total = " in total" if len(rows) > 1 else ""
    parts.append(
        f"{data['rows_read']:,} rows read{total}: {data['train_pairs']:,} training pairs, "
        f"{data['held_out_pairs']:,} held out; sha256 of the pairs `{data['sha256']}`."
    )
    dropped = [(_cell(reason), f"{drop['pairs']:,}") for reason, drop in data["dropped"].items()]
    parts.append(
        f"Dropped:\n\n{_table(('reason', 'pairs'), dropped)}" if dropped else "No pair was dropped."
    )
    return "\n\n".join(parts)


def _local(name: str, number: int) -> str:
    """Return a description of local data that hides the path, such as "local file 2".

    A folder or a pattern is described as files. ``number`` is 0 if there is only one dataset.
    """
    is_file = Path(name).suffix and not set(name) & set("*?[")
    if number:
        return f"local {'file' if is_file else 'files'} {number}"
    return "a local file" if is_file else "local files"


def _results(facts: Facts) -> str:
    held_out = f"{facts.data['held_out_pairs']:,} pairs"
    if facts.evaluations is None:
        reason = "no pairs were held out"
        if facts.data["held_out_pairs"]:
            reason = f"{held_out} were held out, but metrics before or after training are missing"
        return f"## Held-out results\n\nNone: {reason}."
    before, after = facts.evaluations
    rows = [
        (meaning, f"{before[key]:.4f}", f"{after[key]:.4f}")
        for key, meaning in facts.objective["metrics"].items()
        if before.get(key) is not None and after.get(key) is not None
    ]
    head = ("metric", "before", "after")
    base = "the base in 4 bit" if facts.recipe.quantization.load_in_4bit else "the base"
    start = "without adapter"
    if facts.recipe.model.adapter_name_or_path:
        start = "with the initial adapter"
    elif facts.is_reward_model:
        start = "without adapter and with a random score head"
    caption = f"On {held_out}, with {base}. Before: {start}. After: with the kept adapter."
    return f"## Held-out results\n\n{caption}\n\n{_table(head, rows)}"


def _verification(facts: Facts) -> str:
    """Return the section with the results of `orpo-lite merge --verify`, or ""."""
    parts = ["## Check of the merge"]
    of_chosen, numbers = "log-prob of chosen", "mean log-probabilities"
    if facts.is_reward_model:
        of_chosen, numbers = "reward of chosen", "rewards"
    for weights, found in facts.verified.items():
        rows = [
            (
                _cell(row["model"]),
                f"{row['accuracy']:.1%}",
                f"{row['margin']:+.4f}",
                f"{row['chosen']:.4f}",
            )
            for row in found["rows"]
        ]
        pairs = f"{found['pairs']:,} {'held-out' if found['held_out'] else 'training'} pairs"
        outcome = found.get("outcome", "passed" if found["passed"] else "FAILED")
        verdict = f"{outcome}: {numbers} differ by at most"
        limit = max(found["bound"], found.get("rounding", 0.0))
        bound = f"{found['difference']:.2g} from base and adapter (limit {limit:.2g})"
        parts.append(f"Merged onto {ONTO[weights]}:")
        parts.append(_table((pairs, "reward accuracy", "margin", of_chosen), rows))
        parts.append(f"{verdict} {bound}; the adapter changes them by up to {found['effect']:.2g}.")
    return "\n\n".join(parts) if facts.verified else ""


def _samples(facts: Facts) -> str:
    source = "held-out" if facts.options.samples else "neutral"
    samples = [sample for sample in facts.samples if sample.source == source]
    if facts.options.samples:
        samples = samples[: facts.options.samples]
    if not samples or facts.is_reward_model:
        return ""
    prompts = "Held-out prompts" if facts.options.samples else "Neutral prompts, not from the data"
    base = "the base in 4 bit" if facts.recipe.quantization.load_in_4bit else "the base"
    parts = [
        "## Samples",
        f"{prompts}, answered by {base} without and with the adapter; sampled at temperature "
        f"{samples[0].temperature or 0.7}, at most {facts.recipe.output.max_new_tokens} tokens, "
        "not selected by hand.",
    ]
    for sample in samples:
        parts += [
            f"{title}:\n\n{_quoted(getattr(sample, name))}" for title, name in SAMPLED.items()
        ]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """Return a text in a Markdown code block. Its fence is longer than any in the text."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = TOKEN.sub("hf_***", text)
    if len(text) > SAMPLE_LENGTH:
        text = f"{text[:SAMPLE_LENGTH]} ..."
    ticks = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n{text}\n{fence}"


def _limits(facts: Facts) -> str:
    data = facts.data
    lines = [
        "The model has learned the preferences in these pairs, including their biases. It also has "
        "the limits of its base. No safety evaluation was made.",
        f"The chosen answer is the longer one in {data['chosen_longer']:.0%} of the pairs and the "
        f"shorter one in {data['rejected_longer']:.0%}; the model may have learned to prefer a "
        "length.",
    ]
    if facts.evaluations:
        not_measured = "how good its answers are"
        if facts.is_reward_model:
            not_measured = "how well it ranks replies of other kinds"
        lines.append(
            "The held-out metrics measure how well the model ranks pairs that are similar to the "
            f"training pairs. They do not measure {not_measured}."
        )
    if facts.is_reward_model:
        lines += REWARD_LIMITS
    if cut := data["cut"]["responses_without_end"]:
        lines.append(f"{cut:,} responses were cut at {facts.recipe.data.max_length:,} tokens.")
    if shared := data["prompts"]["shared"]:
        lines.append(
            f"{shared:,} held-out prompts are also training prompts, so the metrics are too good."
        )
    if facts.recipe.model.model_name_or_path.startswith("builtin:"):
        lines.append("This is a toy model. It only shows that orpo-lite works.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(facts: Facts) -> str:
    lines = [terms.notice for terms in facts.terms]
    name = _cell(licence_text(facts.licence))
    if isinstance(facts.licence.get("license"), list):
        lines.append(
            f"The base's card names several licences: {name}. They also apply to this derivative."
        )
    elif name and not lines:
        lines.append(
            f"The base's card names its licence: {name}. It also applies to this derivative."
        )
    elif not name:
        lines.append(
            "The licence of the base is not known: its card names none or could not be read."
        )
    return "\n\n".join(["## Licence", *lines, *_non_commercial(facts)])


def _non_commercial(facts: Facts) -> list[str]:
    lines = []
    if any(map(is_non_commercial, licence_names(facts.licence))):
        lines.append("**Not for commercial use**, like its base.")
    for name in facts.datasets:
        licence = facts.data_licences.get(name, {})
        if any(map(is_non_commercial, licence_names(licence))):
            text = _cell(licence_text(licence))
            lines.append(f"**Not for commercial use because of its data**: {name} is under {text}.")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return a text as one line for a table cell, with Markdown characters escaped."""
    flat = TOKEN.sub("hf_***", CONTROL.sub("", " ".join(text.split())))
    return re.sub(r"([|<>`\[\]*\\])", r"\\\1", flat)
