"""`orpo-lite data`: what it shows of a set, to a person and to a program, and what it needs for
it."""

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, byte_tokenizer
from rich.console import Console

from orpo_lite.cli import data_view
from orpo_lite.cli.data_view import print_pair, visible
from orpo_lite.data.formats.column_map import DETECTION_ROWS

MAP = "data.column_map=prompt=question,chosen=good_answer,rejected=bad_answer"
COFFEE = [
    (
        "How hot should the water be?",
        "Just off the boil.",
        "Boiling, always. Never measure anything.",
    ),
    ("Which grind, for a French press?", "Coarse, like sea salt.", "Fine."),
    ("How long does it brew?", "Four minutes.", "Until it tastes burnt, then a bit more."),
    ("Can I reheat it?", "You can, but it turns bitter:\nbrew less instead.", ""),
    ("Is instant coffee cheating?", "No.", "No."),
]


@pytest.fixture
def coffee(workspace: Path) -> Path:
    """A recipe, a csv with columns of its own, and a base of which only the tokenizer is there."""
    shutil.rmtree(workspace / "base")
    byte_tokenizer().save_pretrained(workspace / "base")
    with (workspace / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "good_answer", "bad_answer"), *COFFEE])
    (workspace / "coffee.yaml").write_text(
        "model:\n  model_name_or_path: ./base\n"
        "data:\n  dataset_name: ./coffee.csv\n  max_length: 64\n  max_prompt_length: 60\n"
    )
    return workspace


Look = Callable[..., Answer]


@pytest.fixture
def look(coffee: Path, call: Look) -> Look:
    """Runs `orpo-lite data` on the csv, its columns named."""
    return lambda *arguments: call("data", "--recipe", "./coffee.yaml", MAP, *arguments)


def test_a_newcomer_with_a_csv_gets_there_by_pasting_what_is_said(coffee: Path, call: Look) -> None:
    table = (coffee / "coffee.csv").read_text(encoding="utf-8")
    (coffee / "coffee.csv").write_text(
        table.replace("bad_answer", "other_answer"), encoding="utf-8"
    )
    code, _, said = call("data", "--recipe", "./coffee.yaml")
    assert code == 3
    (line,) = (word for word in said.split() if word.startswith("data.column_map="))
    assert line == "data.column_map=chosen=good_answer,rejected=other_answer"
    code, shown, said = call("data", "--recipe", "./coffee.yaml", line)
    assert (code, said) == (0, "")
    assert "detected explicit because" in shown
    assert "5 rows: 2 to train on, 1 held out, 2 left out" in shown
    assert "1  empty rejected (coffee.csv:5)" in shown
    assert (
        "1  chosen and rejected are equal (coffee.csv:7)" in shown
    )  # the row before takes two lines
    assert sorted(path.name for path in coffee.iterdir()) == [
        "base",
        "coffee.csv",
        "coffee.yaml",
        "pairs.jsonl",
    ]


def test_the_pair_is_legible_without_colour(look: Look) -> None:
    _, shown, _ = look("data.max_length=80", "data.max_prompt_length=60")
    start = shown.index("one pair, coffee.csv:2, as the model sees it")
    prompt, chosen, rejected = (
        part.partition("\n")[2] for part in shown[start:].split("\n--- ")[1:4]
    )
    assert prompt.rstrip("\n") == "<s><|user|>\nHow hot should the water be?</s>\n<|assistant|>⏎"
    assert chosen == "Just off the boil.[end: </s>]"
    assert (
        rejected.partition("\n\n")[0] == "Boiling, always. Never mea[cut off: sure anything.</s>]"
    )
    assert "\x1b" not in shown


