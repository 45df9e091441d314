"""The model card: what it says, that its metadata are the hub's, and what it never says."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import TOKEN
from huggingface_hub import ModelCard

from orpo_lite.errors import CheckpointError, ModelError, RecipeError
from orpo_lite.evaluation.verify import LOGPS, Row, Verdict
from orpo_lite.publishing import licences
from orpo_lite.publishing.card_facts import PLACEHOLDER, CardOptions
from orpo_lite.publishing.edited_card import (
    complete_card,
    is_unedited,
    loads_adapter,
    read_edited_card,
)
from orpo_lite.publishing.licences import (
    TERMS,
    find_license_files,
    find_terms,
    is_non_commercial,
    licence_of,
    refuse_name,
    split_card,
)
from orpo_lite.publishing.model_card import SAMPLE_LENGTH, make_card
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.recipe.values import refuse_repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PRIVATE = "/home/ann/private-place"
REPO = "lab/tuned"


def make_run(path: Path, *overrides: str, **lock: Any) -> Path:
    """A finished run in figures; of a base and a set of the hub unless something else is said."""
    path.mkdir(exist_ok=True)
    needed = "model:\n  model_name_or_path: lab/base\ndata:\n  dataset_name: lab/pairs\n"
    (path / "source.yaml").write_text(needed)
    (path / "recipe.yaml").write_text(load_recipe(str(path / "source.yaml"), overrides).to_yaml())
    base = {
        "name": "lab/base",
        "revision": COMMIT,
        "path": f"{PRIVATE}/hub/base",
        "fingerprint": "f" * 64,
    }
    licences = {"base": {"license": "apache-2.0"}, "data": {"lab/pairs": {"license": "mit"}}}
    known = {
        "orpo_lite": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "base": base,
        "licences": licences,
    }
    known |= {
        name: {"name": f"{PRIVATE}/x", "sha256": "a" * 64} for name in ("data", "chat_template")
    }
    (path / "lock.json").write_text(json.dumps(known | lock))
    dropped = {"empty rejected": {"pairs": 3, "first": [f"{PRIVATE}/pairs.csv:5"]}}
    figures = {
        "rows_read": 1203,
        "train_pairs": 1100,
        "held_out_pairs": 100,
        "dropped": dropped,
        "sha256": "d" * 64,
    }
    figures |= {
        "chat_template": "the tokenizer's own chat template",
        "chosen_longer": 0.6,
        "rejected_longer": 0.25,
        "cut": {"responses_without_end": 7},
        "prompts": {"shared": 2},
    }
    (path / "data.json").write_text(json.dumps(figures))
    rows = [{"step": step, "loss": 1.0} for step in range(1, 41)]
    for step, loss in ((0, 0.9), (20, 0.5), (40, 0.6)):
        figure = {"eval_loss": loss, "eval_nll_loss": loss, "eval_log_odds_chosen": 1 - loss}
        rows.append({"step": step, **figure, "eval_rewards/accuracies": 1 - loss / 2})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "adapter").mkdir(exist_ok=True)
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 32}))
    return path


HERE = CardOptions(REPO)


def read(path: Path, shown: CardOptions = HERE) -> ModelCard:
    """The card as the hub's own library reads it."""
    return ModelCard(make_card(path, shown))


# --- metadata


def test_the_metadata_are_the_hubs(tmp_path: Path) -> None:
    card = read(make_run(tmp_path))
    assert card.data.to_dict() == {
        "base_model": "lab/base",
        "base_model_relation": "adapter",
        "datasets": ["lab/pairs"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["orpo", "preference-tuning", "orpo-lite", "lora"],
        "model-index": card.data.to_dict()["model-index"],
    }
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "accuracy": 0.75,
        "loss": 0.5,
    }
    assert {(r.task_type, r.dataset_type) for r in card.data.eval_results} == {
        ("text-generation", "lab/pairs")
    }
    assert card.data.model_name == "tuned"
    # What the hub asks of the fields:
    # https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    data = yaml.safe_load(make_card(tmp_path).split("---")[1])
    assert all(
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in [data["base_model"], *data["datasets"]]
    )


def test_of_a_merged_model(tmp_path: Path) -> None:
    data = read(make_run(tmp_path), CardOptions(REPO, merged="original")).data
    assert (data.library_name, data["base_model_relation"]) == ("transformers", "finetune")
    assert "lora" not in data.tags


@pytest.mark.parametrize(
    "said", [{"license": "other", "license_name": "x-1", "license_link": "https://x.org/1"}, {}]
)
def test_the_licence_is_that_of_the_bases_card_or_none(
    tmp_path: Path, said: dict[str, str]
) -> None:
    card = read(make_run(tmp_path, licences={"base": said, "data": {}}))
    assert {key: card.data.get(key) for key in licences.KEYS if card.data.get(key)} == said
    assert ("is not known:" in card.text) is (not said)


