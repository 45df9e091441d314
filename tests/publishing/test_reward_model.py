"""The card of a reward model: what it says, and that its code gives the rewards of the training."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, write_base, write_pairs
from hub_server import COMMIT, NAME, TOKEN, Hub
from test_model_card import make_run
from tokenizers import processors
from transformers import GPT2Config, GPT2LMHeadModel

from orpo_lite.api import train
from orpo_lite.errors import CheckpointError
from orpo_lite.evaluation.verify import REWARDS, Row, Verdict
from orpo_lite.merging.merge import merge
from orpo_lite.publishing.card_facts import CardOptions
from orpo_lite.publishing.model_card import make_card
from orpo_lite.publishing.push import check_push, push
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.commands import Weights
from orpo_lite.runs.records import read_json, read_scores

REPO = "someone/judge"
CANARY, CANARY_PATH = "xylophone-canary", "canary-folder"
PAIRS = 6  # held out
# It writes a line end after the token that ends a reply, like most templates.
TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
KWARGS = {"enable_thinking": False, "style": "it's"}  # of the chat template


def trained_run(folder: Path, *overrides: str) -> Path:
    """Train and merge a reward model of ``folder / "base"``. Its data and paths have canaries."""
    for name, count in (("train", 24), ("held-out", PAIRS)):
        file = write_pairs(folder / f"{name}.jsonl", count, seed=count)
        file.write_text(file.read_text().replace("It is", CANARY))
    (folder / "small.yaml").write_text(
        f"model:\n  model_name_or_path: {folder}/base\nquantization:\n  load_in_4bit: false\n"
        f"data:\n  dataset_name: {folder}/train.jsonl\n"
        f"  dataset_test_split: {folder}/held-out.jsonl\n"
        "  max_length: 128\n  max_prompt_length: 96\nloss:\n  type: reward\n"
        f"training:\n  output_dir: {folder}/run\n  global_batch_size: 8\n  eval_steps: 0.5\n"
        "  learning_rate: 1e-2\noutput:\n  samples: 0\n  report: false\n"
    )
    return merge(train(load_recipe(str(folder / "small.yaml"), overrides)).run).folder.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a chat template. Only the tokenizer of its base names a pad token."""
    folder = tmp_path_factory.mktemp(CANARY_PATH)
    write_base(folder / "base")
    config = read_json(folder / "base" / "config.json")
    (folder / "base" / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    settings = {"chat_template": TEMPLATE, "chat_template_kwargs": json.dumps(KWARGS)}
    return trained_run(folder, *(f"data.{key}={value}" for key, value in settings.items()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a GPT-2 on plain texts; as in GPT-2, one token is bos and eos, and none is pad."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.bos_token, tokenizer.pad_token = tokenizer.eos_token, None
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    config = GPT2Config(**size, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=2)
    write_base(folder / "base", GPT2LMHeadModel(config))
    tokenizer.save_pretrained(folder / "base")
    return trained_run(folder, "data.chat_template=none")


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / CANARY_PATH / "run"))


def kept_rewards(run: Path) -> torch.Tensor:
    """The rewards that the training computed with the kept adapter: all chosen, all rejected."""
    kept = read_json(run / "result.json")["kept_step"]
    (row,) = [row for row in read_scores(run) if row["step"] == kept]
    return torch.tensor([*row["chosen"], *row["rejected"]])


def rewards_by_card(run: Path, merged: Weights | None, texts: list[tuple[str, str]]) -> Any:
    """Run the Python code of a card on prompts with replies; return what it calls rewards."""
    block = re.search(
        r"```python\n(.*?)\n```", make_card(run, CardOptions(merged=merged)), re.DOTALL
    )
    assert block
    folder = run / ("merged" if merged else "adapter")
    code = block[1].replace("OWNER/NAME", str(folder))
    code = code.replace('"BASE"', repr(read_json(run / "lock.json")["base"]["path"]))
    if "conversations = [" in code:
        roles = ("user", "assistant")
        turns = [
            [{"role": role, "content": text} for role, text in zip(roles, both, strict=True)]
            for both in texts
        ]
        code, count = re.subn(
            r"conversations = \[.*?\n\]",
            lambda _: f"conversations = {turns!r}",
            code,
            flags=re.DOTALL,
        )
    else:
        joined = [prompt + reply for prompt, reply in texts]
        code, count = re.subn(r"\ntexts = \[.*\]", lambda _: f"\ntexts = {joined!r}", code, count=1)
    assert count == 1
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own code
    return torch.tensor(names["rewards"])


def held_out(run: Path) -> list[tuple[str, str]]:
    """Prompts with replies: of all pairs the chosen ones, then the rejected ones."""
    rows = [json.loads(line) for line in (run.parent / "held-out.jsonl").read_text().splitlines()]
    return [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]


@pytest.mark.parametrize("merged", [None, "original"])
def test_the_code_gives_the_rewards_of_the_training(finished: Path, merged: Weights | None) -> None:
    found = rewards_by_card(finished, merged, held_out(finished))
    wanted = kept_rewards(finished)
    assert wanted.std() > 0.05
    assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("merged", [None, "original"])
def test_without_a_chat_template_and_without_a_pad_token(
    plain: Path, merged: Weights | None
) -> None:
    found = rewards_by_card(plain, merged, held_out(plain))
    assert (found - kept_rewards(plain)).abs().max() < 1e-5


@pytest.mark.parametrize("merged", [None, "original"])
def test_every_part_of_the_card_is_of_a_reward_model(a_run: Path, merged: Weights | None) -> None:
    rows = (Row("base + adapter", 0.5, -0.25, -1.5), Row("merged", 0.75, 0.125, -1.25))
    verdict = Verdict(
        REWARDS, rows, pairs=6, held_out=True, difference=1e-6, effect=0.5, bound=1e-4
    )
    (a_run / "merged" / "verify.json").write_text(json.dumps(verdict.to_json()))
    sample = {"source": "neutral", "prompt": "Why?", "before": "no", "after": "yes"}
    (a_run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    card = make_card(a_run, CardOptions(REPO, merged))
    data = yaml.safe_load(card.split("---")[1])
    assert data["pipeline_tag"] == "text-classification"
    assert data["tags"] == ["reward", "reward-model", "orpo-lite", *([] if merged else ["lora"])]
    assert ("--runner pooling" in card) is (merged is not None)
    for said in (
        "# judge\n",
        "It is a reward model: it gives a reply one number",
        "| mean reward, chosen |",
        "| 6 held-out pairs | reward accuracy | margin | reward of chosen |",
        "passed: rewards differ by at most 1e-06",
        "Only rewards of replies to the same prompt can be compared",
        "writes nothing after the token that ends a reply",
    ):
        assert said in card, said
    for word in ("CausalLM", "Ollama", "log-prob", "## Samples", "loss.beta", "NLL", "answers are"):
        assert word not in card, word
    assert "# Reward model\n" in make_card(a_run)


def test_results_of_data_on_the_hub_are_of_the_same_task(tmp_path: Path) -> None:
    card = make_card(make_run(tmp_path, "loss.type=reward"), CardOptions(REPO))
    (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
    (result,) = model["results"]
    assert result["task"]["type"] == "text-classification"
    assert {metric["type"] for metric in result["metrics"]} == {"accuracy", "loss"}


def test_the_request_for_vllm_has_the_settings_of_the_chat_template(finished: Path) -> None:
    card = make_card(finished, CardOptions(REPO, "original"))
    body = re.search(r"-d '(.*?)'\n```", card, re.DOTALL)
    assert body
    request = json.loads(body[1])
    assert request["chat_template_kwargs"] == KWARGS
    assert (request["model"], request["use_activation"]) == (REPO, False)
    assert [turn["role"] for turn in request["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("merged", [None, "original"])
def test_a_push_sends_a_reward_model_and_nothing_private(
    a_run: Path, hub: Hub, merged: Weights | None
) -> None:
    result = push(a_run, REPO, merged=merged)
    files = hub.written[REPO].files
    assert set(files) == set(result.files)
    card = files["README.md"].decode()
    assert "pipeline_tag: text-classification" in card
    if merged:
        assert json.loads(files["config.json"])["architectures"] == [
            "LlamaForSequenceClassification"
        ]
    else:
        assert json.loads(files["adapter_config.json"])["task_type"] == "SEQ_CLS"
    sent = [*hub.bodies, *files.values(), *(line.encode() for line in hub.requests)]
    for word in (CANARY, CANARY_PATH, str(Path.home()) + "/", TOKEN):
        assert not [body[:200] for body in sent if word.encode() in body], word


def test_a_base_of_the_hub_is_loaded_at_its_revision(a_run: Path, hub: Hub) -> None:
    lock = read_json(a_run / "lock.json")
    lock["base"] |= {"name": NAME, "revision": COMMIT}
    (a_run / "lock.json").write_text(json.dumps(lock))
    push(a_run, REPO)
    card = hub.written[REPO].files["README.md"].decode()
    assert f'from_pretrained("{NAME}", revision="{COMMIT}", num_labels=1' in card.replace(
        "\n    ", ""
    )


def test_answers_of_a_reward_model_cannot_be_shown(a_run: Path, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="writes no answers"):
        push(a_run, REPO, samples=1)
    assert not hub.written


def test_a_push_of_a_reward_model_is_checked_before_the_training(finished: Path, hub: Hub) -> None:
    file = str(finished.parent / "small.yaml")
    wanted = ["output.push_to_hub=true", f"output.hub_model_id={REPO}"]
    assert len(list(check_push(load_recipe(file, wanted), resume=False))) == 1
