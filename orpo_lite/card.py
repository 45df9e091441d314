"""The model card: what a run folder has to say to people who did not train the model.

Nothing of the data's texts, no path of this machine and no token enters it; what local data are called neither.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from orpo_lite import run
from orpo_lite.base import vllm_rank
from orpo_lite.errors import TOKEN, CheckpointError
from orpo_lite.licence import find_terms, is_hub_name, is_non_commercial, split_card
from orpo_lite.recipe import Recipe, to_text

PAPER = "https://arxiv.org/abs/2403.07691"
SHOWN_KEYS = (
    "lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.use_rslora", "lora.use_dora",
    "quantization.load_in_4bit", "data.max_length", "data.max_prompt_length", "training.learning_rate",
    "training.global_batch_size", "training.num_train_epochs", "training.max_steps", "training.lr_scheduler_type",
    "training.warmup_steps", "training.optim", "training.adam_beta1", "training.adam_beta2", "training.adam_epsilon",
    "training.weight_decay", "training.max_grad_norm", "training.seed",
)  # fmt: skip
METRICS = {
    "eval_loss": "loss",
    "eval_nll_loss": "NLL of the chosen",
    "eval_log_odds_chosen": "log odds, chosen to rejected",
    "eval_logps/chosen": "mean log-probability, chosen",
    "eval_logps/rejected": "mean log-probability, rejected",
    "eval_rewards/accuracies": "share of pairs whose chosen answer is the likelier",
}
SOMEWHERE = "OWNER/NAME"  # stands for the repository until it is known
SEAL = re.compile(r"\n<!-- orpo-lite card ([0-9a-f]{16}) -->\n\Z")
OLLAMA = (
    "Ollama: `orpo-lite export RUN --to ollama`, where the run lies, writes the GGUF file and a Modelfile with the "
    "template and the stop tokens of this model. A bare `FROM` would leave both to Ollama's guess."
)
ONTO: dict[run.Weights, str] = {
    "original": "the base's own weights",
    "dequantized": "what 4 bit had left of the base's weights, as in training",
}
SHOWN = 1500  # characters of a sample
SAMPLED = {"Prompt": "prompt", "Before": "before", "After": "after"}


@dataclass(frozen=True)
class Shown:
    """What a card is for."""

    repository: str = SOMEWHERE
    merged: run.Weights | None = None
    """The weights that the model was merged onto; None for an adapter."""
    licences: Mapping[str, Any] | None = None
    """In place of what the lock has."""
    samples: int = 0
    """So many prompts of the data are shown with their answers, in place of the neutral ones: somebody asked for it."""


def make_card(path: Path, shown: Shown = Shown()) -> str:
    """README.md of a finished run: metadata in YAML, then Markdown.

    Raises:
        CheckpointError: no finished run there.
    """
    facts = _Facts.read(path, shown)
    metadata = _metadata(facts)
    parts = [
        _head(facts),
        _training(facts),
        _data(facts),
        _results(facts),
        _loading(facts),
        _verification(facts),
        _samples(facts),
        _limits(facts),
        _licence(facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return seal(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def write_card(path: Path) -> None:
    """README.md of a finished run, made afresh unless a person has changed the one that is there."""
    file = path / "README.md"
    if not file.is_file() or is_own(file.read_text(encoding="utf-8")):
        repository = run.read_recipe(path).output.hub_model_id
        run.write_text(file, make_card(path, Shown(repository or SOMEWHERE)))


def seal(text: str) -> str:
    """The text with a mark by which a later change of it is seen."""
    return f"{text}\n<!-- orpo-lite card {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_own(card: str) -> bool:
    """Whether a card is as it was made; one that a person has changed is pushed as that person left it."""
    found = SEAL.search(card)
    return found is not None and seal(card[: found.start()]) == card


def adopt_card(path: Path, own: str, shown: Shown) -> str:
    """A card changed by hand, for a repository: its words, and what must be true of the metadata.

    Raises:
        CheckpointError: its metadata are no YAML, or it lacks what the base's licence asks for.
    """
    facts = _Facts.read(path, shown)
    data, body = split_card(SEAL.sub("", own))
    if not data:
        expected = "metadata in YAML between lines of ---"
        raise CheckpointError(
            str(path / "README.md"), "begins with no metadata", expected, "mend it, or remove the file"
        )
    made: dict[str, Any] = _metadata(facts).to_dict()  # type: ignore[no-untyped-call]
    data |= {key: made[key] for key in ("library_name", "base_model_relation") if key in made}
    built_with = facts.terms.built_with if facts.terms else ""
    if built_with not in body:
        rule = f"“prominently display “{built_with}”” ({facts.terms.title if facts.terms else ''}, 1.b.i)"
        raise CheckpointError(str(path / "README.md"), f"does not say “{built_with}”", rule, "add the line")
    text = ModelCardData(**data, ignore_metadata_errors=True).to_yaml()
    return f"---\n{text}\n---\n\n{body.lstrip().replace(SOMEWHERE, shown.repository)}"


# --- what is known


@dataclass(frozen=True)
class _Facts:
    """A run, read once."""

    recipe: Recipe
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    kept_step: int | None
    licence: Mapping[str, str]
    data_licences: Mapping[str, Mapping[str, str]]
    verified: Mapping[run.Weights, Mapping[str, Any]]
    """What `merge --verify` found, by the weights that were merged onto."""
    adapter: Mapping[str, Any]
    """Its configuration, peft's."""
    samples: Sequence[Mapping[str, str]]
    """Prompts and their answers."""
    shown: Shown

    @classmethod
    def read(cls, path: Path, shown: Shown) -> "_Facts":
        recipe, lock = run.read_recipe(path), run.read_lock(path)
        licences = shown.licences if shown.licences is not None else lock.get("licences", {})
        kinds = [shown.merged] if shown.merged else run.FOLDERS
        metrics = run.read_metrics(path)
        return cls(
            recipe,
            lock,
            run.read_json(path / "data.json"),
            metrics,
            _kept_step(path, recipe, metrics),
            licences.get("base", {}),
            licences.get("data", {}),
            {kind: found for kind in kinds if (found := _verified(path, kind))},
            run.read_json(path / "adapter" / "adapter_config.json"),
            run.read_samples(path),
            shown,
        )

    @property
    def terms(self) -> Any:
        return find_terms(self.licence)

    @property
    def is_hub_base(self) -> bool:
        return self.lock["base"]["revision"] is not None

    @property
    def base(self) -> str:
        """The base in a sentence."""
        if self.is_hub_base:
            name, revision = self.lock["base"]["name"], self.lock["base"]["revision"]
            return f"[{name}](https://huggingface.co/{name}) at revision `{revision}`"
        if self.recipe.model.model_name_or_path.startswith("builtin:"):
            return "the built-in toy model of orpo-lite"
        return "a model that its trainer had in a local folder"

    @property
    def base_name(self) -> str:
        """The base in a command."""
        return self.lock["base"]["name"] if self.is_hub_base else "BASE"

    @property
    def sets(self) -> list[str]:
        """The data sets of the hub."""
        return [name for name in self.recipe.data.names if is_hub_name(name)]

    @property
    def evaluations(self) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Held-out figures before the first step and of what was kept; None without."""
        rows = {row["step"]: row for row in self.metrics if row.get("eval_loss") is not None}
        return (rows[0], rows[self.kept_step]) if 0 in rows and self.kept_step in rows else None


def _kept_step(path: Path, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> int | None:
    """The step whose adapter was kept: as the run says, else as the training chooses it."""
    if (path / run.RESULT).is_file():
        kept: int = run.read_json(path / run.RESULT)["kept_step"]
        return kept
    steps = [row["step"] for row in metrics]
    losses = {row["step"]: row["eval_loss"] for row in metrics if row.get("eval_loss") is not None}
    best = recipe.training.load_best_model_at_end and losses
    return min(losses, key=losses.__getitem__) if best else max(steps, default=None)


def _verified(path: Path, kind: run.Weights) -> Mapping[str, Any]:
    """{} where nothing is merged, or measured, or where it is of another adapter than the run has now."""
    found = path / run.FOLDERS[kind] / "verify.json"
    try:
        return run.read_json(run.find_merged(path, kind) / found.name) if found.is_file() else {}
    except CheckpointError:
        return {}


# --- metadata


def _metadata(facts: _Facts) -> ModelCardData:
    shown = facts.shown
    tags = ["orpo", "preference-tuning", "orpo-lite", *([] if shown.merged else ["lora"])]
    name = "" if shown.repository == SOMEWHERE else shown.repository.rpartition("/")[2]
    licence: dict[str, Any] = dict(_licence_metadata(facts))
    data = ModelCardData(
        library_name="transformers" if shown.merged else "peft",
        pipeline_tag="text-generation",
        base_model=facts.lock["base"]["name"] if facts.is_hub_base else None,
        datasets=facts.sets or None,
        tags=tags,
        model_name=(name or "tuned with ORPO") if _eval_results(facts) else None,
        eval_results=_eval_results(facts) or None,
        **licence,
    )
    if facts.is_hub_base:
        data["base_model_relation"] = "finetune" if shown.merged else "adapter"
    return data


def _licence_metadata(facts: _Facts) -> dict[str, str]:
    """As the base's card has it; a link to a file beside that card is written out."""
    found = dict(facts.licence)
    link = found.get("license_link", "")
    if link and "://" not in link:
        if facts.is_hub_base:
            name, revision = facts.lock["base"]["name"], facts.lock["base"]["revision"]
            found["license_link"] = f"https://huggingface.co/{name}/blob/{revision}/{link.removeprefix('./')}"
        else:
            found["license_link"] = os.path.basename(link)
    if "license_name" in found and "license" not in found:
        found["license"] = "other"
    return found