def test_a_link_to_a_file_beside_the_bases_card_is_written_out(tmp_path: Path) -> None:
    said = {"license_name": "x-1", "license_link": "LICENSE"}
    data = read(make_run(tmp_path, licences={"base": said, "data": {}})).data
    assert data.license_link == f"https://huggingface.co/lab/base/blob/{COMMIT}/LICENSE"
    assert data.license == "other"


@pytest.mark.parametrize("link", ["../../../evil", "docs/%2e%2E/%2e%2e/evil", "..\\evil"])
def test_a_link_that_climbs_is_left_out(tmp_path: Path, link: str) -> None:
    text = make_card(
        make_run(
            tmp_path, licences={"base": {"license_name": "x-1", "license_link": link}, "data": {}}
        )
    )
    assert "evil" not in text
    assert "license_link" not in text


def test_several_licences_are_a_list(tmp_path: Path) -> None:
    said = licence_of({"license": ["apache-2.0", "llama3.1"]})
    card = read(make_run(tmp_path, licences={"base": said, "data": {"lab/pairs": said}}))
    assert card.data.license == ["apache-2.0", "llama3.1"]
    assert "names several licences: apache-2.0, llama3.1. They also apply" in card.text
    assert TERMS["llama3.1"].notice in card.text
    assert "**Built with Llama**" in card.text
    assert "| apache-2.0, llama3.1 |" in card.text


def test_a_base_and_data_of_ones_own_are_left_out(tmp_path: Path) -> None:
    base = {
        "name": f"{PRIVATE}/base",
        "revision": None,
        "path": f"{PRIVATE}/base",
        "fingerprint": "f" * 64,
    }
    names = ["data.dataset_name=/home/ann/private-place/pairs.csv,/home/ann/private-place/more"]
    run = make_run(
        tmp_path, f"model.model_name_or_path={PRIVATE}/base", *names, base=base, licences={}
    )
    card = read(run)
    assert not [
        key
        for key in ("base_model", "base_model_relation", "datasets", "license")
        if card.data.get(key)
    ]
    assert card.data.eval_results is None
    assert "a model from a local folder of its trainer" in card.text
    assert "| local file 1 | not stated |" in card.text
    assert "| local files 2 | not stated |" in card.text
    assert "1,203 rows read" in card.text
    assert "d" * 64 in card.text


# --- the text


def test_what_was_done(tmp_path: Path) -> None:
    text = read(
        make_run(tmp_path, "loss.beta=0.25", "training.learning_rate=3e-5", "lora.r=8")
    ).text
    for said in (
        f"[lab/base](https://huggingface.co/lab/base) at revision `{COMMIT}`",
        "| λ (`loss.beta`) | 0.25 |",
        "| NLL counts | prompt and chosen response; mean over all tokens of a step |",
        "| `training.learning_rate` | 3.0e-05 |",
        "| `lora.r` | 8 |",
        "| steps | 40; kept: step 20 |",
        "| [lab/pairs](https://huggingface.co/datasets/lab/pairs) | mit |",
        "1,100 training pairs, 100 held out",
        "| empty rejected | 3 |",
        "| chat template | the tokenizer's own chat template |",
        "Held out: some of the prompts, with all of their pairs.",
        "On 100 pairs, with the base in 4 bit. Before: without adapter. After: with the kept adapter.",
        "| loss | 0.9000 | 0.5000 |",
        "longer one in 60% of the pairs and the shorter one in 25%;",
        "7 responses were cut at 2,048 tokens",
        "2 held-out prompts are also training prompts",
    ):
        assert said in text, said
    text = read(
        make_run(tmp_path, "loss.completion_only_loss=true", "loss.nll_reduction=pair")
    ).text
    assert "| NLL counts | the chosen response; mean over each response, then over pairs |" in text


def test_the_step_that_was_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, "training.load_best_model_at_end=false")
    assert "kept: step 40" in read(run).text
    assert "| loss | 0.9000 | 0.6000 |" in read(run).text
    (run / "result.json").write_text('{"steps": 40, "kept_step": 20}')
    assert "| loss | 0.9000 | 0.5000 |" in read(run).text
    (run / "metrics.jsonl").unlink()
    assert "| steps | 40; kept: step 20 |" in read(run).text
    (run / "result.json").unlink()
    assert "| steps | not known |" in read(run).text


def test_without_held_out_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    card = read(run)
    assert (
        "None: 100 pairs were held out, but metrics before or after training are missing."
        in card.text
    )
    assert "The held-out metrics measure" not in card.text
    assert card.data.eval_results is None
    (run / "data.json").write_text((run / "data.json").read_text().replace("100,", "0,"))
    assert "None: no pairs were held out." in read(run).text


