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

import yaml
from huggingface_hub import EvalResult, ModelCardData

from orpo_lite import run
from orpo_lite.base import vllm_rank
from orpo_lite.data.rows import is_path
from orpo_lite.errors import TOKEN, CheckpointError, ModelError
from orpo_lite.licence import (
    CARD,
    KEYS,
    Terms,
    climbs,
    find_terms,
    in_words,
    is_hub_name,
    is_non_commercial,
    is_plain,
    licence_of,
    named,
)
from orpo_lite.objectives.objective import Objective
from orpo_lite.objectives.registry import find_objective
from orpo_lite.recipe import Recipe, to_text

SHOWN_KEYS = (
    "lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.use_rslora", "lora.use_dora",
    "quantization.load_in_4bit", "data.max_length", "data.max_prompt_length", "training.learning_rate",
    "training.global_batch_size", "training.num_train_epochs", "training.max_steps", "training.lr_scheduler_type",
    "training.warmup_steps", "training.optim", "training.adam_beta1", "training.adam_beta2", "training.adam_epsilon",
    "training.weight_decay", "training.max_grad_norm", "training.seed",
)  # fmt: skip
SOMEWHERE = "OWNER/NAME"  # stands for the repository until it is known
SEAL = re.compile(r"\r?\n<!-- orpo-lite card [0-9a-f]{16} -->\r?\n")
OLLAMA = (
    "Ollama takes a GGUF file, which is not in this repository. `orpo-lite export RUN --to ollama` makes one of the "
    "run's folder, and a Modelfile with the template and the stop tokens of this model. A bare `FROM` would leave both "
    "to Ollama's guess."
)
ONTO: dict[run.Weights, str] = {
    "original": "the base's own weights",
    "dequantized": "what 4 bit had left of the base's weights, as in training",
}
SHOWN = 1500  # characters of a sample
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what no text of a card holds
# Of a text in Markdown: comments, what stands in a tag, where a link leads.
UNSEEN = re.compile(r"<!--.*?(?:-->|\Z)|</?[A-Za-z][^>]*>|^ {0,3}\[[^\]]*\]:.*?$", re.DOTALL | re.MULTILINE)
FIGURES: run.Kinds = {
    "chat_template": str,
    "rows_read": int,
    "train_pairs": int,
    "held_out_pairs": int,
    "dropped": dict,
    "cut": dict,
    "chosen_longer": run.FIGURE,
    "rejected_longer": run.FIGURE,
    "prompts": dict,
    "sha256": str,
}
VERDICT: run.Kinds = {
    "rows": list,
    "pairs": int,
    "held_out": bool,
    "passed": bool,
    **dict.fromkeys(("difference", "effect", "bound"), run.FIGURE),
}
MEASURED: run.Kinds = {"model": str, **dict.fromkeys(("accuracy", "margin", "chosen"), run.FIGURE)}
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
    if not changed_card(path):
        run.write_text(path / "README.md", make_card(path))  # a push knows the repository, whoever's it is


def seal(text: str) -> str:
    """The text with a mark by which a later change of it is seen."""
    return f"{text}\n<!-- orpo-lite card {hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_own(card: str) -> bool:
    """Whether a card is as it was made; one that a person has changed is pushed as that person left it."""
    found = SEAL.search(card)
    return found is not None and seal(card[: found.start()]) == card


def changed_card(path: Path) -> str:
    """README.md of a run, byte for byte, where a person has changed it; "" where it is ours or not there.

    Raises:
        CheckpointError: it cannot be read, or is a link.
    """
    file, fix = path / "README.md", "or remove it, and the card is made afresh"
    if file.is_symlink():
        expected = "a file; links are not followed"
        raise CheckpointError(where=str(file), found="is a link", expected=expected, fix=f"a copy in its place, {fix}")
    try:
        card = file.read_bytes().decode("utf-8-sig") if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(file), found=f"cannot be read ({error})", expected="UTF-8", fix=f"save it as such, {fix}"
        ) from error
    return "" if is_own(card.replace("\r\n", "\n")) else card


def loads_adapter(card: str) -> bool:
    """Whether a card changed by hand says how to load an adapter, which is wrong of a merged model."""
    return not is_own(card) and re.search(r"PeftModel|--enable-lora", card) is not None