def _eval_results(facts: _Facts) -> list[EvalResult]:
    """For the hub's own table, which knows results on a data set of the hub alone."""
    if facts.evaluations is None or len(facts.sets) != 1 or len(facts.recipe.data.names) != 1:
        return []
    _, after = facts.evaluations
    kinds = {
        "eval_rewards/accuracies": ("accuracy", "held-out reward accuracy"),
        "eval_loss": ("loss", "held-out loss"),
    }
    return [
        EvalResult(
            task_type="text-generation",
            task_name="preference pairs",
            dataset_type=facts.sets[0],
            dataset_name=facts.sets[0],
            metric_type=kind,
            metric_name=name,
            metric_value=round(after[key], 4),
        )
        for key, (kind, name) in kinds.items()
        if after.get(key) is not None
    ]


# --- the text, part by part


def _head(facts: _Facts) -> str:
    shown, terms = facts.shown, facts.terms
    name = shown.repository.rpartition("/")[2] if shown.repository != SOMEWHERE else "Tuned with ORPO"
    what = "The merged weights" if shown.merged else f"A LoRA adapter (rank {facts.recipe.lora.r})"
    pairs = f"{facts.data['train_pairs']:,} preference pairs"
    text = (
        f"{what} of {facts.base}, tuned on {pairs} with ORPO ([arXiv 2403.07691]({PAPER})) "
        f"by orpo-lite {facts.lock['orpo_lite']}."
    )
    text += f" The adapter is merged onto {ONTO[shown.merged]}." if shown.merged else ""
    built_with = f"**{terms.built_with}**\n\n" if terms and terms.built_with else ""
    return f"# {name}\n\n{built_with}{text}"