def test_where_held_out_pairs_come_from(tmp_path: Path) -> None:
    card = read(make_run(tmp_path, "data.dataset_test_split=test", "data.max_samples=1500"))
    assert "Held out: split test." in card.text
    assert "Only the first 1,500 rows of each dataset are used." in card.text
    assert card.data.eval_results
    card = read(make_run(tmp_path, f"data.dataset_test_split={PRIVATE}/held-out.jsonl"))
    assert "Held out: local files." in card.text
    assert card.data.eval_results is None  # which would be of lab/pairs


@pytest.mark.parametrize(
    ("name", "called"),
    [("a.csv", "a local file"), ("more", "local files"), ("*.jsonl", "local files")],
)
def test_a_local_file_has_no_name(tmp_path: Path, name: str, called: str) -> None:
    text = read(make_run(tmp_path, f"data.dataset_name={PRIVATE}/{name}")).text
    assert f"| {called} | not stated |" in text
    assert "1,203 rows read:" in text


def test_local_files_are_numbered(tmp_path: Path) -> None:
    names = [f"{PRIVATE}/clients.csv", "lab/pairs", f"{PRIVATE}/more", f"{PRIVATE}/last.jsonl"]
    text = read(make_run(tmp_path, f"data.dataset_name={','.join(names)}")).text
    assert re.findall(r"^\| (local \w+ \d) \|", text, re.MULTILINE) == [
        "local file 1",
        "local files 2",
        "local file 3",
    ]
    assert "1,203 rows read in total:" in text
    figures = json.loads((tmp_path / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(figures | {"rows_of_sets": [1000, 3, 150, 50]}))
    text = read(tmp_path, CardOptions(REPO)).text
    assert "| data | licence | training rows |" in text
    assert "| local file 1 | not stated | 1,000 |" in text


@pytest.mark.parametrize("is_merged", [False, True])
def test_the_code_is_code(tmp_path: Path, is_merged: bool) -> None:
    text = read(make_run(tmp_path), CardOptions(REPO, "original" if is_merged else None)).text
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "sh"]
    ast.parse(blocks[0][1])
    assert (f'revision="{COMMIT}"' in blocks[0][1]) is not is_merged
    assert REPO in blocks[1][1]
    subprocess.run(["sh", "-n", "-c", blocks[1][1]], check=True)
    assert ("--max-lora-rank 16" in blocks[1][1]) is not is_merged
    assert "orpo-lite export RUN --to ollama" in text


def test_vllm_is_given_what_it_takes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({"r": 4}))
    assert "--max-lora-rank 8\n" in read(run).text
    config.write_text(json.dumps({"r": 4, "alpha_pattern": {"q_proj": 32}}))
    assert "vLLM cannot serve this adapter: merge it first." in read(run).text
    assert "vllm serve" not in read(run).text


def test_what_a_merge_measured_of_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "merged").mkdir()
    (run / "merged/config.json").write_text("{}")
    (run / "merged/model.safetensors").write_bytes(b"")
    rows = (Row("base + adapter", 0.5, -0.25, -1.5), Row("merged", 0.75, 0.125, -1.25))
    verdict = Verdict(
        LOGPS, rows, pairs=1_200, held_out=True, difference=1.26e-6, effect=0.5, bound=1e-4
    )
    (run / "merged/verify.json").write_text(json.dumps(verdict.to_json()))
    text = read(run, CardOptions(REPO, merged="original")).text
    assert "| 1,200 held-out pairs | reward accuracy | margin | log-prob of chosen |" in text
    assert "| merged | 75.0% | +0.1250 | -1.2500 |" in text
    assert "passed: mean log-probabilities differ by at most 1.3e-06" in text
    assert "reward accuracy | margin" not in read(run, CardOptions(REPO, merged="dequantized")).text
    assert "| merged | 75.0% | +0.1250 | -1.2500 |" in read(run).text
    card = read(
        run, CardOptions(REPO, merged="original")
    )  # its own figures, not those of the 4-bit base with the adapter
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("accuracy", 0.75)
    ]
    assert read(run, CardOptions(REPO, merged="dequantized")).data.eval_results is None
    (run / "merged/model.safetensors").rename(run / "merged/model.safetensors.index.json")
    (run / "merged/model.safetensors.index.json").write_text("{")
    assert "| merged |" not in read(run).text


NOT_FOR_COMMERCE = (
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "CC-BY-NC-ND-3.0",
    "x-noncommercial",
    "x-research-only",
    "non commercial",
    "non_commercial",
    "research only",
    "no commercial use",
    "not for commercial use",
    "CC BY-NC 4.0",
    "Mistral AI Non-Production License",
    "mnpl",
    "mrl",
    "apple-amlr",
    "fair-noncommercial-research-license",
    "deepfloyd-if-license",
    "h-research",
    "intel-research",
    "qwen-research",
    "tongyi-qianwen-research",
    "academic-only",
)


