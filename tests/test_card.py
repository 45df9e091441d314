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

from orpo_lite import licence
from orpo_lite.card import SOMEWHERE, Shown, adopt_card, is_own, make_card
from orpo_lite.errors import CheckpointError, ModelError, RecipeError
from orpo_lite.licence import TERMS, find_papers, find_terms, is_non_commercial, licence_of, refuse_name, split_card
from orpo_lite.recipe import load_recipe
from orpo_lite.verify import Row, Verdict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PRIVATE = "/home/ann/private-place"
REPO = "lab/tuned"


def make_run(path: Path, *overrides: str, **lock: Any) -> Path:
    """A finished run in figures; of a base and a set of the hub unless something else is said."""
    path.mkdir(exist_ok=True)
    needed = "model:\n  model_name_or_path: lab/base\ndata:\n  dataset_name: lab/pairs\n"
    (path / "source.yaml").write_text(needed)
    (path / "recipe.yaml").write_text(load_recipe(str(path / "source.yaml"), overrides).to_yaml())
    base = {"name": "lab/base", "revision": COMMIT, "path": f"{PRIVATE}/hub/base", "fingerprint": "f" * 64}
    licences = {"base": {"license": "apache-2.0"}, "data": {"lab/pairs": {"license": "mit"}}}
    known = {"orpo_lite": "0.1.0", "versions": {"torch": "2.13.0"}, "base": base, "licences": licences}
    known |= {name: {"name": f"{PRIVATE}/x", "sha256": "a" * 64} for name in ("data", "chat_template")}
    (path / "lock.json").write_text(json.dumps(known | lock))
    dropped = {"empty rejected": {"pairs": 3, "first": [f"{PRIVATE}/pairs.csv:5"]}}
    figures = {"rows_read": 1203, "train_pairs": 1100, "held_out_pairs": 100, "dropped": dropped, "sha256": "d" * 64}
    figures |= {"chosen_longer": 0.6, "cut": {"responses_without_end": 7}, "prompts": {"shared": 2}}
    (path / "data.json").write_text(json.dumps(figures))
    rows = [{"step": step, "loss": 1.0} for step in range(1, 41)]
    for step, loss in ((0, 0.9), (20, 0.5), (40, 0.6)):
        figure = {"eval_loss": loss, "eval_nll_loss": loss, "eval_log_odds_chosen": 1 - loss}
        rows.append({"step": step, **figure, "eval_rewards/accuracies": 1 - loss / 2})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "adapter").mkdir(exist_ok=True)
    (path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 16}))
    return path


HERE = Shown(REPO)


def read(path: Path, shown: Shown = HERE) -> ModelCard:
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
    assert {(r.task_type, r.dataset_type) for r in card.data.eval_results} == {("text-generation", "lab/pairs")}
    assert card.data.model_name == "tuned"
    # What the hub asks of the fields: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    data = yaml.safe_load(make_card(tmp_path).split("---")[1])
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in [data["base_model"], *data["datasets"]])


def test_of_a_merged_model(tmp_path: Path) -> None:
    data = read(make_run(tmp_path), Shown(REPO, merged="original")).data
    assert (data.library_name, data["base_model_relation"]) == ("transformers", "finetune")
    assert "lora" not in data.tags


@pytest.mark.parametrize("said", [{"license": "other", "license_name": "x-1", "license_link": "https://x.org/1"}, {}])
def test_the_licence_is_that_of_the_bases_card_or_none(tmp_path: Path, said: dict[str, str]) -> None:
    card = read(make_run(tmp_path, licences={"base": said, "data": {}}))
    assert {key: card.data.get(key) for key in licence.KEYS if card.data.get(key)} == said
    assert ("is not known here" in card.text) is (not said)


def test_a_link_to_a_file_beside_the_bases_card_is_written_out(tmp_path: Path) -> None:
    said = {"license_name": "x-1", "license_link": "LICENSE"}
    data = read(make_run(tmp_path, licences={"base": said, "data": {}})).data
    assert data.license_link == f"https://huggingface.co/lab/base/blob/{COMMIT}/LICENSE"
    assert data.license == "other"


def test_a_base_and_data_of_ones_own_are_left_out(tmp_path: Path) -> None:
    base = {"name": f"{PRIVATE}/base", "revision": None, "path": f"{PRIVATE}/base", "fingerprint": "f" * 64}
    names = ["data.dataset_name=/home/ann/private-place/pairs.csv,/home/ann/private-place/more"]
    run = make_run(tmp_path, f"model.model_name_or_path={PRIVATE}/base", *names, base=base, licences={})
    card = read(run)
    assert not [key for key in ("base_model", "base_model_relation", "datasets", "license") if card.data.get(key)]
    assert card.data.eval_results is None
    assert "a model that its trainer had in a local folder" in card.text
    assert "| a local file | not stated |" in card.text
    assert "| local files | not stated |" in card.text
    assert "1,203 rows read" in card.text
    assert "d" * 64 in card.text