def _training(facts: _Facts) -> str:
    recipe, values = facts.recipe, dict(facts.recipe.items())
    scope = "the chosen response" if recipe.loss.completion_only_loss else "prompt and chosen response"
    mean = "all tokens of a step" if recipe.loss.nll_reduction == "token" else "each response, then over pairs"
    rows = [
        ("λ (`loss.beta`)", f"{recipe.loss.beta:g}"),
        ("NLL counts", f"{scope}; mean over {mean}"),
        ("steps", f"{max((row['step'] for row in facts.metrics), default=0):,}; kept: step {facts.kept_step}"),
        ("chat template", _template(recipe)),
        *((f"`{key}`", _cell(to_text(values[key]))) for key in SHOWN_KEYS),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.lock["versions"].items())),
    ]
    if recipe.model.adapter_name_or_path:
        source = recipe.model.adapter_name_or_path
        is_local = source.startswith((".", "/", "~")) or source.count("/") != 1
        rows.insert(0, ("trained on from", "an adapter of the trainer's own" if is_local else _cell(source)))
    return f"## Training\n\nL = NLL + λ · L_OR, Eq. 6 of the paper.\n\n{_table(('what', 'value'), rows)}"


def _template(recipe: Recipe) -> str:
    known = {"auto": "the tokenizer's own, else the paper's", "none": "none: prompt and response joined as plain text"}
    return known.get(recipe.data.chat_template, "one of the trainer's own, in this repository's chat_template.jinja")


