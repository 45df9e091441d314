"""The command line: what it prints, how it ends, and that nothing half-done is left behind."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, byte_tokenizer, tiny_llama, write_base
from transformers import T5Config, T5ForConditionalGeneration

from orpo_lite import errors
from orpo_lite.recipe.reader import gpu_sizes, load_recipe, shipped_recipes
from orpo_lite.recipe.schema import KEYS

SCRIPT = Path(sys.executable).with_name("orpo-lite")
SMALL = "./small.yaml"

Call = Callable[..., Answer]


@pytest.fixture
def small(workspace: Path, small_recipe: Callable[..., Any], call: Call) -> Callable[..., Answer]:
    """Runs ``train`` with the recipe of the workspace, which is complete and small."""
    small_recipe()
    return lambda *overrides: call("train", "--recipe", SMALL, *overrides)


def shell(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )


# --- the program as a program


def test_help_answers_in_less_than_a_second(tmp_path: Path) -> None:
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = shell(SCRIPT, "--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, not of the clock on the wall, which also measures what else the machine is doing.
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "merge", "recipes"))
    assert min(took) < 1, took


def test_the_module_is_the_script(tmp_path: Path) -> None:
    script, module = (
        shell(*start, "recipes", "ls", cwd=tmp_path)
        for start in ([SCRIPT], [sys.executable, "-m", "orpo_lite"])
    )
    assert script.returncode == module.returncode == 0
    assert script.stdout == module.stdout != ""
    script, module = (
        shell(*start, "train", "demo", cwd=tmp_path)
        for start in ([SCRIPT], [sys.executable, "-m", "orpo_lite"])
    )
    assert script.returncode == module.returncode == 2
    assert script.stderr == module.stderr != ""


def test_a_persons_error_ends_the_process_with_its_code_and_no_traceback(tmp_path: Path) -> None:
    done = shell(SCRIPT, "train", "--recipe", "nonesuch", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("--recipe nonesuch: no shipped recipe has this name")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_is_closed_early_is_no_fault(tmp_path: Path) -> None:
    """As in ``orpo-lite train --recipe demo --dry-run | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(SCRIPT), "train", "--recipe", "demo", "--dry-run"]
    with os.fdopen(writing, "w") as nobody:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_the_version(call: Call) -> None:
    from orpo_lite import __version__

    assert call("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("orpo-lite train --recipe qwen3-8", ["qwen3-8b-qlora"]),
        ("orpo-lite train --recipe ./mi", []),
        ("orpo-lite plan --recipe mi", ["mistral-orpo-beta-qlora", "mistral-qlora", "mine.yaml"]),
        ("orpo-lite train lora.lora_", ["lora.lora_alpha=", "lora.lora_dropout="]),
        ("orpo-lite merge ", ["runs/one", "runs/two"]),
        ("orpo-lite push runs/t", ["runs/two"]),
        ("orpo-lite export runs/one --to g", ["gguf"]),
    ],
)
def test_the_shell_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    for name in ("runs/one/recipe.yaml", "runs/two/recipe.yaml", "runs/builtin/other", "mine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    words = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "_ORPO_LITE_COMPLETE": "complete_bash",
    }
    done = subprocess.run(
        [SCRIPT], cwd=tmp_path, env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == expected


# --- recipes ls, show, cp


def test_ls_lists_every_recipe_with_its_headline_base_beta_and_gpu(call: Call) -> None:
    code, said, _ = call("recipes", "ls")
    header, *lines = said.splitlines()
    assert code == 0
    assert header.split()[0] == "recipe"
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    for line, (name, path) in zip(lines, shipped_recipes().items(), strict=True):
        recipe, headline = (
            load_recipe(name),
            path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
        )
        has_beta = recipe.loss.type not in ("sft", "reward", "ppo")
        assert re.split(r"  +", line) == [
            name,
            recipe.model.model_name_or_path,
            recipe.loss.type,
            *([f"{recipe.loss.beta:g}"] if has_beta else []),
            gpu_sizes()[name],
            headline,
        ]


def test_show_prints_the_whole_recipe_and_what_it_prints_is_that_recipe(
    call: Call, tmp_path: Path
) -> None:
    code, said, _ = call("recipes", "show", "llama2-7b-qlora")
    (tmp_path / "shown.yaml").write_text(said, encoding="utf-8")
    shown = load_recipe(str(tmp_path / "shown.yaml"))
    assert code == 0
    assert dict(shown.items()) == dict(load_recipe("llama2-7b-qlora").items())
    assert "the paper calls it λ" in said


def test_cp_writes_a_recipe_to_edit_and_never_over_another(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = call("recipes", "cp", "phi2-qlora", "mine.yaml")
    assert code == 0
    assert "orpo-lite train --recipe ./mine.yaml" in said
    assert load_recipe("./mine.yaml").loss.beta == 0.25
    Path("mine.yaml").write_text("my own work", encoding="utf-8")
    code, _, said = call("recipes", "cp", "demo", "mine.yaml")
    assert code == 2
    assert "mine.yaml: exists" in said
    assert Path("mine.yaml").read_text(encoding="utf-8") == "my own work"


def test_cp_into_a_folder_keeps_the_name_and_stays_inside(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert call("recipes", "cp", "demo", "folder")[0] == 0
    assert call("recipes", "cp", "demo", "../source.yaml")[0] == 0
    assert call("recipes", "cp", "../source.yaml", "folder")[0] == 0
    assert sorted(path.name for path in (tmp_path / "here" / "folder").iterdir()) == [
        "demo.yaml",
        "source.yaml",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source.yaml"]


def test_cp_to_nowhere_says_so(call: Call, tmp_path: Path) -> None:
    code, _, said = call("recipes", "cp", "demo", str(tmp_path / "no" / "where.yaml"))
    assert code == 2
    assert "cannot be written" in said


# --- --dry-run


def test_dry_run_prints_every_value_whole_with_its_source_and_does_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "some/" + "very-" * 40 + "long-name"
    code, said, _ = call(
        "train",
        "--recipe",
        "phi2-qlora",
        f"data.dataset_name={long}",
        "lora.use_dora=true",
        "--dry-run",
    )
    recipe = load_recipe("phi2-qlora", [f"data.dataset_name={long}", "lora.use_dora=true"])
    values, _, memory_settings = said.partition("\na step\n")
    rows = [re.split(r"  +", line) for line in values.splitlines()]
    assert code == 0
    assert "the prompt of a pair once" in memory_settings
    assert rows[0] == ["key", "value", "from"]
    assert [row[0] for row in rows[1:]] == [
        f"{section}.{key}" for section, keys in KEYS.items() for key in keys
    ]
    assert ["data.dataset_name", long, "command line"] in rows
    assert ["lora.use_dora", "true", "command line"] in rows
    assert ["loss.beta", "0.25", recipe.sources["loss.beta"]] in rows
    assert re.fullmatch(r"phi2-qlora\.yaml:\d+", recipe.sources["loss.beta"])
    assert ["model.adapter_name_or_path", "null", "default"] in rows
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [],
            [
                "without padding",
                "the prompt of a pair once",
                "a few rows of logits",
                "runs all layers again",
            ],
        ),
        (["memory.packing=false"], ["pads rows, 1 pair per forward pass, and holds all logits"]),
        (["memory.packing=false", "memory.micro_batch_size=4"], ["pads rows, 4 pairs"]),
        (
            ["memory.prompt_sharing=false", "memory.micro_batch_size=2"],
            ["of a pair twice", "tokens and 2 pairs"],
        ),
        (
            ["memory.micro_batch_tokens=9000", "memory.head_chunk=none"],
            ["9,000 tokens", "all logits of a forward"],
        ),
        (
            ["memory.head_chunk=256", "memory.mlp_tile=512"],
            ["256 rows of logits", "on 512 tokens at a time"],
        ),
        (["memory.checkpoint_offload=true"], ["in the backward pass from inputs in host memory"]),
        (
            ["memory.activation_checkpointing=none"],
            ["runs no layer again in the backward", "the plan sets micro_batch"],
        ),
        (
            ["memory.activation_checkpointing=20", "memory.embedding_on_cpu=true"],
            ["20 layers", "input embedding in host"],
        ),
    ],
)
def test_dry_run_says_the_memory_settings_in_words(
    call: Call, overrides: list[str], said: list[str]
) -> None:
    code, printed, _ = call("train", "--recipe", "mistral-qlora", *overrides, "--dry-run")
    assert code == 0
    assert [text for text in said if text not in printed] == []
    assert ("host memory" in printed) == any("host" in text for text in said)


# --- wrong command lines


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "demo"], ["no recipe is given", "--recipe NAME", "orpo-lite train --recipe demo"]),
        (["train"], ["no recipe is given", "orpo-lite train --recipe demo"]),
        (["train", "lora.r=8"], ["no recipe is given", "--recipe"]),
        (["train", "--recipe", "mistral-qlor"], ["did you mean mistral-qlora", "recipes ls"]),
        (["train", "--recipe", "./gone.yaml"], ["./gone.yaml: no such file"]),
        (["train", "--recipe", "../demo"], ["../demo: no such file"]),
        (["train", "--recipe", "demo", "lora.rank=8"], ["command line: unknown key lora.rank", "write lora.r"]),
        (["train", "--recipe", "demo", "lora.ranking=8"], ["command line: unknown key lora.ranking", "orpo-lite"]),
        (["train", "--recipe", "demo", "lora.r=many"], ["command line: lora.r: many", "valid integer", "16"]),
        (["train", "--recipe", "demo", "mistral-qlora"], ["argument 'mistral-qlora'", "--recipe mistral-qlora"]),
        (["train", "--recipe", "demo", "lora.r", "8"], ["argument 'lora.r'", "argument '8'", "section.key=value"]),
        (["recipes", "show", "nonesuch"], ["--recipe nonesuch", "recipes ls"]),
        (["recipes", "cp", "demo"], ["Missing argument 'PATH'"]),
        (["nonsense"], ["No such command 'nonsense'"]),
        (["train", "--recip", "demo"], ["No such option: --recip", "--recipe"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_ends_with_2_and_says_the_right_one(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert [part for part in expected if part not in err] == [], err
    assert out == ""
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["data", "train"])
@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (["pairs.csv"], "--recipe demo data.dataset_name=pairs.csv"),
        (["--recipe", "demo", "pairs.csv"], "--recipe demo data.dataset_name=pairs.csv"),
        (
            ["--recipe", "phi2-qlora", "a b.jsonl", "lora.r=8"],
            "--recipe phi2-qlora 'data.dataset_name=a b.jsonl' lora.r=8",
        ),
        (["sets", "c.csv"], "--recipe demo data.dataset_name=sets,c.csv"),
    ],
)
def test_pairs_without_their_key_are_told_the_key(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    arguments: list[str],
    fix: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    code, out, err = call(verb, *arguments)
    assert (code, out) == (2, "")
    assert err.endswith(f"  fix: orpo-lite {verb} {fix}\n")


def test_resume_takes_the_recipe_of_the_run_and_no_other(call: Call, tmp_path: Path) -> None:
    code, _, said = call("train", "--resume", str(tmp_path), "--recipe", "demo")
    assert code == 2
    assert "--resume: is given together with --recipe demo" in said
    assert f"orpo-lite train --resume {tmp_path}" in said


def test_resume_of_no_run_ends_with_5(call: Call, tmp_path: Path) -> None:
    code, _, said = call("train", "--resume", str(tmp_path / "gone"))
    assert code == 5
    assert "no such folder" in said


def test_resume_reads_the_recipe_where_the_run_lies_now(call: Call, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "recipe.yaml").write_text(
        load_recipe("demo", ["lora.r=4"]).to_yaml(), encoding="utf-8"
    )
    code, said, _ = call("train", "--resume", str(tmp_path / "moved"), "--dry-run")
    assert code == 0
    rows = {
        line.split()[0]: line.split()[1] for line in said.partition("\na step\n")[0].splitlines()
    }
    assert (rows["lora.r"], rows["training.output_dir"]) == ("4", str(tmp_path / "moved"))


def test_an_existing_run_ends_with_5_and_the_command_to_go_on(
    small: Callable[..., Answer], workspace: Path
) -> None:
    (workspace / "run").mkdir()
    (workspace / "run" / "recipe.yaml").write_text("a run", encoding="utf-8")
    code, _, said = small()
    assert code == 5
    assert "training.output_dir: run: already holds a run" in said
    assert "orpo-lite train --resume run" in said
    assert "training.output_dir=OTHER" in said
    assert (workspace / "run" / "recipe.yaml").read_text(encoding="utf-8") == "a run"


def test_a_folder_with_other_things_is_not_written_into(
    small: Callable[..., Answer], workspace: Path
) -> None:
    (workspace / "run").mkdir()
    (workspace / "run" / "thesis.tex").write_text("dear", encoding="utf-8")
    code, _, said = small()
    assert code == 5
    assert "exists and is not empty" in said
    assert "--resume" not in said
    assert [path.name for path in (workspace / "run").iterdir()] == ["thesis.tex"]


# --- our own faults


def test_a_fault_of_ours_ends_with_70_a_traceback_and_the_request_to_report(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError("the pipe burst")

    monkeypatch.setattr("orpo_lite.recipe.reader.load_recipe", burst)
    code, _, said = call("recipes", "show", "demo")
    assert code == 70
    assert "Traceback" in said
    assert "ZeroDivisionError: the pipe burst" in said
    assert "This is a bug in orpo-lite. Please report it" in said
    assert "`orpo-lite doctor --bug-report`" in said


def test_every_error_people_cause_ends_with_its_own_code(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [errors.RecipeError, errors.DataError, errors.ModelError, errors.CheckpointError, errors.FitError,
             errors.DivergedError, errors.HubError]  # fmt: skip
    codes = []
    for kind in kinds:

        def fail(*_: object, kind: type[errors.OrpoLiteError] = kind) -> None:
            raise kind(where="somewhere", found="found", expected="expected", fix="fix")

        monkeypatch.setattr("orpo_lite.recipe.reader.load_recipe", fail)
        code, _, said = call("recipes", "show", "demo")
        assert said == "somewhere: found\n  expected: expected\n  fix: fix\n"
        codes.append(code)
    assert codes == [2, 3, 4, 5, 6, 7, 8]


# --- bad data and bad models: before any weights load, and nothing left behind


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load a model's weights is a fault of ours, exit code 70."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded before everything had been checked")

    monkeypatch.setattr("orpo_lite.training.session.load_pair_model", refuse)


def rows(*pairs: tuple[object, object, object]) -> str:
    return "".join(
        json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) + "\n"
        for pair in pairs
    )


GOOD = ("How is it?", "It is fine.", "No!")
BAD_DATA: dict[str, tuple[str, list[str], list[str]]] = {
    "broken line": (
        rows(GOOD) + '{"prompt": "x", "chosen": }\n',
        [],
        ["pairs.jsonl:2", "broken JSON at column 27", "complete objects", "correct or remove the row"],
    ),
    "missing field": (
        '{"prompt": "a", "chosen": "b"}\n',
        [],
        ["rejected is missing", "'prompt', 'chosen'", "write each pair as prompt, chosen and rejected"],
    ),
    "missing field in one row": (
        rows(GOOD) + '{"prompt": "a", "chosen": "b"}\n',
        [],
        ["1 of 2 rows were left out", "pairs.jsonl:2, field rejected: missing", "For the other rows: a size of 0.2 holds out every pair"],
    ),
    "numbers for texts": (
        rows(*[GOOD] * 5, *[("a", 5, "c")] * 4),
        [],
        ["4 of 9 rows cannot be read", "field chosen: a number, first pairs.jsonl:6", "data.max_bad_rows=0.445"],
    ),
    "an empty file": ("", [], ["pairs.jsonl: no rows", "at least one preference pair"]),
    "all equal": (
        rows(("a", "b", "b"), ("c", "d", "d")),
        [],
        ["every pair was left out", "2  chosen and rejected are equal", "pairs to train on"],
    ),
    "all empty": (
        rows(("a", "", "b"), ("c", "d", " ")),
        [],
        ["every pair was left out", "1  empty chosen", "1  empty rejected"],
    ),
    "all over-long": (
        rows(*((f"{i} " + "very " * 30, "b", "c") for i in range(8))),
        [],
        ["every pair was left out", "prompt longer than data.max_prompt_length"],
    ),
    "an unknown column in the map": (
        rows(GOOD),
        ["data.column_map=prompt=promt"],
        ["data.column_map", "'promt'", "did you mean data.column_map=prompt=prompt?"],
    ),
    "a test split of a single file": (
        rows(GOOD),
        ["data.dataset_test_split=test"],
        ["data.dataset_test_split: 'test'", "data.test_split_size", "data.dataset_test_split=null"],
    ),
    "one prompt, so nothing to hold out": (rows(GOOD, GOOD), [], ["data.test_split_size", "data.test_split_size=0"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_ends_with_3_before_weights_load(
    small: Callable[..., Answer], workspace: Path, case: str
) -> None:
    text, overrides, expected = BAD_DATA[case]
    (workspace / "pairs.jsonl").write_text(text, encoding="utf-8")
    before = {path.name for path in workspace.rglob("*")}
    code, _, said = small(*overrides)
    assert code == 3, said
    assert [part for part in expected if part not in said] == [], said
    assert "Traceback" not in said
    assert {path.name for path in workspace.rglob("*")} == before


@pytest.mark.usefixtures("no_weights")
def test_a_missing_data_file_names_its_neighbours(
    small: Callable[..., Answer], workspace: Path
) -> None:
    code, _, said = small("data.dataset_name=./pears.jsonl")
    assert code == 3
    assert "pears.jsonl: no such file" in said
    assert "fix: data.dataset_name=pairs.jsonl" in said
    assert not (workspace / "run").exists()


def test_a_prompt_on_both_sides_of_a_given_split_is_warned_of(
    small: Callable[..., Answer], workspace: Path
) -> None:
    (workspace / "held-out.jsonl").write_text(
        rows(("Something else?", "Yes.", "No."), GOOD), encoding="utf-8"
    )
    (workspace / "pairs.jsonl").write_text(rows(GOOD), encoding="utf-8")
    code, said, _ = small("data.dataset_test_split=./held-out.jsonl", "training.max_steps=1")
    assert code == 0
    assert (
        "warning: 1 of 2 held-out prompts are also in the training set, so the evaluation will look too good"
        in said
    )
    figures = json.loads((workspace / "run" / "data.json").read_text(encoding="utf-8"))
    assert figures["prompts"] == {"train": 1, "held_out": 2, "shared": 1}


def change_config(base: Path, **values: object) -> None:
    file = base / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8"
    )


def encoder_decoder(base: Path) -> None:
    shutil.rmtree(base)
    shape = {
        "vocab_size": 98,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)


def as_pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
BAD_BASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "no such folder": (shutil.rmtree, [], ["model.model_name_or_path: ./base", "no such folder", "or a hub name"]),
    "no safetensors": (as_pickle, [], ["base", "safetensors", "pickle files are never loaded"]),
    "no config": (lambda base: (base / "config.json").unlink(), [], ["base", "no config.json", "transformers"]),
    "a broken config": (
        lambda base: (base / "config.json").write_text("{", encoding="utf-8"),
        [],
        ["config.json", "is not a JSON object"],
    ),
    "broken settings of the tokenizer": (
        lambda base: (base / "tokenizer_config.json").write_text("[]", encoding="utf-8"),
        [],
        ["tokenizer in", "tokenizer_config.json is not a JSON object", "download this file again"],
    ),
    "encoder-decoder": (encoder_decoder, [], ["base", "model_type 't5' is an encoder-decoder", "decoder-only"]),
    "its own code": (
        lambda base: change_config(base, auto_map={"AutoModelForCausalLM": "evil.Model"}),
        [],
        ["base", "needs Python code from its repository (auto_map in config.json)"],
    ),
    "already quantised": (
        lambda base: change_config(base, quantization_config={"load_in_4bit": True}),
        [],
        ["base", "is already quantised", "16-bit weights", "use the original 16-bit model"],
    ),
    "an unknown architecture": (
        lambda base: change_config(base, model_type="rwkv99"),
        [],
        ["model_type 'rwkv99' is not in transformers"],
    ),
    "a vocabulary of another size": (
        lambda base: change_config(base, vocab_size=128),
        [],
        ["config.json", "model.embed_tokens.weight is (99, 64)", "not (128, 64)", "set vocab_size to 99"],
    ),
    "weights that are a pointer": (
        lambda base: (base / "model.safetensors").write_text(POINTER, encoding="utf-8"),
        [],
        ["model.safetensors", "a git-lfs pointer"],
    ),
    "a target that matches nothing": (
        lambda _: None,
        ["lora.target_modules=q_proj,typo"],
        ["command line", "lora.target_modules: typo matches no layer", "gate_proj, k_proj", "=all-linear"],
    ),
    "no tokenizer": (
        lambda base: [file.unlink() for file in base.glob("*token*")],
        [],
        ["tokenizer", "base"],
    ),
    "nothing that ends a reply": (
        lambda base: (base / "tokenizer_config.json").write_text(
            re.sub(r'"eos_token": "[^"]*",?', "", (base / "tokenizer_config.json").read_text(encoding="utf-8"))
        ),
        [],
        ["tokenizer", "there is no eos_token, so no token ends a reply"],
    ),
    "a template that raises": (
        lambda _: None,
        ["data.chat_template={{ raise_exception('only poems') }}"],
        ["the chat template raises", "only poems", "set data.chat_template to a file with a template of your own"],
    ),
    "token ids beyond the embedding": (
        lambda base: write_base(base, tiny_llama(64)),
        [],
        ["pairs.jsonl:", "token id", "embedding has 64 rows", "tokenizer"],
    ),
    "no such adapter": (
        lambda _: None,
        ["model.adapter_name_or_path=./base"],
        ["model.adapter_name_or_path: ./base", "has no adapter_config.json", "peft LoRA adapter in safetensors"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", BAD_BASES)
def test_a_bad_base_ends_with_4_before_weights_load(
    small: Callable[..., Answer], workspace: Path, case: str
) -> None:
    spoil, overrides, expected = BAD_BASES[case]
    spoil(workspace / "base")
    before = {path.name for path in workspace.rglob("*")}
    code, _, said = small(*overrides)
    assert code == 4, said
    assert [part for part in expected if part not in said] == [], said
    assert "Traceback" not in said
    assert {path.name for path in workspace.rglob("*")} == before


@pytest.mark.usefixtures("no_weights")
def test_a_rank_without_a_launch_is_said_in_full(
    small: Callable[..., Answer], workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    code, _, said = small()
    assert code == 2
    assert "fix: unset RANK" in said
    assert not (workspace / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_hub_base_that_is_not_cached_ends_with_8_when_there_is_no_hub(
    small: Callable[..., Answer], workspace: Path
) -> None:
    code, _, said = small("model.model_name_or_path=nobody/nothing-of-that-name")
    assert code == 8
    assert "nobody/nothing-of-that-name at main" in said
    assert "hf download nobody/nothing-of-that-name" in said
    assert not (workspace / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_weights_are_loaded_only_after_the_checks(
    small: Callable[..., Answer], workspace: Path
) -> None:
    """The fixture bites: with nothing wrong, the refusal to load is reached."""
    code, _, said = small()
    assert code == 70
    assert "weights were loaded" in said


@pytest.mark.long
def test_a_hub_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    script = "import sys, time; time.sleep = lambda _: None; from orpo_lite.cli import main; main()"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "data",
            "--recipe",
            "demo",
            "data.dataset_name=someone/pairs",
        ],
        env={key: value for key, value in os.environ.items() if not key.endswith("_VERBOSITY")}
        | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.HubError.exit_code
    first, *rest = done.stderr.splitlines()
    assert first.startswith("data.dataset_name someone/pairs: ")
    assert [line.partition(":")[0] for line in rest] == ["  expected", "  fix"]
