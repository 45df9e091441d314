"""The comparison from end to end on tiny models: its folder, its table, a stop anywhere, its refusals."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Answer, byte_tokenizer, tiny_opt, write_base, write_pairs

from orpo_lite.base.find import load_tokenizer
from orpo_lite.comparing import split
from orpo_lite.comparing.answers import reply_tokens
from orpo_lite.comparing.arms import ARMS, arm_recipe, choose_arms, read_words
from orpo_lite.comparing.compare import compare_events
from orpo_lite.comparing.cost import sequences_of
from orpo_lite.comparing.task import Task, prepare_task, record
from orpo_lite.data.dataset import PromptTokenizer
from orpo_lite.data.pair import Pair
from orpo_lite.data.pairs import PairReader
from orpo_lite.data.prepare import find_sources
from orpo_lite.data.split import prompt_key
from orpo_lite.errors import ModelError, RecipeError
from orpo_lite.model.pair_model import PairModel
from orpo_lite.recipe.reader import load_recipe
from orpo_lite.runs.lock import read_recipe
from orpo_lite.updates import Update

ARGUMENTS: dict[str, Any] = {
    # Without packing no training begins with a probe of the model, which takes most of the time.
    "settings": [
        "training.max_steps=2",
        "output.samples=0",
        "memory.packing=false",
        "judge:model.model_name_or_path=./judge-base",
    ],
    "arms": "sft,dpo",
    "rounds": 2,
    "max_new_tokens": 8,
}
COMMAND = ["compare", "--recipe", "./small.yaml", *ARGUMENTS["settings"]]
COMMAND += ["--arms", "sft,dpo", "--rounds", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, 40 pairs and a recipe; the current folder of these tests."""
    path = tmp_path_factory.mktemp("comparing")
    write_base(path / "base")
    write_base(path / "judge-base", tiny_opt(len(byte_tokenizer())))
    write_pairs(path / "pairs.jsonl", 40)
    (path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def compared(folder: Path) -> tuple[Path, list[Update], int]:
    """A finished comparison; its updates, and the sequences that went through models in training."""
    sequences = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal sequences
        if isinstance(module, PairModel) and torch.is_grad_enabled():
            sequences += len(inputs[0].input_ids_RT)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        updates = [*compare_events("./small.yaml", **ARGUMENTS)]
    hook.remove()
    return folder / "run-compare", updates, sequences


def begun(compared: Path, arguments: dict[str, Any], *finished: str) -> Task:
    """A comparison whose judge and sft are those of another one, as are the finished files."""
    given = {key: value for key, value in arguments.items() if key != "settings"}
    task = prepare_task("./small.yaml", arguments["settings"], seeds=1, prompts=None, **given)
    record(task)
    for name in ("data", "runs/judge", "runs/sft-seed42"):
        shutil.copytree(compared / name, task.folder / name)
    for file in (file for pattern in finished for file in compared.glob(pattern)):
        copy = task.folder / file.relative_to(compared)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    return task


def table(path: Path) -> dict[str, Any]:
    """The result without what a clock and a memory meter measure, and without the folder."""
    found = json.loads((path / "result.json").read_text("utf-8"))
    measured = ("seconds", "before_seconds", "memory_gib")
    for arm in found["arms"]:
        arm["cost"] = {key: value for key, value in arm["cost"].items() if key not in measured}
    return {key: value for key, value in found.items() if key != "folder"}


# --- the whole command


def test_a_comparison_has_a_table_a_report_and_ordinary_runs(
    compared: tuple[Path, list[Update], int], call: Callable[..., Answer]
) -> None:
    path, _, _ = compared
    assert {file.name for file in (path / "runs").iterdir()} == {"judge", "sft-seed42", "dpo-seed42"}  # fmt: skip
    code, printed, _ = call(*COMMAND)  # everything is there: only the table is made again
    assert code == 0
    rate = json.loads((path / "result.json").read_text("utf-8"))["wins"][0]["rate"]["value"]
    assert f"dpo against sft  {100 * rate:.1f}" in printed
    assert printed.splitlines()[-1] == "wrote run-compare/compare.html; open it in a browser"
    bases = [Path(read_recipe(path / "runs" / name).model.model_name_or_path).name for name in ("judge", "dpo-seed42")]  # fmt: skip
    assert bases == ["judge-base", "base"]
    found = table(path)  # twenty pairs are too few to trust a judge
    assert found["judge"]["pairs"] == 20  # of test and arms
    assert (found["judge"]["training"]["pairs"], found["reward_models"]) == (15, [])
    assert (found["judge"]["is_trusted"], found["winner"]) == (False, None)
    assert {win["outcome"] for win in found["wins"]} == {"cannot tell"}
    page = (path / "compare.html").read_text("utf-8")
    shown = re.sub(r"<[^>]+>", "", page)
    assert f"{rate:.1%}" in shown
    settings = re.findall(r'<th scope="row">(\w+\.\w+)</th>(.*)</tr>', page)
    assert "training.learning_rate" in dict(settings)
    # dpo spells out the modules of its adapter, and the default beta is that of dpo alone
    assert not {"lora.target_modules", "loss.beta"} & {*dict(settings)}
    assert not re.findall(r"<script|https?://(?!www\.w3\.org)", page)
    code, printed, _ = call("report", str(path / "runs" / "dpo-seed42"), "--to", "dpo.html")
    assert code == 0


def test_dpo_starts_from_the_adapter_of_sft_and_costs_a_reference_pass(
    compared: tuple[Path, list[Update], int],
) -> None:
    path, _, sequences = compared
    runs = path / "runs"
    copied, original = (
        (runs / name / "adapter_model.safetensors").read_bytes()
        for name in ("dpo-seed42/initial_adapter", "sft-seed42/adapter")
    )
    assert copied == original
    costs = [arm["cost"] for arm in table(path)["arms"]]
    of_arms = [(c["trained_sequences"], c["reference_sequences"], c["pairs"]) for c in costs]
    assert of_arms == [(1, 0, 15), (2, 2, 15)]  # an epoch of 15 pairs in two steps
    of_judge = 2 * 15
    assert sequences == sum(trained * pairs for trained, _, pairs in of_arms) + of_judge


@pytest.mark.long
def test_a_comparison_that_is_stopped_three_times_ends_with_the_same_table(
    compared: tuple[Path, list[Update], int], tmp_path: Path
) -> None:
    """A command that stops at an update leaves the same files as one that is killed there."""
    arguments = ARGUMENTS | {"out": tmp_path / "stopped"}
    begun(compared[0], arguments)
    for place in ("training dpo-seed42", "sampling answers", "judging answers"):
        updates = compare_events("./small.yaml", **arguments)
        for update in updates:
            if update.text.startswith(place) and update.step > 0:
                break
        else:
            pytest.fail(f"never came to {place}")
        updates.close()
        assert not (tmp_path / "stopped" / "result.json").exists()
    assert (tmp_path / "stopped" / "answers" / "sft-seed42-round2.jsonl").exists()
    list(compare_events("./small.yaml", **arguments))
    assert table(tmp_path / "stopped") == table(compared[0])


def test_ppo_is_reported_with_its_reward_model(
    compared: tuple[Path, list[Update], int], tmp_path: Path
) -> None:
    """A training of one step keeps step 0, because the warm-up begins with a rate of 0."""
    words = [*ARGUMENTS["settings"], "ppo:training.max_steps=1", "reward:training.max_steps=1"]
    arguments = ARGUMENTS | {"settings": words, "arms": "sft,ppo", "out": tmp_path / "ppo"}
    task = begun(compared[0], arguments, "answers/sft-*", "rewards/sft-*", "rewards/judge.json")
    list(compare_events("./small.yaml", **arguments))
    found = table(task.folder)
    (model,) = found["reward_models"]
    metrics = (task.folder / "runs/reward-seed42/metrics.jsonl").read_text("utf-8").splitlines()
    assert model["accuracy"] == json.loads(metrics[0])["eval_accuracy"]
    assert (model["kept_step"], model["steps"], model["pairs"]) == (0, 1, 15)
    assert "ppo kept step 0: its answers are those of sft" in found["verdict"]
    assert f"ranks {model['accuracy']:.1%} of {model['validation_pairs']} validation pairs" in found["verdict"][-1]  # fmt: skip
    assert "reward-seed42 kept step 0, so it is untrained" in found["verdict"][-1]
    page = (task.folder / "compare.html").read_text("utf-8")
    assert '<th scope="col">reward model of ppo</th>' in page
    rows = dict(re.findall(r'<th scope="row">(loss\.\w+)</th>(.*)</tr>', page))
    assert rows["loss.response_length"] == "<td>–</td><td>–</td><td>–</td><td>8</td>"


@pytest.mark.long
def test_a_comparison_that_is_killed_in_each_part_ends_with_the_same_table(
    compared: tuple[Path, list[Update], int],
) -> None:
    """The process gets SIGKILL after the first file of each part, and at times in between."""
    command = [sys.executable, "-m", "orpo_lite", *COMMAND, "--out", "killed"]
    folder = Path("killed")
    for part, pattern in enumerate(["runs/judge/recipe.yaml", "runs/sft-*/result.json",
                                    "answers/sft-*", "answers/dpo-*", "rewards/sft-*", "rewards/*dpo-*"]):  # fmt: skip
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while running.poll() is None and not any(folder.glob(pattern)):
            time.sleep(0.002)
        time.sleep(0.05 * part)
        running.kill()
        running.wait()
        assert any(folder.glob(pattern)), pattern
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert table(folder) == table(compared[0])


def test_other_arguments_are_refused_with_what_differs(
    compared: tuple[Path, list[Update], int], call: Callable[..., Answer]
) -> None:
    code, _, complaint = call(*COMMAND, "--rounds", "3", "dpo:loss.beta=0.2")
    assert code == RecipeError.exit_code
    assert "--rounds: 2 -> 3; dpo:loss.beta: 0.1 -> 0.2" in complaint
    assert "fix: --out run-compare-2" in complaint


# --- the data


def test_the_parts_are_disjoint_and_read_as_the_recipe_reads_them(tmp_path: Path) -> None:
    rows = []
    for n in range(60):
        turns = [{"role": "system", "content": "Be  kind."}, {"role": "user", "content": f" q {n // 2}\n"}]  # fmt: skip
        replies = (f'{{"a": {n}}}', f" spaced {n} ☃")
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (turns, *([{"role": "assistant", "content": r}] for r in replies)), strict=True)))  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    plain = [{"prompt": f"Q: {n}\nA:", "chosen": " yes", "rejected": f" [{n}]"} for n in range(30)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain), "utf-8")
    for name, template in (("p", "auto"), ("q", "none")):
        recipe = load_recipe(
            "./small.yaml",
            [f"data.dataset_name={tmp_path}/{name}.jsonl", f"data.chat_template={template}"],
        )
        parts = finish(split.read_parts(recipe, None))
        split.write_parts(parts, tmp_path / name, recipe.data)
        found = {part: split.read_part(recipe, tmp_path / name, part) for part in split.PARTS}
        pairs = [pair for part in found.values() for pair in part]
        asked = [*PairReader(recipe.data, find_sources(recipe.data)[0])]
        assert sorted(map(as_read, pairs)) == sorted(map(as_read, asked))
        prompts = [{prompt_key(pair) for pair in part} for part in found.values()]
        assert sum(map(len, prompts)) == len(set.union(*prompts)) == 30
        assert all(prompts)