def test_each_kind_of_segment_has_a_colour_on_a_terminal(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(
        force_terminal=True, color_system="standard", highlight=False, markup=False, soft_wrap=True
    )
    with terminal.capture() as captured:
        monkeypatch.setattr(data_view, "out", terminal)
        print_pair(json.loads(json.dumps(SAMPLE)))
    shown = captured.get()
    for text, style in (
        ("Hi", "36"),
        ("Yes", "32"),
        ("[end: </s>]", "1;35"),
        ("[cut off: way.</s>]", "31"),
    ):
        assert f"\x1b[{style}m{text}" in shown, text


SAMPLE: dict[str, Any] = {
    "where": "x:1",
    "chosen": [
        {"kind": "prompt", "text": "Hi"},
        {"kind": "response", "text": "Yes"},
        {"kind": "end", "text": "</s>"},
    ],
    "rejected": [
        {"kind": "prompt", "text": "Hi"},
        {"kind": "response", "text": "No"},
        {"kind": "cut", "text": "way.</s>"},
    ],
}


def test_control_codes_of_the_data_do_not_reach_the_terminal(coffee: Path, look: Look) -> None:
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        file.write('question,good_answer,bad_answer\na?,"\x1b[2J\x07b","\u202ec"\nd?,e,f\ng?,h,i\n')
    code, shown, _ = look("--row", "coffee.csv:2")
    assert code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    # The tokenizer of the workspace keeps none of these, so what is shown of one that does:
    assert visible("\x1b[2J\x07b\u202e\n\té🦜") == "\\x1b[2J\\x07b\\u202e\n\té🦜"


def test_json_is_what_a_run_keeps_as_data_json_and_the_pairs(
    coffee: Path, look: Look, call: Look, small_recipe: Any
) -> None:
    code, printed, said = look("--json")
    assert (code, said) == (0, "")
    figures = json.loads(printed)
    samples, warnings = figures.pop("samples"), figures.pop("warnings")
    assert (samples["first"]["where"], warnings) == ("coffee.csv:2", [])
    assert [piece["kind"] for piece in samples["cut"]["rejected"]] == ["prompt", "response", "cut"]
    assert figures["rows_read"] == 5
    assert figures["dropped"]["empty rejected"] == {"pairs": 1, "first": ["coffee.csv:5"]}
    assert figures["cut"]["responses_without_end"] > 0
    assert figures["tokens"]["chosen"]["max"] == len("Coarse, like sea salt.") + 1
    shutil.rmtree(coffee / "base")
    from conftest import write_base

    write_base(coffee / "base")
    small_recipe()
    options = [
        "data.dataset_name=./coffee.csv",
        MAP,
        "data.max_length=64",
        "data.max_prompt_length=60",
    ]
    options += ["data.test_split_size=0.02", "training.max_steps=1"]
    assert call("train", "--recipe", "./small.yaml", *options)[0] == 0
    kept = json.loads((coffee / "run" / "data.json").read_text(encoding="utf-8"))
    assert kept == figures
    assert "measure" not in json.dumps(
        kept
    )  # figures alone: no text of the data enters the run folder


def test_json_comes_with_its_warnings_beside_it(coffee: Path, look: Look) -> None:
    (coffee / "base" / "config.json").write_text(json.dumps({"vocab_size": 20}))
    code, printed, said = look("--json")
    assert code == 0
    assert json.loads(printed)["rows_read"] == 5
    assert "training would stop: coffee.csv:" in said
    (warning,) = json.loads(printed)["warnings"]
    assert warning.startswith("training would stop: coffee.csv:")
    code, printed, said = look("--json", "--row", "coffee.csv:2")
    assert (code, printed) == (2, "")
    assert "--row: is given together with --json" in said


def test_the_columns_and_what_is_bad_are_said(coffee: Path, look: Look) -> None:
    rows = [
        ("question", "good_answer", "bad_answer", "rated_by"),
        *((f"Cup {i}?", "a", "b", "ann") for i in range(20)),
    ]
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*rows, ("Which cup?", "Which  cup? The big one.", "b", "bob")])
    _, shown, _ = look()
    read = "prompt from question, chosen from good_answer, rejected from bad_answer"
    assert f"  read: {read}; not read: rated_by" in shown
    assert "pairs in which a reply begins with the prompt again: 1\n" in shown


def test_white_space_at_the_seam_is_visible(coffee: Path, look: Look) -> None:
    rows = "".join(f"Q{i}? , a,b\n" for i in range(9))
    (coffee / "coffee.csv").write_text(f"question,good_answer,bad_answer\n{rows}")
    _, shown, _ = look("data.chat_template=none")
    assert "\n<s>Q0?·\n--- chosen " in shown
    assert "\n·a[end: </s>]\n" in shown