def _data(facts: _Facts) -> str:
    data, recipe = facts.data, facts.recipe
    rows = []
    for name in recipe.data.names:
        if name in facts.sets:
            licence = facts.data_licences.get(name, {})
            said = licence.get("license_name") or licence.get("license") or "not stated"
            rows.append((f"[{name}](https://huggingface.co/datasets/{name})", _cell(said)))
        else:
            what = "the built-in pairs of orpo-lite" if name.startswith("builtin:") else _local(name)
            rows.append((what, "not stated"))
    parts = ["## Data", _table(("data", "licence"), rows)]
    if facts.sets:
        split = recipe.data.dataset_train_split
        parts.append(f"Split: {'chosen automatically' if split == 'auto' else _cell(split)}.")
    parts.append(
        f"{data['rows_read']:,} rows read: {data['train_pairs']:,} pairs to train on, {data['held_out_pairs']:,} held "
        f"out; sha256 of the pairs `{data['sha256']}`."
    )
    dropped = [(reason, f"{drop['pairs']:,}") for reason, drop in data.get("dropped", {}).items()]
    parts.append(f"Left out:\n\n{_table(('why', 'pairs'), dropped)}" if dropped else "No pair was left out.")
    return "\n\n".join(parts)


def _local(name: str) -> str:
    return "a local file" if Path(name).suffix else "local files"


def _results(facts: _Facts) -> str:
    if facts.evaluations is None:
        return "## Held-out results\n\nNone: no pairs were held out."
    before, after = facts.evaluations
    rows = [
        (label, f"{before[key]:.4f}", f"{after[key]:.4f}")
        for key, label in METRICS.items()
        if before.get(key) is not None and after.get(key) is not None
    ]
    pairs = f"{facts.data['held_out_pairs']:,} pairs"
    return f"## Held-out results\n\n{pairs}.\n\n{_table(('', 'before', 'after'), rows)}"


def _loading(facts: _Facts) -> str:
    repository, base, revision = facts.shown.repository, facts.base_name, facts.lock["base"]["revision"]
    if facts.shown.merged:
        blocks = [
            (
                "transformers",
                "python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
                f'model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto", device_map="auto")',
            ),
            ("vLLM", "sh", f"vllm serve {repository}"),
        ]
    else:
        at = f', revision="{revision}"' if revision else ""
        rank = vllm_rank(facts.adapter)
        vllm = f"vllm serve {base}" + (f" --revision {revision}" if revision else "")
        vllm += f" --tokenizer {repository} --generation-config {repository}"  # the template, and what ends a reply
        vllm += f" --enable-lora --lora-modules tuned={repository} --max-lora-rank {rank}"
        blocks = [
            (
                "transformers and PEFT",
                "python",
                "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
                f'base = AutoModelForCausalLM.from_pretrained("{base}"{at}, dtype="auto", device_map="auto")\n'
                f'model = PeftModel.from_pretrained(base, "{repository}")',
            ),
            *([("vLLM", "sh", vllm)] if rank else []),
        ]
    parts = ["## How to load it"]
    if not facts.is_hub_base and not facts.shown.merged:
        parts.append("`BASE` is the model that it was trained on, which is not named here.")
    parts += [f"{title}:\n\n```{language}\n{text}\n```" for title, language, text in blocks]
    if not facts.shown.merged and not vllm_rank(facts.adapter):
        parts.append("vLLM does not serve this adapter as it is: merge it first.")
    parts.append(OLLAMA)
    return "\n\n".join(parts)