# --- the text


def test_what_was_done(tmp_path: Path) -> None:
    text = read(make_run(tmp_path, "loss.beta=0.25", "training.learning_rate=3e-5", "lora.r=8")).text
    for said in (
        f"[lab/base](https://huggingface.co/lab/base) at revision `{COMMIT}`",
        "| λ (`loss.beta`) | 0.25 |",
        "| NLL counts | prompt and chosen response; mean over all tokens of a step |",
        "| `training.learning_rate` | 3.0e-05 |",
        "| `lora.r` | 8 |",
        "| steps | 40; kept: step 20 |",
        "| [lab/pairs](https://huggingface.co/datasets/lab/pairs) | mit |",
        "1,100 pairs to train on, 100 held out",
        "| empty rejected | 3 |",
        "| loss | 0.9000 | 0.5000 |",
        "longer one in 60% of the pairs",
        "7 responses lost their end at 2,048 tokens",
        "2 held-out prompts stand in the training pairs too",
    ):
        assert said in text, said
    text = read(make_run(tmp_path, "loss.completion_only_loss=true", "loss.nll_reduction=pair")).text
    assert "| NLL counts | the chosen response; mean over each response, then over pairs |" in text


def test_the_step_that_was_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, "training.load_best_model_at_end=false")
    assert "kept: step 40" in read(run).text
    assert "| loss | 0.9000 | 0.6000 |" in read(run).text
    (run / "result.json").write_text('{"steps": 40, "kept_step": 20}')
    assert "| loss | 0.9000 | 0.5000 |" in read(run).text


def test_without_held_out_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    card = read(run)
    assert "no pairs were held out" in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize("is_merged", [False, True])
def test_the_code_is_code(tmp_path: Path, is_merged: bool) -> None:
    text = read(make_run(tmp_path), Shown(REPO, "original" if is_merged else None)).text
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
    assert "vLLM does not serve this adapter as it is: merge it first." in read(run).text
    assert "vllm serve" not in read(run).text


def test_what_a_merge_measured_of_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "merged").mkdir()
    (run / "merged/config.json").write_text("{}")
    (run / "merged/model.safetensors").write_bytes(b"")
    rows = (Row("base + adapter", 0.5, -0.25, -1.5), Row("merged", 0.75, 0.125, -1.25))
    verdict = Verdict(rows, pairs=1_200, held_out=True, difference=1.26e-6, effect=0.5, bound=1e-4)
    (run / "merged/verify.json").write_text(json.dumps(verdict.to_json()))
    text = read(run, Shown(REPO, merged="original")).text
    assert "| 1,200 held-out pairs | reward accuracy | margin | log-prob of chosen |" in text
    assert "| merged | 75.0% | +0.1250 | -1.2500 |" in text
    assert "passed: mean log-probabilities differ by 1.3e-06 at most" in text
    assert "reward accuracy | margin" not in read(run, Shown(REPO, merged="dequantized")).text
    assert "| merged | 75.0% | +0.1250 | -1.2500 |" in read(run).text


@pytest.mark.parametrize("name", ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "CC-BY-NC-ND-3.0", "x-noncommercial", "x-research-only"])  # fmt: skip  # noqa: E501
def test_data_that_keep_commerce_out_are_named(tmp_path: Path, name: str) -> None:
    assert is_non_commercial(name)
    licences = {"base": {"license": "mit"}, "data": {"lab/pairs": {"license": name}}}
    text = read(make_run(tmp_path, licences=licences)).text
    assert f"**Not for commercial use by its data**: lab/pairs is licensed {name}." in text
    assert f"| {name} |" in text