def adopt_card(path: Path, own: str, shown: Shown) -> str:
    """A card changed by hand, for a repository: its words, and what must be true of the metadata.

    Raises:
        CheckpointError: its metadata are no YAML, or it does not say what the base's licence asks for.
    """
    facts, where = _Facts.read(path, shown), str(path / "README.md")
    own = SEAL.sub("", own)
    found = CARD.match(own)
    if found is None:
        expected = "metadata in YAML between lines of ---"
        raise CheckpointError(
            where=where, found="begins with no metadata", expected=expected, fix="mend it, or remove the file"
        )
    made: dict[str, Any] = _metadata(facts).to_dict()  # type: ignore[no-untyped-call]
    ours: dict[str, str] = {key: made[key] for key in ("library_name", "base_model_relation") if key in made}
    data, text = _put(found[1], ours, where, without_lora=shown.merged is not None)
    for terms in facts.terms:
        _refuse_untrue(facts, terms, data, UNSEEN.sub("", found[2]), where)
    body = found[2].replace(SOMEWHERE, shown.repository)
    return f"{own[: found.start(1)]}{text}{own[found.end(1) : found.start(2)]}{body}"


def _put(text: str, ours: Mapping[str, str], where: str, *, without_lora: bool) -> tuple[dict[str, Any], str]:
    """A person's metadata, read as texts, and their YAML with lines of ours in it; all others stay as they stand.

    The tag `lora` goes too, if asked, where it has a line of its own.
    """
    data, node = _read_metadata(text, where)
    edits: list[tuple[int, int, str]] = []
    lacking = dict(ours)
    for key, value in node.value:
        start, end = key.start_mark.index, _end(value)
        if (name := key.value) in lacking:
            tail = text[start:end][len(text[start:end].rstrip()) :]
            edits.append((start, end, f"{name}: {lacking.pop(name)}{tail}"))
        elif name == "tags" and without_lora and isinstance(data[name], list) and len(data[name]) > 1:
            alone = re.search(r"\r?\n *- lora *(?=\r?\n|\Z)", text[start:end])
            edits += [(start + alone.start(), start + alone.end(), "")] if alone else []
    new = text
    for start, end, line in reversed(edits):
        new = new[:start] + line + new[end:]
    feed = "\r\n" if "\r\n" in text else "\n"
    new += "".join(f"{feed}{key}: {value}" for key, value in lacking.items())
    after, _ = _read_metadata(new, where)
    if {**after, "tags": None} != {**data, **ours, "tags": None}:
        lines = ", ".join(f"{key}: {value}" for key, value in ours.items())
        raise CheckpointError(
            where=where,
            found="its metadata cannot be completed",
            expected="YAML with a key a line",
            fix=f"write {lines}",
        )
    return after, new


def _read_metadata(text: str, where: str) -> tuple[dict[str, Any], yaml.MappingNode]:
    expected, fix = (
        "metadata that are a mapping in YAML: a key a line, none twice, no anchors",
        "mend it, or remove the file",
    )
    try:
        node = yaml.compose(f"{text}\n", Loader=yaml.SafeLoader) if is_plain(text) else None
    except (yaml.YAMLError, ValueError) as error:
        found = f"its metadata cannot be read ({' '.join(str(error).split())})"
        raise CheckpointError(where=where, found=found, expected=expected, fix=fix) from error
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = _texts(node)
        if len(data) == len(node.value):
            return data, node
    raise CheckpointError(where=where, found="its metadata are something else", expected=expected, fix=fix)


