"""Make the texts of the report's page from the content of a run folder."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orpo_lite.base.download import ADAPTER_WEIGHTS
from orpo_lite.data.sources.source import is_path
from orpo_lite.data.statistics import warning_lines
from orpo_lite.evaluation.health import Finding
from orpo_lite.evaluation.run_record import RunRecord, default, rows_of
from orpo_lite.recipe.text import GIB, gib, to_text
from orpo_lite.runs.commands import quoted, resume_command

LONGEST = 2000  # characters of a prompt or an answer
ICONS = {"good": "✓", "warning": "!", "serious": "✕", "unknown": "?"}
OUTCOMES = {"better": "good", "worse": "serious", "cannot tell": "unknown"}


def run_texts(record: RunRecord, label: str, data_texts: bool) -> dict[str, Any]:
    """Return the texts that the page shows for a run.

    For ``data_texts`` see :func:`orpo_lite.evaluation.report.report`.
    """
    path = quoted(record.path) if data_texts else "RUN"
    verdicts = [_verdict(when, found) for when, found in record.verdicts.items()]
    return {
        "name": record.name,
        "label": label,
        "path": path,
        "facts": [*_facts(record, data_texts)],
        "state": record.state,
        "is_reward_model": record.settings.get("loss.type") == "reward",
        "resume": resume_command(record.path if data_texts else Path("RUN")).line,
        "steps": record.steps,
        "planned": record.planned_steps,
        "verdicts": verdicts,
        "has_adapter": (record.path / "adapter" / ADAPTER_WEIGHTS).is_file(),
        "tiles": [*_tiles(record)],
        "health": [_finding(finding, record, data_texts) for finding in record.health],
        "memory": _memory(record),
        "data": _data(record, data_texts),
        "answers": _answers(record, data_texts),
        "settings": [*_settings(record, data_texts)],
        "versions": [*_versions(record)],
        "notes": record.notes if data_texts else [],
    }


def _facts(record: RunRecord, data_texts: bool) -> Iterator[tuple[str, str]]:
    yield "Base", _shown(record.settings.get("model.model_name_or_path"), data_texts)
    yield "Data", _shown(record.settings.get("data.dataset_name"), data_texts)
    planned = record.planned_steps
    of_all = f" of {planned:,}" if planned and planned != record.steps else ""
    yield "Steps", f"{record.steps:,}{of_all}"
    kept = record.result.get("kept_step")
    if record.is_finished and isinstance(kept, int):
        yield "Kept", f"the adapter of step {kept:,}"
    metrics = record.path / "metrics.jsonl"
    if metrics.is_file():
        written = datetime.fromtimestamp(metrics.stat().st_mtime)
        yield "Last step", f"{written:%Y-%m-%d %H:%M}"


UNKNOWN = ("–", "")
TILES = (
    ("rewards/accuracies", "Reward accuracy", True),
    ("log_odds_chosen", "Log odds ratio", False),
    ("nll_loss", "NLL of chosen", False),
    ("rewards/margins", "Reward margin", False),
)


def _tiles(record: RunRecord) -> Iterator[dict[str, str]]:
    """Yield the held-out metrics: before the training, and with the kept adapter."""
    before, after = record.held_out(0), record.kept
    for key, label, percent in TILES:
        values = [row.get(f"eval_{key}") for row in (before, after)]
        if all(isinstance(value, int | float) for value in values):
            texts = [f"{value:.1%}" if percent else f"{value:.3f}" for value in values]
            if percent and before.get("eval_rewards/margins") == values[0] == 0:
                texts[0] = UNKNOWN[0]  # of DPO: before the training, all rewards are 0
            yield {"label": label, "before": _minus(texts[0]), "after": _minus(texts[1])}


def _finding(finding: Finding, record: RunRecord, data_texts: bool) -> dict[str, Any]:
    path = record.path if data_texts else Path("RUN")
    command = record.command_for(finding, path)
    reason = re.sub(r"(?<!\w)-(?=\d)", "\u2212", finding.reason)
    return {**vars(finding), "reason": reason, "command": command}


def _memory(record: RunRecord) -> str:
    """Return sentences that compare the used memory with the plan; "" if none was recorded."""
    peaks = [row["memory_gib"] for row in record.rows if row.get("memory_gib") is not None]
    if not peaks:
        return ""
    if not any("memory_reserved_gib" in row for row in record.rows):
        return (
            "This training ran on a CPU. No memory plan is made for a CPU. "
            f"The process used at most {max(peaks):.2f} GiB of memory."
        )
    planned = record.plan.get("peak_bytes")
    if not isinstance(planned, int | float) or not planned:
        return f"Tensors used at most {max(peaks):.2f} GiB. There is no plan.json."
    share = max(peaks) * GIB / planned
    return (
        f"Tensors used at most {max(peaks):.2f} GiB. This is {share:.0%} of the planned "
        f"{gib(int(planned))}."
    )


def _verdict(when: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation as texts. A missing value becomes a dash."""
    models = rows_of(found, "models")
    shorter = [_in(row.get("shorter_chosen"), "pairs") for row in models]
    counted = next((f", {n:,} pairs" for n in shorter if isinstance(n, int)), "")
    rows = [
        ("accuracy", [_interval(row.get("accuracy"), percent=True) for row in models]),
        ("margin", [_interval(row.get("margin")) for row in models]),
        ("log odds", [_interval(row.get("log_odds")) for row in models]),
        ("NLL", [_interval(row.get("nll")) for row in models]),
        (
            f"accuracy, chosen shorter{counted}",
            [_interval(_in(row.get("shorter_chosen"), "accuracy"), percent=True) for row in models],
        ),
    ]
    rows = [(name, cells) for name, cells in rows if any(cell != UNKNOWN for cell in cells)]
    comparisons = []
    for row in rows_of(found, "comparisons"):
        outcome = str(row.get("outcome", "cannot tell"))
        gravity = OUTCOMES.get(outcome, "unknown")
        title = f"{outcome[:1].upper()}{outcome[1:]}"
        if outcome in ("better", "worse"):
            title += f" than {row.get('against', 'the other')}"
        comparisons.append(
            {
                "title": title,
                "model": str(row.get("model", "")),
                "gravity": gravity,
                "text": str(row.get("text", "")),
            }
        )
    pairs, prompts = found.get("pairs"), found.get("prompts")
    kind = "held-out pairs" if found.get("held_out", True) else "pairs"
    if "run" in found and found.get("data"):  # an evaluation may use any pairs
        kind = f"pairs of {Path(str(found['data'])).name}"
    size = f"{pairs:,} {kind}" if isinstance(pairs, int) else kind
    if isinstance(prompts, int):
        size += f" of {prompts:,} prompts"
    rule, interval = _interval(_in(found.get("length_rule"), "accuracy"), percent=True)
    return {
        "when": when,
        "size": size,
        "models": [str(row.get("name", "–")) for row in models],
        "rows": rows,
        "comparisons": comparisons,
        "length_rule": "" if rule == "–" else f"{rule} ({interval})" if interval else rule,
    }