def test_a_row_of_choice_is_shown_also_when_it_is_left_out(look: Look) -> None:
    code, shown, _ = look("--row", "coffee.csv:4")
    assert code == 0
    assert "one pair, coffee.csv:4, as" in shown
    assert "Four minutes." in shown
    assert "left out of the training" not in shown
    code, shown, _ = look("--row", "coffee.csv:7")
    assert "(left out of the training: chosen and rejected are equal)" in shown
    assert "Is instant coffee cheating?" in shown
    assert look("--row", str(Path("coffee.csv:4").resolve()))[0] == 0
    code, _, said = look("--row", "coffee.csv:6")  # the second line of a row
    assert code == 3
    assert "coffee.csv:6: no such row in ./coffee.csv" in said


def test_a_pair_that_is_cut_is_shown_beside_a_first_one_that_is_not(
    coffee: Path, look: Look
) -> None:
    with (coffee / "coffee.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(("Milk?", "x" * 100, "No."))
    _, shown, _ = look("data.max_length=100")
    first, title, cut = shown.partition("\na pair that data.max_length=100 cuts, coffee.csv:8\n")
    assert title
    assert "cut off" not in first
    assert f"{'x' * 69}[cut off: {'x' * 31}</s>]" in cut
    assert (
        "data.max_length=100 cuts 25.0% of the pairs; 1 of the responses (12.5%) lose their end token"
        in cut
    )
    _, shown, _ = look("data.max_length=256")
    assert "cut off" not in shown
    assert (
        "data.max_length=256 cuts 0.0% of the pairs; 0 of the responses (0.0%) lose their end token"
        in shown
    )


def test_a_long_text_is_shown_by_its_two_ends(coffee: Path, look: Look) -> None:
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            ("question", "good_answer", "bad_answer"),
            ("a?", "B" + "x" * 3000 + "E", "no"),
            *COFFEE,
        ]
        csv.writer(file).writerows(rows)
    _, shown, _ = look("data.max_length=4000")
    assert f"B{'x' * 599} [... {3002 - 1200:,} characters ...] {'x' * 599}E[end: </s>]" in shown


def test_what_training_would_refuse_is_warned_of(coffee: Path, look: Look) -> None:
    config = {"model_type": "llama", "vocab_size": 20, "max_position_embeddings": 32}
    (coffee / "base" / "config.json").write_text(json.dumps(config))
    code, shown, _ = look()
    assert code == 0
    assert "training would stop: coffee.csv:" in shown
    assert "the model's embedding has 20 rows" in shown
    (coffee / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    _, shown, _ = look()
    assert "training would stop: data.max_length: the longest pair has 64 tokens" in shown
    (coffee / "base" / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 200}}))
    assert "training would stop" not in look()[1]


def test_prompts_on_both_sides_are_counted(coffee: Path, look: Look) -> None:
    rows = "question,good_answer,bad_answer\n which GRIND,a,b\nHow long does it  brew?,Two.,Ten.\n"
    (coffee / "held.csv").write_text(rows)
    _, shown, _ = look("data.dataset_test_split=./held.csv")
    assert (
        "3 different prompts to train on, 2 held out, 1 in both: the evaluation will look too good"
        in shown
    )