def test_a_held_out_dataset_is_answered_and_its_prompts_are_never_trained_on(
    tmp_path: Path,
) -> None:
    for name, first in (("train", 0), ("test", 20)):  # prompts 20 to 39 are in both
        rows = [{"prompt": f"Q {n}?", "chosen": f"{name} yes", "rejected": "no"} for n in range(first, first + 40)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.dataset_name={tmp_path}/train.jsonl", f"data.dataset_test_split={tmp_path}/test.jsonl"]  # fmt: skip
    parts = finish(split.read_parts(load_recipe("./small.yaml", settings), 30))
    asked = {part: {pair.messages[0]["content"] for pair in pairs} for part, pairs in parts.items()}
    assert {pair.chosen for pair in (*parts["test"], *parts["validation"])} == {"test yes"}
    assert len(asked["test"]) == 30
    assert asked["test"] | asked["validation"] == {f"Q {n}?" for n in range(20, 60)}
    assert asked["arms"] | asked["judge"] == {f"Q {n}?" for n in range(20)}
    assert len(parts["arms"]) == len(parts["judge"]) == 10


def as_read(pair: Pair) -> str:
    """What a training reads of a pair. The prompt's plain text matters only without a template."""
    plain = pair.prompt_text if str(pair.prompt_text).startswith("Q:") else None
    return json.dumps([pair.messages, pair.chosen, pair.rejected, plain])


def finish(updates: Iterator[Any]) -> Any:
    while True:
        try:
            next(updates)
        except StopIteration as end:
            return end.value


def test_too_few_prompts_are_refused_and_nothing_is_written(call: Callable[..., Answer]) -> None:
    code, _, complaint = call(*COMMAND, "--prompts", "30", "--out", "few")
    assert code == 3
    assert "40 different prompts, too few for 30" in complaint
    assert "expected: 120 or more" in complaint
    assert "fix: --prompts 5" in complaint
    assert not Path("few").exists()
    code, _, complaint = call(*COMMAND, "data.max_samples=9", "--out", "few")
    assert "9 different prompts, too few for a comparison\n  expected: 10 or more" in complaint
    short = ["data.max_length=16", "data.max_prompt_length=12"]
    code, _, complaint = call(*COMMAND, *short, "--out", "few")
    assert code == 3
    assert "fix: raise data.max_length and data.max_prompt_length" in complaint
    assert not Path("few").exists()


def test_an_empty_answer_is_scored_like_any_other() -> None:
    recipe, tokenizer = load_recipe("./small.yaml"), load_tokenizer(Path("base"))
    asked = ({"role": "user", "content": "How?"},)
    replies = ("So.", "", "\ud800")
    with PromptTokenizer(recipe.data, tokenizer) as prompts:
        found = reply_tokens(prompts, [Pair(asked, reply, "", "") for reply in replies])
        (prompt,) = prompts.ids([asked])
    assert found[2] is None
    texts = [tokenizer.decode(one.chosen_ids[len(prompt) :]) for one in found[:2] if one]
    assert texts == ["So.</s>", "</s>"]
    assert [list(one.chosen_ids[: one.chosen_start]) for one in found[:2] if one] == [prompt] * 2
    assert not any(one.rejected_ids for one in found[:2] if one)


# --- arms and their settings


def test_each_arm_has_the_settings_of_its_loss_and_what_a_person_gives() -> None:
    arms = choose_arms("sft,sft-equal-epochs,orpo,dpo,simpo,cpo")
    words = read_words(["training.num_train_epochs=4", "dpo:loss.beta=0.3", "judge:loss.center_rewards_coefficient=0.01"], arms)  # fmt: skip
    recipes = {arm.name: arm_recipe("opt-125m", words, arm, 7) for arm in arms}
    epochs = [recipe.training.num_train_epochs for recipe in recipes.values()]
    assert epochs == [1, 4, 4, 4, 4, 4]
    betas = {name: recipe.loss.beta for name, recipe in recipes.items()}
    assert betas | {"sft": 0, "sft-equal-epochs": 0} == {
        "sft": 0, "sft-equal-epochs": 0, "orpo": 1.0, "dpo": 0.3, "simpo": 2.0, "cpo": 0.1
    }  # fmt: skip
    rates = {name: recipe.training.learning_rate for name, recipe in recipes.items()}
    assert (rates["orpo"], rates["dpo"]) == (8e-5, 8e-6)
    own = read_words(["training.learning_rate=3e-5"], arms)
    assert arm_recipe("opt-125m", own, ARMS["dpo"], 7).training.learning_rate == 3e-5
    assert all(recipe.training.seed == 7 for recipe in recipes.values())
    assert sequences_of(recipes["simpo"]) == (2, 0)


def test_ppo_reads_a_reward_model_that_never_saw_the_data_of_the_judge() -> None:
    task = prepare_task("demo", ["reward:training.max_steps=9"], arms="orpo,ppo", seeds=2, rounds=1,
                        prompts=None, max_new_tokens=8, out="ppo")  # fmt: skip
    names = [run.name for run in task.runs]
    assert names == ["judge", *(f"{arm}-seed{seed}" for arm in ("sft", "reward", "orpo", "ppo") for seed in (42, 43))]  # fmt: skip
    recipes = {run.name: task.run_recipe(run, "base", 100) for run in task.runs}
    data = {name: Path(recipe.data.names[0]).stem for name, recipe in recipes.items()}
    assert (data["judge"], data["reward-seed43"], data["ppo-seed43"]) == ("judge", "arms", "arms")
    ppo = recipes["ppo-seed43"]
    read = (ppo.model.adapter_name_or_path, ppo.loss.reward_adapter_name_or_path)
    assert [Path(name or "").parent.name for name in read] == ["sft-seed43", "reward-seed43"]
    assert recipes["reward-seed42"].training.max_steps == 9
    assert ppo.loss.response_length == 8


def test_limits_that_no_person_set_are_those_that_fit() -> None:
    """PPO's answers fit in max_length, and the judge's limit in the 256 positions of its base."""
    words = ["data.max_length=400", "data.max_prompt_length=280"]
    words += ["judge:model.model_name_or_path=./judge-base"]
    task = prepare_task("./small.yaml", words, arms="sft,ppo", seeds=1, rounds=1, prompts=None,
                        max_new_tokens=128, out="limits")  # fmt: skip
    recipes = {run.name: task.run_recipe(run, "base", 100) for run in task.runs}
    assert recipes["ppo-seed42"].loss.response_length == 400 - 280
    limits = {name: (found.data.max_length, found.data.prompt_limit) for name, found in recipes.items()}  # fmt: skip
    assert limits["judge"] == (256, 128)
    assert {*limits.values()} == {(256, 128), (400, 280)}
    assert not task.folder.exists()


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["--arms", "sft,ppq"], "'ppq' is not an arm", "--arms sft"),
        (["--arms", "sft"], "fewer than two arms", "--arms sft,orpo"),
        (["--arms", "sft,orpo,sft"], "names an arm twice", "--arms sft,orpo"),
        (["kto:loss.beta=1"], "kto is not an arm of this comparison", "orpo:loss.beta=1"),
        (["kto:lora.r=8"], "kto is not an arm of this comparison", "lora.r=8 sets"),
        (["orpo:training.max_steps"], "has no value", "orpo:training.max_steps=VALUE"),
        (
            ["--arms", "sft,ppo", "orpo:loss.beta=3"],
            "orpo is not an arm",
            "--arms sft,ppo,orpo, or leave the word out",
        ),
        (
            ["--arms", "sft,ppo", "loss.beta=3"],
            "no arm of this comparison uses",
            "leave the word out",
        ),
        (
            ["--arms", "sft,dpo", "loss.beta=3"],
            "this key differs between losses",
            "dpo:loss.beta=3",
        ),
        (
            ["--arms", "sft,ppo", "ppo:loss.response_length=99"],
            "ppo: command line: loss.response_length is 99",
            "ppo:loss.response_length=32",
        ),
        (
            ["judge:model.model_name_or_path=./judge-base", "judge:data.max_length=300"],
            "has 256 positions",
            "judge:data.max_length=256",
        ),
        (["loss.beta=1"], "this key differs between losses", "orpo:loss.beta=1"),
        (["loss.type=dpo"], "--arms chooses the losses", "--arms dpo"),
        (["dpo:data.max_length=9"], "only for dpo", "data.max_length=9 sets it for all arms"),
        (["dpo:loss.simpo_gamma=1"], "no effect on loss.type dpo", "simpo:loss.simpo_gamma=1"),
        (["--rounds", "0"], "0", "--rounds 1"),
        (["--out", "base"], "exists and is not a comparison", "--out base-2"),
    ],
)
def test_a_wrong_argument_is_refused_with_a_fix(
    words: list[str], found: str, fix: str, call: Callable[..., Answer]
) -> None:
    code, _, complaint = call("compare", "--recipe", "./small.yaml", *words)
    assert code == 2
    assert found in complaint
    assert f"fix: {fix}" in complaint