@pytest.mark.parametrize("name", NOT_FOR_COMMERCE)
def test_data_that_keep_commerce_out_are_named(tmp_path: Path, name: str) -> None:
    assert is_non_commercial(name)
    licences = {"base": {"license": "mit"}, "data": {"lab/pairs": {"license": name}}}
    text = read(make_run(tmp_path, licences=licences)).text
    assert f"**Not for commercial use because of its data**: lab/pairs is under {name}." in text
    assert f"| {name} |" in text
    assert "like its base" not in text


@pytest.mark.parametrize("said", [
    {"license": "cc-by-nc-4.0"},
    {"license": "cc-by-nc-4.0", "license_name": "my-own"},
    {"license": "other", "license_name": "mnpl"},
    {"license": ["mit", "cc-by-nc-4.0"]},
])  # fmt: skip
def test_a_base_that_keeps_commerce_out_is_named(tmp_path: Path, said: dict[str, Any]) -> None:
    text = read(make_run(tmp_path, licences={"base": said, "data": {"lab/pairs": said}})).text
    assert "**Not for commercial use**, like its base." in text
    assert "**Not for commercial use because of its data**: lab/pairs" in text


@pytest.mark.parametrize(
    "name",
    [
        "mit",
        "apache-2.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "gpl-3.0",
        "ncsa",
        "bsl",
        "c-uda",
        "apple-ascl",
    ],
)
def test_other_licences_are_not(name: str) -> None:
    assert not is_non_commercial(name)


# --- what it never says