def test_the_second_start_needs_neither_torch_nor_transformers(coffee: Path, look: Look) -> None:
    first = look("--json")
    code = (
        "import sys; from orpo_lite.cli.app import app\n"
        f"sys.argv = ['orpo-lite', 'data', '--recipe', './coffee.yaml', {MAP!r}, '--json']\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert second.stderr.strip() == "[]"
    assert json.loads(second.stdout) == json.loads(first[1])


def test_a_cache_that_cannot_be_written_to_is_said_and_nothing_is_left(
    coffee: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {
        "ORPO_LITE_CACHE": "/proc/tokens",
        "TMPDIR": str(tmp_path / "elsewhere"),
    }
    command = [sys.executable, "-m", "orpo_lite", "data", "--recipe", "./coffee.yaml", MAP]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "cannot write to /proc/tokens: this command stores its tokens in" in done.stdout
    assert "5 rows: 2 to train on" in done.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_no_recipe_and_an_unknown_option_are_answered(call: Look) -> None:
    code, _, said = call("data")
    assert code == 2
    assert "orpo-lite data --recipe demo" in said
    code, _, said = call("data", "mistral-qlora")
    assert code == 2
    assert "orpo-lite data --recipe mistral-qlora" in said


def test_the_demo_is_shown_without_training_its_base(workspace: Path, call: Look) -> None:
    code, shown, _ = call("data", "--recipe", "demo")
    assert code == 0
    assert "512 rows: 384 to train on, 128 held out, 0 left out" in shown
    assert list(workspace.rglob("*.safetensors")) == [workspace / "base" / "model.safetensors"]


def test_a_base_that_is_not_there(look: Look) -> None:
    code, _, said = look("model.model_name_or_path=./no-base")
    assert code == 4
    assert "./no-base: no such folder" in said


def test_words_for_nothing_are_counted(coffee: Path, look: Look) -> None:
    with (coffee / "coffee.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Is it hot?", "Yes.", "NULL"), ("Is it cold?", "NaN", "No.")])
    assert "NULL, None, NaN or N/A, so it is probably missing: 2\n" in look()[1]
    assert json.loads(look("--json")[1])["absent_texts"] == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_that_lacks_characters_has_them_escaped(coffee: Path, encoding: str) -> None:
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("question", "good_answer", "bad_answer", "你好 🦜"), ("q?", "a", "b", "")]
        )
    command = [
        sys.executable,
        "-m",
        "orpo_lite",
        "data",
        "--recipe",
        "./coffee.yaml",
        MAP,
        "data.test_split_size=0",
    ]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    shown, whole = (
        subprocess.run(
            [*command, *more], cwd=coffee, env=environment, capture_output=True, check=True
        ).stdout
        for more in ([], ["--json"])
    )
    assert json.loads(whole.decode(encoding))["columns"][0]["not_read"] == ["你好 🦜"]
    assert ("你好" if encoding == "utf-8" else r"\u4f60\u597d") in shown.decode(encoding)


def test_the_template_is_called_by_the_name_of_its_file(coffee: Path, look: Look) -> None:
    for name in ("one.jinja", "two.jinja"):
        (coffee / name).write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
        assert (
            f"the chat template of {coffee / name}"
            in look(f"data.chat_template={coffee / name}")[1]
        )


def test_templates_that_begin_late_are_counted(coffee: Path, look: Look) -> None:
    rows = [[f"Which bean is number {i}?", f"Bean {i}.", "None."] for i in range(DETECTION_ROWS)]
    templated = [[f"USER: Which roast is {name}? ASSISTANT:", "Light.", "Dark."] for name in "abc"]
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "good_answer", "bad_answer"), *rows, *templated])
    code, shown, _ = look()
    assert code == 0
    assert "pairs with markers of a chat template, which was perhaps already applied: 3\n" in shown
    assert json.loads(look("--json")[1])["templated_pairs"] == 3
    assert json.loads(look("--json", "data.chat_template=none")[1])["templated_pairs"] == 0
    with (coffee / "coffee.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(templated * 4)  # too many to be chance
    code, _, said = look()
    assert code == 3
    assert "data.chat_template: 15 of 115 pairs already hold markers of a chat template" in said


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}"


def test_system_texts_that_the_template_does_not_take_are_moved_and_counted(
    coffee: Path, look: Look
) -> None:
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [
            (f"Which bean is {i}?", "This.", "None.", "Be brief." if i != 1 else "")
            for i in range(4)
        ]
        csv.writer(file).writerows([("question", "good_answer", "bad_answer", "system"), *rows])
    assert "takes no system turn" not in look()[1]
    shown = look(f"data.chat_template={NO_SYSTEM}")[1]
    assert "takes no system turn (do the same when you use the model): 3 (75%)\n" in shown
    assert "Be brief.\n\nWhich bean is 0?</s>" in shown