def _in(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _interval(value: Any, *, percent: bool = False) -> tuple[str, str]:
    """Return a value and its interval as two texts: ``62.5%`` and ``58.1 to 66.9``."""
    parts = [_in(value, key) for key in ("value", "low", "high")]
    parts = [value] if isinstance(value, int | float) else parts
    known = [float(part) for part in parts if isinstance(part, int | float) and math.isfinite(part)]
    if not known:
        return UNKNOWN
    texts = [_minus(f"{100 * part:.1f}" if percent else f"{part:.3f}") for part in known]
    interval = f"{texts[1]} to {texts[2]}" if len(texts) == 3 else ""
    return f"{texts[0]}%" if percent else texts[0], interval


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _data(record: RunRecord, data_texts: bool) -> dict[str, Any]:
    """Return the figures of data.json as texts; {} without data.json."""
    found = record.data
    if not found:
        return {}

    def count(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else "–"

    dropped = found.get("dropped")
    reasons = {
        str(reason): count(_in(row, "pairs"))
        for reason, row in (dropped.items() if isinstance(dropped, dict) else ())
    }
    figures = {
        "Rows read": count(found.get("rows_read")),
        "Training pairs": count(found.get("train_pairs")),
        "Held-out pairs": count(found.get("held_out_pairs")),
        "Prompts, training": count(_in(found.get("prompts"), "train")),
        "Prompts, held-out": count(_in(found.get("prompts"), "held_out")),
        "Prompts in both": count(_in(found.get("prompts"), "shared")),
        "Pairs cut at data.max_length": count(_in(found.get("cut"), "pairs")),
    }
    for key, label in (
        ("chosen_longer", "Chosen is longer"),
        ("rejected_longer", "Rejected is longer"),
    ):
        if isinstance(found.get(key), int | float):
            figures[label] = f"{found[key]:.0%} of pairs"
    quantiles = ("min", "p5", "p50", "p95", "max")
    lengths = [
        (part, [count(_in(_in(found.get("tokens"), part), name)) for name in quantiles])
        for part in ("prompt", "chosen", "rejected")
    ]
    try:
        warnings = warning_lines(found)
    except (KeyError, TypeError):  # a run of another version
        warnings = []
    formats = found.get("format") if data_texts else []
    return {
        "figures": figures,
        "dropped": reasons,
        "quantiles": ["shortest", "5%", "median", "95%", "longest"],
        "lengths": lengths,
        "warnings": warnings,
        "format": [str(line) for line in formats] if isinstance(formats, list) else [],
        "template": str(found.get("chat_template", "")),
    }


def _answers(record: RunRecord, data_texts: bool) -> dict[str, Any]:
    rows = [
        {
            "prompt": _cut(sample.prompt),
            "before": _cut(sample.before),
            "after": _cut(sample.after),
            "by_step": {step: _cut(answer) for step, answer in sample.by_step.items()},
            "source": sample.source,
        }
        for sample in record.answers
    ]
    found = {sample.temperature for sample in record.answers}
    temperatures = [value for value in found if value is not None]
    return {
        "neutral": [row for row in rows if row["source"] == "neutral"],
        "held_out": [row for row in rows if row["source"] != "neutral"] if data_texts else [],
        "temperature": ", ".join(f"{value:g}" for value in sorted(temperatures)),
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _settings(record: RunRecord, data_texts: bool) -> Iterator[dict[str, Any]]:
    for key, value in record.settings.items():
        source = record.source(key)
        yield {
            "key": key,
            "value": _shown(value, data_texts),
            "source": source,
            "is_default": source == "default" or value == default(key),
        }


def _shown(value: Any, data_texts: bool) -> str:
    """Return a setting as text. Without ``data_texts`` a path is cut to its last part."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ", ".join(_shown(name, data_texts) for name in value)
    if not isinstance(value, str):
        return to_text(value)
    return Path(value).name if not data_texts and is_path(value) else value


def _versions(record: RunRecord) -> Iterator[tuple[str, str]]:
    lock = record.lock
    yield "orpo-lite", str(lock.get("orpo_lite", "–"))
    yield "Python", str(lock.get("python", "–"))
    versions = lock.get("versions")
    yield from (versions if isinstance(versions, dict) else {}).items()
    if isinstance(dtype := lock.get("dtype"), str):
        yield "computed in", dtype
    for part, key in (("base", "fingerprint"), ("data", "sha256")):
        if isinstance(value := _in(lock.get(part), key), str):
            yield f"{part}, hash", value[:16]


def differing_settings(
    records: Sequence[RunRecord], labels: Sequence[str], data_texts: bool
) -> list[dict[str, Any]]:
    """Return the settings that differ between runs, with the value in each run."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    keys.pop("training.output_dir", None)
    rows = []
    for key in keys:
        values = [record.settings.get(key) for record in records]
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1:
            shown = [_shown(value, data_texts) for value in values]
            rows.append({"key": key, "values": [*zip(labels, shown, strict=True)]})
    return rows