def test_no_path_no_place_no_token(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        f"data.dataset_test_split={PRIVATE}/held-out.jsonl",
        f"data.chat_template={PRIVATE}/mine.jinja",
        f"model.adapter_name_or_path={PRIVATE}/adapter",
        f"training.output_dir={PRIVATE}/run",
    )
    sample = {"prompt": f"my {TOKEN}", "before": "", "after": "```\n# Title"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    for merged in (None, "original", "dequantized"):
        text = make_card(run, CardOptions(REPO, merged, samples=1))
        assert not [
            word for word in (PRIVATE, "ann", str(tmp_path), TOKEN, "pairs.csv") if word in text
        ]
    assert "a local adapter" in text
    assert "````text\n```\n# Title\n````" in text


def test_what_others_wrote_brings_no_mark_up(tmp_path: Path) -> None:
    said = {
        "license": "other",
        "license_name": "a | b\n\n# Title <script> [x](y) `c` ---",
        "license_link": "x",
    }
    said = licence_of(said)
    card = read(make_run(tmp_path, licences={"base": said, "data": {"lab/pairs": said}}))
    assert card.data.license_name == said["license_name"]
    assert "\n# Title" not in card.text
    assert "<script>" not in card.text.replace("\\<script\\>", "")


def test_an_answer_is_cut_and_brings_no_control_characters(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sample = {
        "prompt": "a\r```\r\nb\x1b[31m\x00\ud800",
        "before": "x" * (SAMPLE_LENGTH + 1),
        "after": "y" * SAMPLE_LENGTH,
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = read(run, CardOptions(REPO, samples=1)).text
    assert "````text\na\n```\nb[31m\n````" in text
    assert f"```text\n{'x' * SAMPLE_LENGTH} ...\n```" in text
    assert f"```text\n{'y' * SAMPLE_LENGTH}\n```" in text


CARDS: list[tuple[str, dict[str, Any]]] = [
    ("---\nlicense: mit\n---\nText", {"license": "mit"}),
    ("\ufeff---\r\nlicense: mit\r\n---\r\nText", {"license": "mit"}),
    ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", {"license": ["mit", "cc-by-4.0"]}),
    (
        "---\nlicense: [mit]\nlicense_name: [a, b]\n---\n",
        {"license": "mit", "license_name": "a, b"},
    ),
    ('---\nlicense: "m\\eit"\n---\n', {"license": "mit"}),
    (
        "---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---",
        {"license": "other", "license_name": "x", "license_link": "LICENSE"},
    ),
    ("---\nlicense: {a: b}\n---\n", {}),
    (f"---\nlicense: {TOKEN}\n---\n", {}),
    (f"---\nlicense: mit\nlicense_link: {PRIVATE}/LICENSE\n---\n", {"license": "mit"}),
    ("---\nlicense: [mit\n---\n", {}),
    ("---\n- mit\n---\n", {}),
    ("---\nlicense: &a [x, x]\nother: [*a, *a]\n---\n", {}),
    ("---\nlicense: " + "[" * 5000 + "\n---\n", {}),
    ("---\nlicense: !!python/object:os.system x\n---\n", {}),
    ("No metadata", {}),
    ('{"file": "README.md"}', {}),
    ("", {}),
]


@pytest.mark.parametrize(("text", "found"), CARDS)
def test_the_card_of_a_base_whatever_it_is(text: str, found: dict[str, Any]) -> None:
    assert licence_of(split_card(text)[0]) == found


# --- a card that a person changed


def test_a_changed_card_is_told_from_ours(tmp_path: Path) -> None:
    ours = make_card(make_run(tmp_path))
    assert is_unedited(ours)
    assert not is_unedited(ours.replace("0.9000", "0.1000"))
    assert not is_unedited("# Mine")
    assert not is_unedited(ours + "\nMore.")
    assert "orpo-lite card" not in complete_card(tmp_path, ours + "\nMore.", HERE)
    adopted = complete_card(
        tmp_path,
        ours.replace("## Limits", f"Mine, {PLACEHOLDER}.\n\n## Limits"),
        CardOptions(REPO, merged="original"),
    )
    card = ModelCard(adopted)
    assert f"Mine, {REPO}." in card.text
    assert card.data.library_name == "transformers"
    assert card.data.eval_results
    assert "<!--" not in adopted


def test_a_changed_card_keeps_the_line_that_its_base_asks_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, licences={"base": {"license": "llama3.2"}, "data": {}})
    ours = make_card(run)
    complete_card(run, ours + "More.", CardOptions(REPO))
    with pytest.raises(CheckpointError, match="prominently display “Built with Llama”"):
        complete_card(run, ours.replace("Built with", "Made of"), CardOptions(REPO))

    for hidden in (
        "<!-- Built with Llama -->",
        "<!-- Built with Llama",
        "<img alt='Built with Llama'>",
        "[x]: # (Built with Llama)",
    ):
        with pytest.raises(CheckpointError, match="prominently display “Built with Llama”"):
            complete_card(run, ours.replace("**Built with Llama**", hidden), HERE)


@pytest.mark.parametrize(
    ("line", "changed", "said"),
    [
        (
            "license: llama3.2",
            "license: apache-2.0",
            "license: llama3.2, as in the base's card; the licence says: “Llama 3.2 is",
        ),
        ("license: llama3.2\n", "", "license: llama3.2, as in the base's card"),
        (
            "license: llama3.2",
            "license: llama3.2\nlicense_name: mine",
            "no license_name, as in the base's card",
        ),
        (
            "base_model: lab/base",
            "base_model: lab/other",
            "base_model: lab/base, because the base is under the Llama 3.2",
        ),
        (
            "base_model: lab/base\n",
            "",
            "base_model: lab/base, because the base is under the Llama 3.2",
        ),
    ],
)
def test_a_changed_card_says_of_its_base_what_is_so(
    tmp_path: Path, line: str, changed: str, said: str
) -> None:
    run = make_run(tmp_path, licences={"base": {"license": "llama3.2"}, "data": {}})
    with pytest.raises(CheckpointError) as refused:
        complete_card(run, make_card(run).replace(line, changed), HERE)
    assert said in refused.value.expected
    assert str(run / "README.md") in refused.value.where


def test_a_changed_card_may_name_more_bases_and_its_link_as_the_base_does(tmp_path: Path) -> None:
    said = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
    run = make_run(tmp_path, licences={"base": said, "data": {}})
    ours = make_card(run).replace("base_model: lab/base", "base_model:\n- lab/other\n- lab/base")
    complete_card(run, ours, HERE)
    complete_card(run, re.sub("license_link: .*", "license_link: LICENSE", ours), HERE)


HAND = """\
# mine
license: mit   # as it is
language: no
license_name: 1.10
x: 010
day: 2024-13-45
2024: y
on: z
model-index:
- foo: 1
tags: [ lora, "a" ]
text: >
  folded

  text
"""


@pytest.mark.parametrize("feed", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ("", "{}library_name: peft\nbase_model_relation: adapter\n"),
        (
            "library_name: 'mine' # x\ny: z\n",
            "{}library_name: peft # x\ny: z\nbase_model_relation: adapter\n",
        ),
        (
            "base_model_relation:\nlibrary_name: |\n  a\n  b\nq: r\n",
            "{}base_model_relation: adapter\nlibrary_name: peft\nq: r\n",
        ),
        (
            "library_name:\n- a\n- b\n# end\n",
            "{}library_name: peft\n# end\nbase_model_relation: adapter\n",
        ),
    ],
)
def test_a_persons_metadata_stay_as_they_stand(
    tmp_path: Path, feed: str, more: str, kept: str
) -> None:
    run, body = make_run(tmp_path), "Words,\n\n OWNER/NAME  \n"
    (run / "README.md").write_bytes(f"---\n{HAND}{more}---\n{body}".replace("\n", feed).encode())
    adopted = complete_card(run, read_edited_card(run), HERE)
    assert adopted == f"---\n{kept.format(HAND)}---\n{body}".replace("\n", feed).replace(
        "OWNER/NAME", REPO
    )


def test_the_tag_of_an_adapter_goes_from_a_merged_model_where_it_has_a_line(tmp_path: Path) -> None:
    run, merged = make_run(tmp_path), CardOptions(REPO, merged="original")
    ours = f"{make_card(run)}More."
    assert "- lora" not in complete_card(run, ours, merged)
    assert "- lora\n" in complete_card(run, ours, HERE)
    end = "library_name: transformers\nbase_model_relation: finetune\n"
    for tags in ("tags:\n- lora\n", "tags: [a, lora]\n", "tags: lora\n", "tags:\n- a\n- lora-x\n"):
        assert complete_card(run, f"---\n{tags}---\nMine.", merged) == f"---\n{tags}{end}---\nMine."
    assert (
        complete_card(run, "---\ntags:\n  - a\n  - lora\n---\n", merged)
        == f"---\ntags:\n  - a\n{end}---\n"
    )
    assert loads_adapter(complete_card(run, ours, merged))
    assert not loads_adapter(complete_card(run, "---\na: b\n---\nMine.", merged))
    assert not loads_adapter(make_card(run))


@pytest.mark.parametrize(
    "metadata",
    [
        "[a",
        "- a",
        "a",
        "{a: b}",
        "a: b\na: c",
        "a: &x 1\nb: *x",
        "a: " + "[" * 5000,
        "? library_name\n: x",
        "# a",
        "a: b\n...",
        "a: b\x00",
    ],
)
def test_metadata_that_cannot_be_kept_are_named(tmp_path: Path, metadata: str) -> None:
    run = make_run(tmp_path)
    with pytest.raises(CheckpointError, match="its metadata") as refused:
        complete_card(run, f"---\n{metadata}\n---\nMine.", HERE)
    assert refused.value.fix


def test_a_card_in_another_encoding_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "README.md").write_bytes(make_card(run).replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_edited_card(run) == ""
    (run / "README.md").write_bytes(b"---\nlicense: mit\n---\nM\xfcller\n")
    with pytest.raises(CheckpointError, match=r"README.md: cannot be read .*\n  expected: UTF-8"):
        read_edited_card(run)
    (run / "README.md").rename(tmp_path / "elsewhere.md")
    (run / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        read_edited_card(run)


# --- a run folder that a person broke


def without(name: str, *keys: str) -> tuple[str, Any]:
    """A file of a run, and what takes a key out of it."""

    def cut(text: str) -> str:
        value = json.loads(text)
        part = value
        for key in keys[:-1]:
            part = part[key]
        del part[keys[-1]]
        return json.dumps(value)

    return name, cut


BROKEN = [
    (*without("lock.json", "versions"), "lock.json: lacks versions"),
    (*without("lock.json", "orpo_lite"), "lock.json: lacks orpo_lite"),
    (*without("lock.json", "licences", "base"), "lock.json, licences: lacks base"),
    (
        "lock.json",
        lambda text: re.sub(r'"licences": .*?}}}', '"licences": [1]', text),
        "lock.json: licences is [1]",
    ),
    (
        "lock.json",
        lambda text: text.replace('"apache-2.0"', "null"),
        "lock.json, licences: license is null",
    ),
    (
        "lock.json",
        lambda text: text.replace('{"license": "mit"}', "[]"),
        "licences.data: lab/pairs is []",
    ),
    ("data.json", lambda _: "{}", "data.json: lacks chat_template"),
    (
        "data.json",
        lambda text: text.replace(" 100,", " null,"),
        "data.json: held_out_pairs is null",
    ),
    (
        *without("data.json", "dropped", "empty rejected", "pairs"),
        "data.json, dropped, empty rejected: lacks pairs",
    ),
    (
        *without("data.json", "cut", "responses_without_end"),
        "data.json, cut: lacks responses_without_end",
    ),
    (*without("data.json", "prompts", "shared"), "data.json, prompts: lacks shared"),
    ("result.json", lambda _: "{}", "result.json: lacks steps"),
    ("result.json", lambda _: '{"steps": 3, "kept_step": null}', "result.json: kept_step is null"),
    (
        "metrics.jsonl",
        lambda text: text.replace('"step": 2,', "", 1),
        "metrics.jsonl:2: lacks step",
    ),
    (
        "metrics.jsonl",
        lambda text: text.replace("0.9", "[]", 1),
        "metrics.jsonl:41: eval_loss is []",
    ),
    ("samples.jsonl", lambda _: "[1]\n", "samples.jsonl:1: is not a JSON object"),
    ("samples.jsonl", lambda _: '{"source": "neutral"}\n', "samples.jsonl:1: lacks prompt"),
    ("samples.jsonl", lambda _: '{"prompt": null}\n', "samples.jsonl:1: prompt is null"),
    ("adapter/adapter_config.json", lambda _: "{}", "adapter_config.json: lacks r"),
    ("merged/verify.json", lambda _: "{}", "verify.json: lacks rows"),
    (
        "merged/verify.json",
        lambda text: text.replace("[]", "[1]"),
        "verify.json, rows: lacks model",
    ),
]


@pytest.mark.parametrize(("name", "change", "said"), BROKEN)
def test_a_broken_file_of_a_run_is_named_with_what_it_lacks(
    tmp_path: Path, name: str, change: Any, said: str
) -> None:
    run = make_run(tmp_path)
    (run / "result.json").write_text('{"steps": 40, "kept_step": 20}')
    (run / "samples.jsonl").write_text("")
    (run / "merged").mkdir()
    (run / "merged/config.json").write_text("{}")
    (run / "merged/model.safetensors").write_bytes(b"")
    verdict = Verdict(LOGPS, (), pairs=1, held_out=True, difference=0.0, effect=0.5, bound=1e-4)
    (run / "merged/verify.json").write_text(json.dumps(verdict.to_json()))
    make_card(run)
    (run / name).write_text(change((run / name).read_text()))
    with pytest.raises(CheckpointError) as refused:
        make_card(run)
    assert said in str(refused.value)
    assert str(run / name) in refused.value.where


# --- what licences ask

LLAMAS = [
    ({"license": "llama2"}, "LLAMA 2", "", ""),
    ({"license": "llama3"}, "Meta Llama 3", "Built with Meta Llama 3", "Llama 3"),
    ({"license": "llama3.1"}, "Llama 3.1", "Built with Llama", "Llama"),
    (
        {"license": "other", "license_name": "llama-3.2-community"},
        "Llama 3.2",
        "Built with Llama",
        "Llama",
    ),
    ({"license": "other", "license_name": "llama3_3"}, "Llama 3.3", "Built with Llama", "Llama"),
    ({"license": "llama4"}, "Llama 4", "Built with Llama", "Llama"),
]


@pytest.mark.parametrize(("said", "title", "built_with", "prefix"), LLAMAS)
def test_the_terms_of_llama(
    tmp_path: Path, said: dict[str, str], title: str, built_with: str, prefix: str
) -> None:
    (terms,) = find_terms(said)
    assert (terms.title, terms.built_with, terms.prefix) == (
        f"{title} Community License",
        built_with,
        prefix,
    )
    assert terms.notice.endswith("Meta Platforms, Inc. All Rights Reserved.")
    text = read(make_run(tmp_path, licences={"base": said, "data": {}})).text
    assert (f"**{built_with}**" in text) is bool(built_with)
    assert terms.notice in text


@pytest.mark.parametrize(
    "name",
    [
        "mit",
        "gpl-3.0",
        "llamafile",
        "llamafile 2",
        "llama",
        "",
        "my-llama3",
        "gemmate",
        "llama270b",
    ],
)
def test_what_is_not_llama(name: str) -> None:
    assert find_terms({"license": name}) == []


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("llama33", "Llama 3.3"),
        ("llama3.10", "Llama 3.10"),
        ("the Llama 3.1 license", "Llama 3.1"),
        ("meta llama community license 3.1", "Llama 3.1"),
        ("Apache-2.0 and Llama-3-1", "Llama 3.1"),
        ("llama-3-8b", "Meta Llama 3"),
        ("Llama 3.0", "Meta Llama 3"),
        ("llama-2-70b-chat", "LLAMA 2"),
    ],
)
def test_other_spellings_of_llama(name: str, title: str) -> None:
    assert [terms.title for terms in find_terms({"license_name": name})] == [
        f"{title} Community License"
    ]