def _end(node: Any) -> int:
    """Where a value ends; PyYAML counts the comments behind a list."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return int(node.end_mark.index)


def _texts(node: Any) -> Any:
    """What a text in YAML holds, its words as they stand: 1.10 and no are neither a number nor false."""
    if isinstance(node, yaml.MappingNode):
        return {str(_texts(key)): _texts(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_texts(value) for value in node.value]
    return "" if node.tag.endswith(":null") else node.value


def _refuse_untrue(facts: "_Facts", terms: Terms, data: Mapping[str, Any], body: str, where: str) -> None:
    """Raise CheckpointError for a card that does not say what the terms of its base ask for."""
    said, written, base = licence_of(data), _licence_metadata(facts), facts.lock["base"]["name"]
    for key in KEYS:
        known = facts.licence.get(key), written.get(key)
        if said.get(key) not in known:
            expected = f"{key}: {known[1]}" if known[1] else f"no {key}"
            found = f"{key}: {said[key]}" if key in said else f"has no {key}"
            raise CheckpointError(
                where=where, found=found, expected=f"{expected}, as the base's card has it: “{terms.notice}”"
            )
    names = data.get("base_model", [])
    if facts.is_hub_base and base not in (names if isinstance(names, list) else [names]):
        rule = f"base_model: {base}, which is under the {terms.title}"
        raise CheckpointError(
            where=where, found="does not name its base", expected=rule, fix="add the line to the metadata"
        )
    if terms.built_with not in body:
        rule = f"“prominently display “{terms.built_with}”” ({terms.title}, 1.b.i)"
        raise CheckpointError(
            where=where, found=f"does not say “{terms.built_with}”", expected=rule, fix="add the line"
        )


# --- what is known


@dataclass(frozen=True)
class _Facts:
    """A run, read once."""

    recipe: Recipe
    lock: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    steps: int | None
    kept_step: int | None
    licence: Mapping[str, Any]
    data_licences: Mapping[str, Mapping[str, Any]]
    verified: Mapping[run.Weights, Mapping[str, Any]]
    """What `merge --verify` found, by the weights that were merged onto."""
    adapter: Mapping[str, Any]
    """Its configuration, peft's."""
    samples: Sequence[Mapping[str, str]]
    """Prompts and their answers."""
    objective: Objective
    shown: Shown

    @classmethod
    def read(cls, path: Path, shown: Shown) -> "_Facts":
        recipe, lock = run.read_recipe(path), run.read_lock(path)
        run.refuse_lacking(lock, {"orpo_lite": str, "versions": dict}, str(path / "lock.json"))
        licences = shown.licences if shown.licences is not None else lock.get("licences") or {}
        kinds = [shown.merged] if shown.merged else run.FOLDERS
        metrics = run.read_metrics(path)
        return cls(
            recipe,
            lock,
            _read_figures(path / "data.json"),
            metrics,
            *_steps(path, recipe, metrics),
            licences.get("base", {}),
            licences.get("data", {}),
            {kind: found for kind in kinds if (found := _verified(path, kind))},
            run.read_json(path / "adapter" / "adapter_config.json", {"r": int}),
            run.read_samples(path),
            find_objective(recipe.loss),
            shown,
        )

    @property
    def terms(self) -> list[Terms]:
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


def _read_figures(file: Path) -> Mapping[str, Any]:
    data = run.read_json(file, FIGURES)
    for reason, drop in data["dropped"].items():
        run.refuse_lacking(drop if isinstance(drop, dict) else {}, {"pairs": int}, f"{file}, dropped, {reason}")
    run.refuse_lacking(data["cut"], {"responses_without_end": int}, f"{file}, cut")
    run.refuse_lacking(data["prompts"], {"shared": int}, f"{file}, prompts")
    return data