@pytest.mark.parametrize(
    "name", ["mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "ncsa", "bsl"]
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
    (run / "samples.jsonl").write_text(json.dumps({"prompt": f"my {TOKEN}", "after": "```\n# Title"}) + "\n")
    for merged in (None, "original", "dequantized"):
        text = make_card(run, Shown(REPO, merged, samples=1))
        assert not [word for word in (PRIVATE, "ann", str(tmp_path), TOKEN, "pairs.csv") if word in text]
    assert "an adapter of the trainer's own" in text
    assert "````text\n```\n# Title\n````" in text


def test_what_others_wrote_brings_no_mark_up(tmp_path: Path) -> None:
    said = {"license": "other", "license_name": "a | b\n\n# Title <script> [x](y) `c` ---", "license_link": "x"}
    said = licence_of(said)
    card = read(make_run(tmp_path, licences={"base": said, "data": {"lab/pairs": said}}))
    assert card.data.license_name == said["license_name"]
    assert "\n# Title" not in card.text
    assert "<script>" not in card.text.replace("\\<script\\>", "")


CARDS: list[tuple[str, dict[str, str]]] = [
    ("---\nlicense: mit\n---\nText", {"license": "mit"}),
    ("\ufeff---\r\nlicense: mit\r\n---\r\nText", {"license": "mit"}),
    ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", {"license": "mit, cc-by-4.0"}),
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
def test_the_card_of_a_base_whatever_it_is(text: str, found: dict[str, str]) -> None:
    assert licence_of(split_card(text)[0]) == found


# --- a card that a person changed


def test_a_changed_card_is_told_from_ours(tmp_path: Path) -> None:
    ours = make_card(make_run(tmp_path))
    assert is_own(ours)
    assert not is_own(ours.replace("0.9000", "0.1000"))
    assert not is_own("# Mine")
    assert not is_own(ours + "\nMore.")
    adopted = adopt_card(
        tmp_path, ours.replace("## Limits", f"Mine, {SOMEWHERE}.\n\n## Limits"), Shown(REPO, merged="original")
    )
    card = ModelCard(adopted)
    assert f"Mine, {REPO}." in card.text
    assert card.data.library_name == "transformers"
    assert card.data.eval_results
    assert "<!--" not in adopted


def test_a_changed_card_keeps_the_line_that_its_base_asks_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, licences={"base": {"license": "llama3.2"}, "data": {}})
    ours = make_card(run)
    adopt_card(run, ours + "More.", Shown(REPO))
    with pytest.raises(CheckpointError, match="prominently display “Built with Llama”"):
        adopt_card(run, ours.replace("Built with", "Made of"), Shown(REPO))


# --- what licences ask

LLAMAS = [
    ({"license": "llama2"}, "LLAMA 2", "", ""),
    ({"license": "llama3"}, "Meta Llama 3", "Built with Meta Llama 3", "Llama 3"),
    ({"license": "llama3.1"}, "Llama 3.1", "Built with Llama", "Llama"),
    ({"license": "other", "license_name": "llama-3.2-community"}, "Llama 3.2", "Built with Llama", "Llama"),
    ({"license": "other", "license_name": "llama3_3"}, "Llama 3.3", "Built with Llama", "Llama"),
    ({"license": "llama4"}, "Llama 4", "Built with Llama", "Llama"),
]


@pytest.mark.parametrize(("said", "title", "built_with", "prefix"), LLAMAS)
def test_the_terms_of_llama(tmp_path: Path, said: dict[str, str], title: str, built_with: str, prefix: str) -> None:
    terms = find_terms(said)
    assert terms
    assert (terms.title, terms.built_with, terms.prefix) == (f"{title} Community License", built_with, prefix)
    assert terms.notice.endswith("Meta Platforms, Inc. All Rights Reserved.")
    text = read(make_run(tmp_path, licences={"base": said, "data": {}})).text
    assert (f"**{built_with}**" in text) is bool(built_with)
    assert terms.notice in text


@pytest.mark.parametrize("name", ["mit", "gpl-3.0", "llamafile", "llama", "", "my-llama3"])
def test_what_is_not_llama(name: str) -> None:
    assert find_terms({"license": name}) is None


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
    ],
)
def test_the_name_of_a_derivative(licence_name: str, repository: str, is_fine: bool) -> None:
    if is_fine:
        refuse_name(repository, {"license": licence_name}, "REPO")
        return
    with pytest.raises(RecipeError, match="at the beginning of any such AI model name") as refused:
        refuse_name(repository, {"license": licence_name}, "REPO")
    suggested = refused.value.remedy.removeprefix("a name such as ")
    refuse_name(suggested, {"license": licence_name}, "REPO")


def test_the_papers_of_a_base_go_with_it(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "train.jsonl"):
        (tmp_path / name).write_text(name)
    papers = find_papers({"license": "apache-2.0"}, "base", None, tmp_path)
    assert sorted(papers) == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    papers = find_papers({"license": "gemma"}, "base", None, tmp_path)
    assert papers["NOTICE"] == f"{TERMS['gemma'].notice}\n".encode()
    (tmp_path / "NOTICE").write_text(f"Ours.\n{TERMS['gemma'].notice.replace(' ', '  ')}\n")
    assert find_papers({"license": "gemma"}, "base", None, tmp_path)["NOTICE"] == tmp_path / "NOTICE"
    papers = find_papers({"license": "llama2"}, "base", None, tmp_path)
    assert isinstance(papers["NOTICE"], bytes)
    assert papers["NOTICE"].startswith(b"Ours.\n")
    assert papers["NOTICE"].decode().rstrip().endswith(TERMS["llama2"].notice)


def test_the_agreement_that_a_gated_card_carries_is_the_copy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="provide a copy of this Agreement"):
        find_papers({"license": "llama3.2"}, "base", None, tmp_path)
    agreement = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n" + "word " * 500
    (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump({"extra_gated_prompt": agreement}) + "---\n")
    assert find_papers({"license": "llama3.2"}, "base", None, tmp_path)["LICENSE"] == agreement.encode()