def test_every_licence_of_a_list_has_its_say() -> None:
    assert find_terms({"license": ["gemma", "llama3.1", "llama3.1"]}) == [
        TERMS["gemma"],
        TERMS["llama3.1"],
    ]
    assert find_terms({"license": "apache-2.0", "license_name": "mit, the Gemma terms"}) == [
        TERMS["gemma"]
    ]
    with pytest.raises(RecipeError, match="“Llama 3” at the beginning"):
        refuse_name("lab/Llama-mine", {"license": ["llama3.1", "llama3"]}, "REPO")


@pytest.mark.parametrize(
    ("licence_name", "repository", "is_fine"),
    [
        ("llama3.1", "lab/Llama-3.1-mine", True),
        ("llama3.1", "Llama-mine", True),
        ("llama3.1", "lab/my-Llama", False),
        ("llama3.1", "Llama/mine", False),
        ("llama3", "lab/Llama-3-mine", True),
        ("llama3", "lab/Llama3-mine", True),
        ("llama3", "lab/Llama-mine", False),
        ("llama2", "lab/mine", True),
        ("gemma", "lab/mine", True),
        ("mit", "lab/mine", True),
        ("llama3.1", "llama", False),
        ("llama3", "me/Llama", False),
        ("llama3", "me/meta-llama-3-mine", False),
        ("llama3", "m" * 96, False),
        ("llama3", f"me/{'m' * 81}.git-not", False),
    ],
)
def test_the_name_of_a_derivative(licence_name: str, repository: str, is_fine: bool) -> None:
    if is_fine:
        refuse_name(repository, {"license": licence_name}, "REPO")
        return
    with pytest.raises(RecipeError, match="at the beginning of any such AI model name") as refused:
        refuse_name(repository, {"license": licence_name}, "REPO")
    suggested = refused.value.fix.removeprefix("use a name such as ")
    refuse_name(suggested, {"license": licence_name}, "REPO")
    refuse_repository(suggested)