def _steps(path: Path, recipe: Recipe, metrics: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """How many were made, and that whose adapter was kept: as the run says, else as the training chooses it."""
    if (path / run.RESULT).is_file():
        result = run.read_json(path / run.RESULT, {"steps": int, "kept_step": int})
        return result["steps"], result["kept_step"]
    last = max((row["step"] for row in metrics), default=None)
    losses = {row["step"]: row["eval_loss"] for row in metrics if row.get("eval_loss") is not None}
    best = recipe.training.load_best_model_at_end and losses
    return last, min(losses, key=losses.__getitem__) if best else last


def _verified(path: Path, kind: run.Weights) -> Mapping[str, Any]:
    """{} where nothing is merged, or measured, or where it is of another adapter than the run has now."""
    file = path / run.FOLDERS[kind] / "verify.json"
    try:
        if not file.is_file() or not run.find_merged(path, kind):
            return {}
    except (CheckpointError, ModelError):
        return {}
    found = run.read_json(file, VERDICT)
    for row in found["rows"]:
        run.refuse_lacking(row if isinstance(row, dict) else {}, MEASURED, f"{file}, rows")
    return found


# --- metadata


def _metadata(facts: _Facts) -> ModelCardData:
    shown = facts.shown
    tags = [facts.recipe.loss.type, "preference-tuning", "orpo-lite", *([] if shown.merged else ["lora"])]
    name = "" if shown.repository == SOMEWHERE else shown.repository.rpartition("/")[2]
    licence: dict[str, Any] = dict(_licence_metadata(facts))
    data = ModelCardData(
        library_name="transformers" if shown.merged else "peft",
        pipeline_tag="text-generation",
        base_model=facts.lock["base"]["name"] if facts.is_hub_base else None,
        datasets=facts.sets or None,
        tags=tags,
        model_name=(name or f"tuned with {facts.objective.title}") if _eval_results(facts) else None,
        eval_results=_eval_results(facts) or None,
        **licence,
    )
    if facts.is_hub_base:
        data["base_model_relation"] = "finetune" if shown.merged else "adapter"
    return data


def _licence_metadata(facts: _Facts) -> dict[str, Any]:
    """As the base's card has it; a link to a file beside that card is written out, and none that leads elsewhere."""
    found = dict(facts.licence)
    link = found.get("license_link", "")
    if climbs(link):
        del found["license_link"]
    elif link and "://" not in link:
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
    is_its_own = len(facts.sets) == len(facts.recipe.data.names) == 1
    if facts.evaluations is None or not is_its_own or is_path(facts.recipe.data.dataset_test_split or ""):
        return []
    _, after = facts.evaluations
    kinds = {
        "eval_rewards/accuracies": ("accuracy", "held-out reward accuracy"),
        "eval_loss": ("loss", "held-out loss"),
    }
    if facts.shown.merged:  # whose figures are its own: those of the training are of the base as it was loaded there
        found = facts.verified.get(facts.shown.merged, {})
        after = {"eval_rewards/accuracies": found["rows"][-1]["accuracy"]} if found.get("held_out") else {}
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
    shown, objective = facts.shown, facts.objective
    name = shown.repository.rpartition("/")[2] if shown.repository != SOMEWHERE else f"Tuned with {objective.title}"
    what = "The merged weights" if shown.merged else f"A LoRA adapter (rank {facts.recipe.lora.r})"
    pairs = f"{facts.data['train_pairs']:,} preference pairs"
    text = (
        f"{what} of {facts.base}, tuned on {pairs} with {objective.title} ([{_paper(objective)}]({objective.paper})) "
        f"by orpo-lite {facts.lock['orpo_lite']}."
    )
    text += f" The adapter is merged onto {ONTO[shown.merged]}." if shown.merged else ""
    lines = dict.fromkeys(terms.built_with for terms in facts.terms if terms.built_with)
    built_with = "".join(f"**{line}**\n\n" for line in lines)
    return f"# {name}\n\n{built_with}{text}"


def _paper(objective: Objective) -> str:
    """How a paper is called: by its number where it is on arXiv."""
    return objective.paper.replace("https://arxiv.org/abs/", "arXiv ")


def _training(facts: _Facts) -> str:
    recipe, values = facts.recipe, dict(facts.recipe.items())
    rows = [
        *facts.objective.described(),
        ("steps", "not known" if facts.steps is None else f"{facts.steps:,}; kept: step {facts.kept_step:,}"),
        ("chat template", _template(facts)),
        *((f"`{key}`", _cell(to_text(values[key]))) for key in SHOWN_KEYS),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.lock["versions"].items())),
    ]
    if recipe.model.adapter_name_or_path:
        source = recipe.model.adapter_name_or_path
        is_local = source.startswith((".", "/", "~")) or source.count("/") != 1
        rows.insert(0, ("trained on from", "an adapter of the trainer's own" if is_local else _cell(source)))
    return f"## Training\n\n{facts.objective.formula}\n\n{_table(('what', 'value'), rows)}"


def _template(facts: _Facts) -> str:
    choice = facts.recipe.data.chat_template
    if choice == "auto":
        return _cell(facts.data["chat_template"])
    is_none = choice == "none"
    return "none: prompt and response joined as plain text" if is_none else "one of the trainer's own, which is here"


def _data(facts: _Facts) -> str:
    data, recipe = facts.data, facts.recipe
    rows: list[tuple[str, ...]] = []
    local = [name for name in recipe.data.names if is_path(name)]
    for name in recipe.data.names:
        if name in facts.sets:
            said = in_words(facts.data_licences.get(name, {})) or "not stated"
            rows.append((f"[{name}](https://huggingface.co/datasets/{name})", _cell(said)))
        elif name.startswith("builtin:"):
            rows.append(("the built-in pairs of orpo-lite", "not stated"))
        else:
            rows.append((_local(name, local.index(name) + 1 if len(local) > 1 else 0), "not stated"))
    head: tuple[str, ...] = ("data", "licence")
    if len(data.get("rows_of_sets", ())) == len(rows):
        head = (*head, "rows to train on")
        rows = [(*row, f"{count:,}") for row, count in zip(rows, data["rows_of_sets"], strict=True)]
    parts = ["## Data", _table(head, rows)]
    if facts.sets:
        split = recipe.data.dataset_train_split
        parts.append(f"Split: {'chosen automatically' if split == 'auto' else _cell(split)}.")
    if recipe.data.max_samples:
        parts.append(f"Of each set the first {recipe.data.max_samples:,} rows.")
    if test := recipe.data.dataset_test_split:
        parts.append(f"Held out: {'local files' if is_path(test) else f'split {_cell(test)}'}.")
    elif any(name.startswith("builtin:") for name in recipe.data.names):
        parts.append("Held out: pairs that were made for it.")
    elif data["held_out_pairs"]:
        parts.append("Held out: some of the prompts, with all of their pairs.")
    total = " in all" if len(rows) > 1 else ""
    parts.append(
        f"{data['rows_read']:,} rows read{total}: {data['train_pairs']:,} pairs to train on, "
        f"{data['held_out_pairs']:,} held out; sha256 of the pairs `{data['sha256']}`."
    )
    dropped = [(_cell(reason), f"{drop['pairs']:,}") for reason, drop in data["dropped"].items()]
    parts.append(f"Left out:\n\n{_table(('why', 'pairs'), dropped)}" if dropped else "No pair was left out.")
    return "\n\n".join(parts)