def test_an_arm_that_this_version_cannot_train_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARMS, "new", ARMS["orpo"].__class__("new", "not yet"))
    with pytest.raises(RecipeError, match="this version cannot train new"):
        choose_arms("sft,new")


def test_a_training_that_fails_names_its_arm(tmp_path: Path) -> None:
    settings = [*ARGUMENTS["settings"], "judge:lora.target_modules=nothing"]
    with pytest.raises(ModelError, match="judge: command line: lora") as raised:
        list(compare_events("./small.yaml", settings, arms="sft,orpo", out=tmp_path / "wrong"))
    assert raised.value.fix == "judge:lora.target_modules=all-linear"
    missing = "judge:model.model_name_or_path=./absent"
    with pytest.raises(ModelError, match="no such folder") as raised:
        list(compare_events("./small.yaml", [missing], arms="sft,orpo", out=tmp_path / "missing"))
    assert raised.value.fix.startswith(f"leave out {missing}, so")
    assert not (tmp_path / "missing").exists()


@pytest.mark.long
def test_the_demo_ends_in_a_report(
    call: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, complaint = call("compare", "--recipe", "demo")
    assert code == 0, complaint
    assert "the judge ranks 100.0%" in printed
    assert printed.splitlines()[-1].startswith("wrote runs/demo-compare/compare.html")
    assert len(table(tmp_path / "runs" / "demo-compare")["wins"]) == 6