def test_a_name_that_is_nothing_but_the_bases_is_given_an_end() -> None:
    with pytest.raises(RecipeError) as refused:
        refuse_name("me/meta-llama-3", {"license": "llama3"}, "REPO")
    assert refused.value.fix == "use a name such as me/Llama-3-tuned"


def test_the_papers_of_a_base_go_with_it(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "train.jsonl"):
        (tmp_path / name).write_text(f"{name} of the community license")
    papers = find_license_files({"license": "apache-2.0"}, "base", None, tmp_path)
    assert sorted(papers) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    papers = find_license_files({"license": "gemma"}, "base", None, tmp_path)
    assert papers["NOTICE"] == f"{TERMS['gemma'].notice}\n".encode()
    (tmp_path / "NOTICE").write_text(f"Ours.\n{TERMS['gemma'].notice.replace(' ', '  ')}\n")
    assert (
        find_license_files({"license": "gemma"}, "base", None, tmp_path)["NOTICE"]
        == tmp_path / "NOTICE"
    )
    papers = find_license_files({"license": "llama2"}, "base", None, tmp_path)
    assert isinstance(papers["NOTICE"], bytes)
    assert papers["NOTICE"].startswith(b"Ours.\n")
    assert papers["NOTICE"].decode().rstrip().endswith(TERMS["llama2"].notice)


