"""A file of prompts is answered as each grader reads it; a command that was stopped goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, Answer, DemoRun, first_and_long

from orpo_lite import generate
from orpo_lite.api import generate_events
from orpo_lite.errors import DataError, OrpoLiteError, RecipeError
from orpo_lite.evaluation.open_run import OpenRun, open_run
from orpo_lite.model import generate as batches
from orpo_lite.model.generate import Answerer
from orpo_lite.updates import run_to_end

Call = Callable[..., Answer]
Trained = tuple[list[Any], Any]
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [{"instruction": f"Item {i}?", "dataset": "d"} for i in range(3)],
    "mt_bench": [
        {"question_id": 7, "category": "math", "turns": ["One?", "And two?"]},
        {"question_id": 9, "category": "writing", "turns": ["A poem", "Another"]},
    ],
    "ifeval": [
        {"key": 1, "prompt": "Say it\n with \u2028 commas, "},
        {"key": 2, "prompt": "b" * 300},
    ],
    "jsonl": [
        {"prompt": "Hello"},
        {"prompt": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hello"}]},
        {"prompt": "It ends</s> here"},
        {"prompt": "half a character: \ud800"},
    ],
}


NEED_NLTK = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def write_rows(rows: list[dict[str, Any]], name: str = "prompts.jsonl") -> Path:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(name)


def read_rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text("utf-8")
    return json.loads(text) if file.suffix == ".json" else [*map(json.loads, text.split("\n")[:-1])]


def greedy(opened: OpenRun, *turns: str, adapter: bool = True) -> str:
    """The answer to turns of user and assistant, by transformers alone."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    text = opened.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = opened.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    config = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    wrapped: Any = opened.model.model
    with opened.model.evaluating():
        if adapter:
            found = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **config)
        else:
            with wrapped.disable_adapter():
                found = wrapped.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **config
                )
    return str(opened.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_each_grader_reads_its_file_and_the_answers_are_those_of_transformers(
    trained: Trained, call: Call
) -> None:
    run = trained[1].run
    opened = run_to_end(open_run(run), lambda _: None)
    files = {}
    for grader, rows in ROWS.items():
        prompts = write_rows(rows)
        files[grader] = generate(run, prompts, grader=grader, max_new_tokens=6).file
    assert {file.relative_to(run).as_posix() for file in files.values()} == {
        "answers/alpaca_eval.json",
        "answers/mt_bench.jsonl",
        "answers/ifeval.jsonl",
        "answers/jsonl.jsonl",
    }
    assert len([*(run / "answers").glob("[!.]*")]) == 4
    alpaca = read_rows(files["alpaca_eval"])
    assert [row["instruction"] for row in alpaca] == ["Item 0?", "Item 1?", "Item 2?"]
    assert {row["generator"] for row in alpaca} == {"run"}
    first, second = read_rows(files["mt_bench"])
    assert (first["question_id"], second["question_id"], first["model_id"]) == (7, 9, "run")
    assert first["choices"][0]["index"] == 0
    one, two = first["choices"][0]["turns"]
    assert one == greedy(opened, "One?")
    assert two == greedy(opened, "One?", one, "And two?")
    plain, too_long = read_rows(files["ifeval"])
    assert plain["prompt"] == ROWS["ifeval"][0]["prompt"]
    assert plain["response"] == greedy(opened, plain["prompt"])
    assert too_long["response"] == ""
    hello, with_system, special, broken = read_rows(files["jsonl"])
    assert broken["response"] == ""
    assert hello["response"] == greedy(opened, "Hello") != with_system["response"]
    assert special == {"prompt": "It ends</s> here", "response": ""}

    command = ("generate", str(run), "--prompts", str(write_rows(ROWS["jsonl"])))
    code, said, _ = call(*command, "--adapter", "off", "--max-new-tokens", "6")
    assert code == 0
    assert "empty answers: 1 (special token inside the text: </s>)" in said
    assert said.endswith("/s: run/answers/jsonl-base.jsonl\n")
    base = read_rows(run / "answers" / "jsonl-base.jsonl")[0]["response"]
    assert base == greedy(opened, "Hello", adapter=False) != hello["response"]
    code, said, _ = call(*command, "--adapter", "off", "--max-new-tokens", "6")
    assert (code, "jsonl-base.jsonl has all answers already" in said) == (0, True)
    code, _, complaint = call(*command, "--temperature", "1", "--max-new-tokens", "6")
    assert code == 2
    assert "exists already, with other temperature" in complaint
    assert "fix: --to run/answers/jsonl-2.jsonl, or remove run/answers/jsonl.jsonl" in complaint


@pytest.mark.parametrize("cut", first_and_long([20, 0]))  # characters of the last line
def test_a_stopped_command_goes_on_and_gives_the_same_file(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    run = trained[1].run
    monkeypatch.setattr(batches, "ROWS", 2)
    rows = [
        {"question_id": i, "category": "writing" if i % 2 else "", "turns": ["x" * i, "And?"]}
        for i in range(1, 6)
    ]
    prompts = write_rows(rows)
    options: dict[str, Any] = {"grader": "mt_bench", "max_new_tokens": 5}
    whole = read_rows(generate(run, prompts, to="whole.jsonl", **options).file)
    updates = generate_events(run, prompts, to="stopped.jsonl", **options)
    while next(updates).step < 7:  # the second turn has begun
        pass
    updates.close()
    progress = Path(".stopped.jsonl.progress")
    progress.write_text(progress.read_text()[: -cut or None])
    assert not Path("stopped.jsonl").exists()
    with pytest.raises(
        RecipeError, match="begun this file, with other max_new_tokens and temperature"
    ):
        generate(run, prompts, to="stopped.jsonl", grader="mt_bench", temperature=1)
    answered, answer = list[int](), Answerer._answer_batch
    monkeypatch.setattr(
        Answerer,
        "_answer_batch",
        lambda self, found, *rest: answered.extend(found) or answer(self, found, *rest),
    )
    found = read_rows(generate(run, prompts, to="stopped.jsonl", **options).file)
    assert len(progress.read_text().splitlines()) == 1
    # The questions with sampled and with greedy answers are apart, in batches of two.
    assert len(answered) == (5 if cut else 3)
    for one, other in zip(found, whole, strict=True):
        assert one["choices"] == other["choices"]


def test_wrong_prompts_are_said_before_weights_are_loaded(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained[1].run
    monkeypatch.setattr("orpo_lite.evaluation.answers.load_model", None)

    def refused(kind: type[OrpoLiteError], rows: list[dict[str, Any]], **options: Any) -> str:
        with pytest.raises(kind) as raised:
            generate(options.pop("run", run), write_rows(rows), **options)
        return str(raised.value)

    said = refused(DataError, [{"prompt": "a"}, {"turns": []}, {"prompt": [{"role": "user"}]}])
    assert "prompts.jsonl:2" in said
    assert "prompts.jsonl:3" in said
    assert "--for mt_bench" in refused(DataError, ROWS["mt_bench"], grader="jsonl")
    assert "has no rows" in refused(DataError, [])
    assert "0.7" in refused(RecipeError, ROWS["jsonl"], temperature=-1)
    assert "--to answers.jsonl" in refused(RecipeError, ROWS["jsonl"], run="base")
    with pytest.raises(DataError, match="no such file"):
        generate(run, "nowhere.jsonl")
    assert "question_id occur twice" in refused(DataError, ROWS["mt_bench"] * 2, grader="mt_bench")
    said = refused(RecipeError, ROWS["jsonl"], run="base", adapter=False, to="a.jsonl")
    assert "base has no adapter to switch off" in said
    for to, found in (("prompts.jsonl", "exists already"), ("run", "is a folder")):
        said = refused(RecipeError, ROWS["jsonl"], to=to)
        assert found in said
        assert "or remove" not in said  # it is not this command's file
    Path("latin.jsonl").write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"then --prompts latin\.utf8\.jsonl"):
        generate(run, "latin.jsonl")


@pytest.mark.real
@pytest.mark.long
def test_the_checkers_of_ifeval_read_the_answers(demo_run: DemoRun, tmp_path: Path) -> None:
    """Those of lm-eval, except two that need data of NLTK, which needs a network."""
    checkers = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    prompts = SHARED / "data" / "ifeval-input.jsonl"
    options: dict[str, Any] = {"grader": "ifeval", "max_new_tokens": 24}
    file = generate(demo_run.run, prompts, to=tmp_path / "answers.jsonl", **options).file
    responses = {row["prompt"]: row["response"] for row in read_rows(file)}
    followed, checked = list[bool](), set[str]()
    for row in read_rows(prompts):
        named = zip(row["instruction_id_list"], row["kwargs"], strict=True)
        kept = [(name, values) for name, values in named if name not in NEED_NLTK]
        names, values = [name for name, _ in kept], [found for _, found in kept]
        row |= {"instruction_id_list": names, "kwargs": values}
        found = checkers.process_results(row, [responses[row["prompt"]]])
        followed += found["inst_level_strict_acc"]
        checked |= {*names}
    assert len(checked) == 25 - len(NEED_NLTK)  # kinds of instructions in IFEval
    assert 0 < sum(followed) < len(followed)