def _verification(facts: _Facts) -> str:
    """The tables of `orpo-lite merge --verify`."""
    parts = ["## The merge, measured"]
    for kind, found in facts.verified.items():
        rows = [
            (_cell(row["model"]), f"{row['accuracy']:.1%}", f"{row['margin']:+.4f}", f"{row['chosen']:.4f}")
            for row in found["rows"]
        ]
        pairs = f"{found['pairs']:,} {'held-out' if found['held_out'] else 'training'} pairs"
        verdict = f"{'passed' if found['passed'] else 'FAILED'}: mean log-probabilities differ by"
        bound = f"{found['difference']:.2g} at most from those of base and adapter (bound {found['bound']:.2g})"
        parts.append(f"Merged onto {ONTO[kind]}:")
        parts.append(_table((pairs, "reward accuracy", "margin", "log-prob of chosen"), rows))
        parts.append(f"{verdict} {bound}; the adapter changes them by up to {found['effect']:.2g}.")
    return "\n\n".join(parts) if facts.verified else ""


def _samples(facts: _Facts) -> str:
    kind, count = ("held-out", facts.shown.samples) if facts.shown.samples else ("neutral", None)
    rows = [row for row in facts.samples if row.get("source", "held-out") == kind][:count]
    if not rows:
        return ""
    whose = "Held-out prompts of the data" if facts.shown.samples else "Neutral prompts, of no data"
    base = "the base in 4 bit" if facts.recipe.quantization.load_in_4bit else "the base"
    parts = [
        "## Samples",
        f"{whose}, answered by {base}, without the adapter and with it; sampled at temperature "
        f"{rows[0].get('temperature', 0.7)}, at most {facts.recipe.output.max_new_tokens} tokens, not chosen by hand.",
    ]
    for row in rows:
        parts += [f"{title}:\n\n{_quoted(row[key])}" for title, key in SAMPLED.items() if key in row]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """A text in a fence that it cannot close."""
    text = TOKEN.sub("hf_***", text if len(text) <= SHOWN else f"{text[:SHOWN]} ...")
    ticks = max((len(run_of) for run_of in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n{text}\n{fence}"


def _limits(facts: _Facts) -> str:
    data = facts.data
    longer = f"{100 * data['chosen_longer']:.0f}%" if "chosen_longer" in data else "an unknown share"
    lines = [
        "It has learned the preferences of these pairs, with whatever is one-sided in them, and keeps the base's own "
        "limits. No safety evaluation was made.",
        f"The chosen answer is the longer one in {longer} of the pairs; length may be part of what was learned.",
        "The held-out figures say how well it ranks pairs like those it was trained on, not how good its answers are.",
    ]
    if cut := data.get("cut", {}).get("responses_without_end"):
        lines.append(f"{cut:,} responses lost their end at {facts.recipe.data.max_length:,} tokens.")
    if shared := data.get("prompts", {}).get("shared"):
        lines.append(f"{shared:,} held-out prompts stand in the training pairs too, so the figures flatter.")
    if facts.recipe.model.model_name_or_path.startswith("builtin:"):
        lines.append("A toy that shows that the machinery works; it is of no other use.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(facts: _Facts) -> str:
    licence, terms = facts.licence, facts.terms
    name = licence.get("license_name") or licence.get("license")
    lines = []
    if terms:
        lines.append(f"{terms.notice}")
    elif name:
        lines.append(f"The base's card names its licence: {_cell(name)}. It holds for this derivative as well.")
    else:
        lines.append("The licence of the base is not known here: its card names none, or could not be read.")
    lines += _non_commercial(facts)
    return "## Licence\n\n" + "\n\n".join(lines)


def _non_commercial(facts: _Facts) -> list[str]:
    said = []
    if is_non_commercial(facts.licence.get("license_name") or facts.licence.get("license", "")):
        said.append("**Not for commercial use**, as its base.")
    for name in facts.sets:
        licence = facts.data_licences.get(name, {})
        if any(is_non_commercial(value) for key, value in licence.items() if key != "license_link"):
            text = licence.get("license_name") or licence["license"]
            said.append(f"**Not for commercial use by its data**: {name} is licensed {_cell(text)}.")
    return said


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text that keeps to its cell and brings no mark-up of its own."""
    flat = TOKEN.sub("hf_***", " ".join(text.split()))
    return re.sub(r"([|<>`\[\]*\\])", r"\\\1", flat)