def write_rows(coffee: Path, rows: list[tuple[str, str, str]]) -> None:
    with (coffee / "coffee.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "good_answer", "bad_answer"), *rows])


def test_a_template_that_changes_more_pairs_than_allowed_is_refused(
    coffee: Path, look: Look
) -> None:
    write_rows(coffee, [(f"Which bean is {i}?", f"b {i}", f"c {i}") for i in range(20)])
    short = NO_SYSTEM.replace(
        "m.content", "m.content[: 5 if '9' in m.content and 'bean' in m.content else 99]"
    )
    code, shown, said = look(f"data.chat_template={short}")
    assert (code, said) == (0, "")  # two of them
    reason = "a turn before the reply is changed by the chat template"
    assert (
        f"2  {reason} (coffee.csv:11, coffee.csv:21)\n           set data.chat_template to a file"
        in shown
    )
    short = short.replace("'9'", "'1'")  # 11 of 20
    code, _, said = look(f"data.chat_template={short}")
    assert code == 4
    assert (
        f"data.chat_template: it fails on 11 of 20 pairs: {reason} (11, the first at coffee.csv:3, "
        f"coffee.csv:12, coffee.csv:13)" in said
    )
    assert "expected: at most 3 such pairs" in said
    (line,) = (word for word in said.split() if word.startswith("data.max_bad_rows="))
    assert look(f"data.chat_template={short}", line)[0] == 0


def test_what_to_do_about_a_special_token_is_said(coffee: Path, look: Look) -> None:
    write_rows(coffee, [(f"Which {i}?", f"b {i}" + "<s>" * (i % 2), f"c {i}") for i in range(10)])
    shown, found = look()[1], json.loads(look("--json")[1])
    reason = "special token inside the text: <s>"
    assert found["dropped"][reason] == {
        "pairs": 5,
        "first": ["coffee.csv:3", "coffee.csv:5", "coffee.csv:7"],
    }
    assert "remove <s> from the texts" in shown
    plain = look("data.chat_template=none")[1]
    assert f"5  {reason}" not in plain  # a plain reply may end with one
    write_rows(coffee, [(f"Which {i}?", f"b <s> {i}", f"c {i}") for i in range(10)])
    for options in ((), ("data.chat_template=none",)):
        code, _, said = look(*options)
        assert code == 3
        assert "fix: remove <s> from the texts" in said
        assert (
            "data.chat_template" not in said.partition("fix: ")[2]
        )  # the texts hold the token in either case


def test_an_empty_thought_is_said_with_the_line_that_ends_it(
    coffee: Path, look: Look, call: Look
) -> None:
    block = "<think></think>"
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{block}{{% endif %}}{{{{ "
        f"m.content }}}}</s>"
        f"{{% endfor %}}{{% if add_generation_prompt and enable_thinking is false %}}{block}{{% "
        f"endif %}}"
    )
    (coffee / "mine.jinja").write_text(template)
    own = "data.chat_template=mine.jinja"
    shown = look(own)[1]
    (line,) = (line for line in shown.splitlines() if "adds an empty <think> block" in line)
    assert ", and the model is trained on it: 3 (100%); " in line
    (word,) = (word for word in shlex.split(line) if word.startswith("data.chat_template_kwargs="))
    assert "<think>" not in look(own, word)[1].partition("tokens  ")[2]
    assert json.loads(look("--json", own, word)[1])["empty_thoughts"] == 0
    (coffee / "mine.jinja").write_text(template.replace("enable_thinking is false", "false"))
    shown = look(own)[1]
    assert ", and the model is trained on it: 3 (100%)\n" in shown
    assert "enable_thinking" not in shown


def test_a_tokenizer_that_transformers_would_change_is_said(coffee: Path, look: Look) -> None:
    assert "tokenizer.json is used" not in look()[1]
    file = coffee / "base" / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text("utf-8")) | {"tokenizer_class": "GPT2Tokenizer"})
    )
    said = "tokenizer.json is used unchanged, because GPT2Tokenizer would change its pre_tokenizer"
    assert said in look()[1]
    assert json.loads(look("--json")[1])["tokenizer"].startswith(said)