def _local(name: str, number: int) -> str:
    """What data of one's own are called; a folder and a pattern are several files."""
    is_file = Path(name).suffix and not set(name) & set("*?[")
    if number:
        return f"local {'file' if is_file else 'files'} {number}"
    return "a local file" if is_file else "local files"


def _results(facts: _Facts) -> str:
    held_out = f"{facts.data['held_out_pairs']:,} pairs"
    if facts.evaluations is None:
        lack = f"{held_out} were held out, but their figures before and after are not all there"
        why = lack if facts.data["held_out_pairs"] else "no pairs were held out"
        return f"## Held-out results\n\nNone: {why}."
    before, after = facts.evaluations
    keys = ((metric, f"eval_{metric.name}") for metric in facts.objective.shown)
    rows = [
        (metric.meaning, f"{before[key]:.4f}", f"{after[key]:.4f}")
        for metric, key in keys
        if before.get(key) is not None and after.get(key) is not None
    ]
    head = ("figure", "before", "after")
    base = "the base in 4 bit" if facts.recipe.quantization.load_in_4bit else "the base"
    said = f"{held_out}, by {base}: before the first step, and with the adapter that was kept."
    return f"## Held-out results\n\n{said}\n\n{_table(head, rows)}"


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
        is_toy = facts.recipe.model.model_name_or_path.startswith("builtin:")
        where = "which orpo-lite writes into runs/builtin" if is_toy else "which is not named here"
        parts.append(f"`BASE` is the model that it was trained on, {where}.")
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
        parts += [f"{title}:\n\n{_quoted(row[key])}" for title, key in SAMPLED.items()]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """A text in a fence that it cannot close."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = TOKEN.sub("hf_***", text)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
    ticks = max((len(run_of) for run_of in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}text\n{text}\n{fence}"


def _limits(facts: _Facts) -> str:
    data = facts.data
    lines = [
        "It has learned the preferences of these pairs, with whatever is one-sided in them, and keeps the base's own "
        "limits. No safety evaluation was made.",
        f"The chosen answer is the longer one in {data['chosen_longer']:.0%} of the pairs and the shorter one in "
        f"{data['rejected_longer']:.0%}; length may be part of what was learned.",
    ]
    if facts.evaluations:
        ranks = "The held-out figures say how well it ranks pairs like those it was trained on"
        lines.append(f"{ranks}, not how good its answers are.")
    if cut := data["cut"]["responses_without_end"]:
        lines.append(f"{cut:,} responses lost their end at {facts.recipe.data.max_length:,} tokens.")
    if shared := data["prompts"]["shared"]:
        lines.append(f"{shared:,} held-out prompts stand in the training pairs too, so the figures flatter.")
    if facts.recipe.model.model_name_or_path.startswith("builtin:"):
        lines.append("A toy that shows that the machinery works; it is of no other use.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(facts: _Facts) -> str:
    lines = [terms.notice for terms in facts.terms]
    name = _cell(in_words(facts.licence))
    if isinstance(facts.licence.get("license"), list):
        lines.append(f"The base's card names several licences: {name}. They hold for this derivative as well.")
    elif name and not lines:
        lines.append(f"The base's card names its licence: {name}. It holds for this derivative as well.")
    elif not name:
        lines.append("The licence of the base is not known here: no card that could be read names one.")
    return "\n\n".join(["## Licence", *lines, *_non_commercial(facts)])


def _non_commercial(facts: _Facts) -> list[str]:
    said = ["**Not for commercial use**, as its base."] * any(map(is_non_commercial, named(facts.licence)))
    for name in facts.sets:
        licence = facts.data_licences.get(name, {})
        if any(map(is_non_commercial, named(licence))):
            text = _cell(in_words(licence))
            said.append(f"**Not for commercial use by its data**: {name} is licensed {text}.")
    return said


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text that keeps to its cell and brings no mark-up of its own."""
    flat = TOKEN.sub("hf_***", CONTROL.sub("", " ".join(text.split())))
    return re.sub(r"([|<>`\[\]*\\])", r"\\\1", flat)