def test_the_agreement_that_a_gated_card_carries_is_the_copy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="provide a copy of this Agreement"):
        find_license_files({"license": "llama3.2"}, "base", None, tmp_path)
    agreement = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n" + "word " * 500
    (tmp_path / "README.md").write_text(
        "---\n" + yaml.safe_dump({"extra_gated_prompt": agreement}) + "---\n"
    )
    assert (
        find_license_files({"license": "llama3.2"}, "base", None, tmp_path)["LICENSE"]
        == agreement.encode()
    )
    (tmp_path / "LICENSE").write_text("Apache License")  # of the other of two
    papers = find_license_files(
        {"license": ["apache-2.0", "llama3.2", "gemma"]}, "base", None, tmp_path
    )
    assert papers["LICENSE"] == tmp_path / "LICENSE"
    assert papers["LICENSE.txt"] == agreement.encode()
    assert isinstance(papers["NOTICE"], bytes)
    assert papers["NOTICE"].decode() == f"{TERMS['llama3.2'].notice}\n\n{TERMS['gemma'].notice}\n"


def test_the_hub_is_asked_for_a_licence_that_the_cache_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    asked = []

    def fetch(
        name: str, revision: str | None, folder: Path | None, *, cached: bool = True, **_: Any
    ) -> Path:
        asked.append(cached)
        return tmp_path if cached else there

    monkeypatch.setattr(licences, "fetch_license_files", fetch)
    assert (
        find_license_files({"license": "llama3.1"}, "lab/base", COMMIT, tmp_path)["LICENSE"]
        == there / "LICENSE"
    )
    assert asked == [True, False]
    find_license_files({"license": "llama3.1"}, "lab/base", COMMIT, tmp_path, [there])
    assert asked == [True, False, True]


def test_only_the_licences_that_are_lacking_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    asked = []

    def fetch(name: str, *_: Any, **__: Any) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setattr(licences, "fetch_license_files", fetch)
    known = {
        "base": {"license": "gemma"},
        "data": {"lab/pairs": {}, "lab/more": {"license": "cc0-1.0"}},
    }
    names = ["lab/pairs", "lab/more", "/a/file.jsonl"]
    data = {"lab/pairs": {"license": "mit"}, "lab/more": {"license": "cc0-1.0"}}
    found = licences.read_licences("lab/base", COMMIT, tmp_path, names, known)
    assert found == {"base": {"license": "gemma"}, "data": data}
    assert asked == ["lab/pairs"]
    assert licences.read_licences("lab/base", COMMIT, tmp_path, [])["base"] == {"license": "mit"}
