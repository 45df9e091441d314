"""The recipe: what is accepted, where each value comes from, and what is said about everything else."""

import contextlib
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orpo_lite.errors import SHOWN, Command, HubError, RecipeError
from orpo_lite.recipe.foreign import FOREIGN
from orpo_lite.recipe.reader import CHECKOUT, MAX_BYTES, find_recipe, load_recipe, shipped_recipes
from orpo_lite.recipe.schema import KEYS, Recipe
from orpo_lite.recipe.text import to_text

MINIMAL = "model:\n  model_name_or_path: some/base\ndata:\n  dataset_name: some/pairs\n"
TOKEN = "hf_" + "Abcd1234" * 4
BAD_REPOSITORIES = (
    "a b",
    "me/../you",
    "/me/x",
    "me/x/y",
    "me/-x",
    "me/x--y",
    "me/x.",
    "me/x.git",
    "mé/x",
    "x" * 97,
    "",
)
NEEDED = ("model.model_name_or_path=some/base", "data.dataset_name=some/pairs")

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes mine.yaml into the current directory; returns the name to load it by."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return "mine.yaml"

    return write_text


def message(name: str, *overrides: str) -> str:
    """What load_recipe says about a faulty recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- precedence and sources


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_default(
    write: Write,
) -> None:
    name = write(MINIMAL + "lora:\n  r: 8\n  lora_alpha: 24\n")
    recipe = load_recipe(name, ["lora.r=4"])
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (4, 24, 0.0)
    assert recipe.sources["lora.r"] == "command line"
    assert recipe.sources["lora.lora_alpha"] == "mine.yaml:7"
    assert recipe.sources["lora.lora_dropout"] == "default"
    assert list(recipe.sources) == [key for key, _ in recipe.items()]


def test_an_override_splits_at_its_first_equals_sign(write: Write) -> None:
    assert (
        load_recipe(write(MINIMAL), ["training.output_dir=runs/beta=1"]).training.output_dir
        == "runs/beta=1"
    )


def test_override_keeps_the_sources(write: Write) -> None:
    recipe = load_recipe(write(MINIMAL), ["lora.r=4"])
    changed = recipe.override({"training.output_dir": "elsewhere"})
    assert (changed.training.output_dir, changed.lora.r) == ("elsewhere", 4)
    assert changed.sources == recipe.sources
    assert recipe.training.output_dir == "runs/orpo"


# --- values are read by the field's type, not by YAML

VALUES: list[tuple[str, str, Any]] = [
    ("model.model_revision", "1234567", "1234567"),
    ("model.model_revision", "0123456", "0123456"),
    ("model.model_revision", "1e10", "1e10"),
    ("model.model_revision", "no", "no"),
    ("training.learning_rate", "5e-5", 5e-5),
    ("training.learning_rate", "8e-6", 8e-6),
    ("training.learning_rate", "1", 1.0),
    ("training.output_dir", "2024-01-01", "2024-01-01"),
    ("lora.r", "64", 64),
    ("lora.use_dora", "true", True),
    ("lora.use_dora", "False", False),
    ("lora.init_lora_weights", "true", True),
    ("lora.init_lora_weights", "orthogonal", "orthogonal"),
    ("lora.target_modules", "all-linear", "all-linear"),
    ("lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("data.test_split_size", "200", 200.0),
    ("data.max_samples", "null", None),
    ("data.max_samples", "500", 500),
    ("data.column_map", "{prompt: question, chosen: '5'}", {"prompt": "question", "chosen": "5"}),
    ("data.chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
    (
        "data.chat_template_kwargs",
        "{n: 2, x: 1.5, date: '2', lang: no}",
        {"n": 2, "x": 1.5, "date": "2", "lang": "no"},
    ),
    ("training.warmup_steps", "0.1", 0.1),
    ("training.warmup_steps", "200", 200.0),
    ("training.early_stopping_patience", "null", None),
    ("memory.activation_checkpointing", "none", "none"),
    ("memory.activation_checkpointing", "12", 12),
]


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(
    write: Write, key: str, text: str, value: object
) -> None:
    section, _, field = key.partition(".")
    name = write(MINIMAL)
    from_cli = dict(load_recipe(name, [f"{key}={text}"]).items())[key]
    lines = {"model": [], "data": []} | {section: [f"  {field}: {text}"]}
    lines["model"].append("  model_name_or_path: some/base")
    lines["data"].append("  dataset_name: some/pairs")
    body = "\n".join(f"{part}:\n" + "\n".join(rows) for part, rows in lines.items())
    from_file = dict(load_recipe(write(body)).items())[key]
    assert (from_cli, type(from_cli)) == (from_file, type(from_file)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "q_proj,v_proj",
        "[q_proj,v_proj]",
        "[q_proj, v_proj]",
        '["q_proj", "v_proj"]',
        " q_proj , v_proj",
    ],
)
def test_a_list_needs_no_brackets_which_shells_eat(write: Write, text: str) -> None:
    recipe = load_recipe(write(MINIMAL), [f"lora.target_modules={text}"])
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "text", ["{prompt: question, chosen: good}", "prompt=question,chosen=good"]
)
def test_a_mapping_needs_no_braces(write: Write, text: str) -> None:
    recipe = load_recipe(write(MINIMAL), [f"data.column_map={text}"])
    assert recipe.data.column_map == {"prompt": "question", "chosen": "good"}


def test_what_the_template_gets_is_typed_without_braces_too(write: Write) -> None:
    recipe = load_recipe(
        write(MINIMAL), ["data.chat_template_kwargs=enable_thinking=false,style=plain"]
    )
    assert recipe.data.chat_template_kwargs == {"enable_thinking": False, "style": "plain"}


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora.r = 4


# --- bad files: each with its place, what was expected, and a fix

BAD_FILES: dict[str, tuple[str, list[str]]] = {
    "syntax": ("model:\n  a: [1\nlora:\n", ["mine.yaml:3:", "YAML", "fix"]),
    "tab": ("model:\n\tmodel_name_or_path: x\n", ["mine.yaml:2:1", "YAML"]),
    "two documents": (MINIMAL + "---\n" + MINIMAL, ["mine.yaml:5:", "document"]),
    "control character": ("model:\n  a: \x00\n", ["mine.yaml", "unacceptable character"]),
    "deep nesting": ("model: " + "[" * 20_000, ["mine.yaml:1", "nested too deeply", "at most 32"]),
    "deep lists": (MINIMAL + "lora: " + "\n" + "  " + "- " * 20_000, ["mine.yaml:6", "nested too deeply"]),
    "empty": ("", ["mine.yaml", "is empty", "model, quantization, lora", "recipes cp"]),
    "only comments": ("# nothing\n", ["mine.yaml", "is empty"]),
    "a list": ("- model\n", ["mine.yaml", "is not a mapping"]),
    "a text": ("hello\n", ["mine.yaml", "is not a mapping"]),
    "a section of text": (MINIMAL + "lora: 16\n", ["mine.yaml:5", "section lora holds 16", "key: value"]),
    "duplicate key": (MINIMAL + "lora:\n  r: 8\n  r: 16\n", ["mine.yaml:7", "'r'", "line 6", "each key once"]),
    "duplicate section": (MINIMAL + "model:\n  dtype: auto\n", ["mine.yaml:5", "'model'", "line 1"]),
    "duplicate inside a value": (
        MINIMAL + "  column_map:\n    prompt: a\n    prompt: b\n",
        ["mine.yaml:7", "'prompt'", "line 6"],
    ),
    "anchor": ("model: &a\n  model_name_or_path: x\nlora: *a\n", ["mine.yaml:1", "anchor", "'a'", "write the value"]),
    "alias bomb": ("a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\n", ["mine.yaml:1", "anchor"]),
    "alias": (MINIMAL + "lora: *a\n", ["mine.yaml:5", "alias", "'a'"]),
    "no base": ("data:\n  dataset_name: x\n", ["mine.yaml", "model.model_name_or_path is not set", "hub name"]),
    "a tag that builds objects": (
        "model:\n  model_name_or_path: !!python/object/apply:os.system [touch pwned]\n",
        ["mine.yaml:2", "model.model_name_or_path", "string"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_answered_with_its_place(write: Write, case: str) -> None:
    text, expected = BAD_FILES[case]
    said = message(write(text))
    assert [part for part in expected if part not in said] == [], said
    assert len(said) < 2000
    assert os.listdir() == ["mine.yaml"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{MINIMAL}# é\n".encode("cp1252"), "mine.yaml:5: byte 0xe9 is not UTF-8"),
        (f"{MINIMAL}# 对\n".encode("gb18030"), "mine.yaml:5: byte 0xb6 is not UTF-8"),
        (MINIMAL.encode("utf-16"), "mine.yaml:1: is UTF-16 text"),
        (MINIMAL.encode("utf-16-le"), "mine.yaml:1: is UTF-16LE text"),
        (MINIMAL.encode("utf-16-be"), "mine.yaml:1: is UTF-16BE text"),
        (MINIMAL.encode("utf-32"), "mine.yaml:1: is UTF-32 text"),
        (
            MINIMAL.replace("  ", "\u00a0 ").encode(),
            "mine.yaml:2: is indented by the character U+00A0 (no-break space)",
        ),
        (
            MINIMAL.replace("  ", " \u3000").encode(),
            "mine.yaml:2: is indented by the character U+3000 (ideographic space)",
        ),
    ],
)
def test_a_file_in_another_encoding_is_mended_by_the_fix(
    content: bytes, said: str, write: Write
) -> None:
    name = write(MINIMAL)
    Path(name).write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert said in str(caught.value)
    assert isinstance(caught.value.fix, Command)
    subprocess.run(["bash", "-c", caught.value.fix.line], check=True)
    recipe = load_recipe(str(caught.value.fix).rpartition("--recipe ")[2])
    Path(name).write_text(MINIMAL, encoding="utf-8")
    assert recipe.model_dump() == load_recipe(name).model_dump()


def test_a_byte_of_no_encoding_is_placed(write: Write) -> None:
    Path(write(MINIMAL)).write_bytes(MINIMAL.encode() + b"lora:\n  r: \x81\n")
    assert "mine.yaml:6: byte 0x81 is not UTF-8" in message("mine.yaml")


def test_the_run_folder_may_be_named_from_home(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(write(MINIMAL), ["training.output_dir=~/runs/a"])
    assert recipe.training.output_dir == "/home/me/runs/a"
    assert load_recipe(write(MINIMAL), ["training.output_dir=./~"]).training.output_dir == "./~"
    assert "~nobody-here/a" in message("mine.yaml", "training.output_dir=~nobody-here/a")


def test_a_file_of_more_than_a_mebibyte_is_not_read(write: Write) -> None:
    padding = MAX_BYTES - len(MINIMAL) - 2
    assert (
        load_recipe(write(MINIMAL + "# " + "x" * padding)).model.model_name_or_path == "some/base"
    )
    said = message(write(MINIMAL + "# " + "x" * (padding + 1)))
    assert "mine.yaml: has 1,048,577 bytes" in said
    assert "1,048,576" in said


def test_a_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    name = write(MINIMAL)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, whom no mode stops
    assert "mine.yaml: cannot be read (Permission denied)" in message(name)


def test_a_missing_file_names_its_neighbours(write: Write) -> None:
    write(MINIMAL)
    said = message("./mien.yaml")
    assert "./mien.yaml: no such file" in said
    assert "did you mean mine.yaml?" in said
    assert "orpo-lite recipes ls" in message("nowhere/at/all.yaml")


def test_a_folder_is_not_a_recipe(write: Write) -> None:
    write(MINIMAL)
    Path("folder").mkdir()
    said = message("folder/")
    assert "is a folder" in said
    assert "recipes cp NAME folder/recipe.yaml" in said


def test_a_name_never_leaves_the_shipped_folder() -> None:
    """With a / it is a path from here; without one it must be a shipped name."""
    assert "no such file" in message("../recipes/../nothing")
    assert "no shipped recipe has this name" in message("..")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    said = message("mistral-qlor")
    assert "--recipe mistral-qlor" in said
    assert "did you mean mistral-qlora" in said
    assert "recipes ls" in said


# --- bad values

BAD_VALUES: list[tuple[str, str, str]] = [
    ("lora.r", "true", "valid integer"),
    ("lora.r", "16.5", "valid integer"),
    ("lora.r", "0", "greater than or equal to 1"),
    ("lora.r", "-8", "greater than or equal to 1"),
    ("lora.r", "null", "valid integer"),
    ("lora.lora_dropout", "1.0", "less than 1"),
    ("lora.lora_dropout", "-0.1", "greater than or equal to 0"),
    ("lora.lora_dropout", "nan", "0"),
    ("lora.use_dora", "maybe", "valid boolean"),
    ("lora.target_modules", "[]", "at least 1 item"),
    ("lora.target_modules", "", "at least 1 item"),
    ("training.learning_rate", "0", "greater than 0"),
    ("training.learning_rate", "-5e-5", "greater than 0"),
    ("training.learning_rate", "nan", "finite number"),
    ("training.learning_rate", "inf", "finite number"),
    ("training.learning_rate", "fast", "valid number"),
    ("training.learning_rate", "true", "valid number"),
    ("training.lr_scheduler_type", "cosin", "'cosine', 'linear'"),
    (
        "training.warmup_steps",
        "1.5",
        "a share of all steps below 1 (such as 0.1), or a whole number of steps",
    ),
    ("training.warmup_steps", "-1", "or a whole number of steps"),
    ("training.warmup_steps", "nan", "a share of all steps below 1"),
    ("training.warmup_steps", "null", "a share of all steps below 1"),
    ("training.warmup_steps", "long", "expected: a share of all steps below 1"),
    ("training.eval_steps", "0", "greater than 0"),
    ("training.global_batch_size", "0", "greater than or equal to 1"),
    ("training.optim", "adamw_8bit", "'paged_adamw_8bit'"),
    ("training.output_dir", "", "at least 1 character"),
    ("training.seed", "4294967296", "less than 4294967296"),
    ("loss.beta", "-0.1", "greater than or equal to 0"),
    ("loss.beta", "nan", "finite number"),
    ("loss.beta", "inf", "finite number"),
    ("loss.type", "kto", "'orpo'"),
    ("model.dtype", "bf16", "'bfloat16'"),
    ("model.attn_implementation", "kernels-community/flash-attn", "from the hub is not run"),
    ("data.format", "csv", "'explicit', 'implicit'"),
    ("data.max_length", "four", "valid integer"),
    ("data.column_map", "question", "valid dictionary"),
    ("data.column_map", "prompt=question,chosen", "valid dictionary"),
    ("data.column_map", "{prompt: {a: b}}", "valid string"),
    ("data.column_map", "{prompt", "YAML"),
    ("data.chat_template_kwargs", "a=*b", "alias"),
    ("memory.activation_checkpointing", "some", "'auto', 'all' or 'none'"),
    ("memory.activation_checkpointing", "-1", "greater than or equal to 0"),
    ("output.samples", "21", "less than or equal to 20"),
    *(("output.hub_model_id", name, "owner/name") for name in BAD_REPOSITORIES),
]


@pytest.mark.parametrize(("key", "text", "expected"), BAD_VALUES)
def test_a_bad_value_is_answered_with_key_and_expectation(
    write: Write, key: str, text: str, expected: str
) -> None:
    said = message(write(MINIMAL), f"{key}={text}")
    assert said.startswith("command line:"), said
    assert said.count("\n") == 2
    assert f"expected: {expected}" in said or expected in said, said
    assert "fix: " in said
    assert key in said or "YAML" in said


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "eva", "lora_ga", "PiSSA"]
)
def test_an_initialisation_that_rewrites_the_base_is_refused(write: Write, name: str) -> None:
    said = message(write(MINIMAL), f"lora.init_lora_weights={name}")
    assert f"{name} changes the base" in said


def test_every_initialisation_of_peft_is_decided_on(write: Write) -> None:
    """A new name of peft's must be accepted or refused on purpose; whatever it is, it is no traceback."""
    from peft import LoraConfig

    annotation = str(inspect.signature(LoraConfig).parameters["init_lora_weights"].annotation)
    names = re.findall(r"""["']([\w-]+)["']""", annotation)
    assert "pissa" in names
    for name in names:
        with contextlib.suppress(RecipeError):
            recipe = load_recipe(write(MINIMAL), [f"lora.init_lora_weights={name}"])
            assert recipe.lora.init_lora_weights in ("gaussian", "orthogonal")


def test_the_prompt_limit_is_half_of_the_length_unless_it_is_set(write: Write) -> None:
    for override, limit in (
        ("data.max_length=512", 256),
        ("data.max_length=4096", 2048),
        ("data.max_length=9", 4),
    ):
        assert load_recipe(write(MINIMAL), [override]).data.prompt_limit == limit
    assert (
        load_recipe(
            write(MINIMAL), ["data.max_length=512", "data.max_prompt_length=500"]
        ).data.prompt_limit
        == 500
    )


def test_a_long_value_is_not_repeated_in_full(write: Write) -> None:
    assert len(message(write(MINIMAL + "lora:\n  r: " + "9x" * 10_000 + "\n"))) < 500


CONTRADICTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (
        ("data.max_length=512", "data.max_prompt_length=512"),
        ("data.max_prompt_length is 512", "data.max_length is 512", "data.max_prompt_length=auto"),
    ),
    (
        ("training.early_stopping_patience=2", "data.test_split_size=0"),
        ("training.early_stopping_patience is 2", "data.test_split_size is 0", "held-out"),
    ),
    (
        ("data.test_split_size=2.5",),
        ("data.test_split_size: 2.5", "a share below 1, or a whole number of pairs"),
    ),
    (
        ("quantization.load_in_4bit=false", "quantization.bnb_4bit_compute_dtype=float16"),
        (
            "quantization.load_in_4bit is false",
            "quantization.bnb_4bit_compute_dtype is float16",
            "model.dtype",
        ),
    ),
    (
        ("memory.packing=false", "memory.prompt_sharing=true"),
        ("memory.prompt_sharing is true", "memory.packing is false", "packed rows"),
    ),
    (
        ("memory.packing=false", "memory.head_chunk=64"),
        ("memory.head_chunk is 64", "memory.packing is false"),
    ),
    (
        ("memory.packing=false", "memory.micro_batch_tokens=64"),
        ("memory.micro_batch_tokens is 64", "packed rows"),
    ),
    (
        ("memory.checkpoint_offload=true", "memory.activation_checkpointing=none"),
        ("memory.checkpoint_offload is true", "memory.activation_checkpointing is none", "=all"),
    ),
]


@pytest.mark.parametrize(
    "override", ["memory.packing=false", "memory.activation_checkpointing=none", "lora.r=4"]
)
def test_a_runs_own_recipe_names_every_key_and_contradicts_nothing(
    write: Write, tmp_path: Path, override: str
) -> None:
    recipe = load_recipe(write(MINIMAL), [override])
    (tmp_path / "whole.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "whole.yaml")).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS)
def test_a_contradiction_names_both_keys(
    write: Write, overrides: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    said = message(write(MINIMAL), *overrides)
    assert said.startswith("command line:")
    assert [part for part in expected if part not in said] == [], said


@pytest.mark.parametrize(
    ("loss", "key", "value", "default"),
    [
        ("sft", "beta", "0.5", "0.1"),
        ("reward", "beta", "0.5", "0.1"),
        ("ppo", "beta", "0.5", "0.1"),
        ("ppo", "nll_reduction", "pair", "token"),
        ("ppo", "completion_only_loss", "true", "null"),
    ],
)
def test_a_setting_that_the_loss_does_not_use_is_refused(
    write: Write, loss: str, key: str, value: str, default: str
) -> None:
    more = [f"loss.type={loss}"]
    if loss == "ppo":
        more.append("loss.reward_adapter_name_or_path=reward/adapter")
    said = message(write(MINIMAL), *more, f"loss.{key}={value}")
    assert said.startswith("command line:")
    assert f"it has no effect on {loss}" in said
    assert said.endswith(f"fix: loss.{key}={default}")
    load_recipe(write(MINIMAL), [*more, f"loss.{key}={value}", f"loss.{key}={default}"])
    if key == "beta":  # a recipe that sets it works with any loss
        load_recipe(write(MINIMAL + "loss:\n  beta: 0.5\n"), more)


def test_all_faults_come_at_once(write: Write) -> None:
    name = write(
        "model:\n  model_name: x\ndata:\n  dataset_name: d\n  max_length: x\nlora:\n  r: 1\n  r: 2\n"
    )
    said = message(name, "training.learning_rate=fast", "nonsense")
    assert said.startswith("6 faults:\n")
    places = ["mine.yaml:2: unknown key", "mine.yaml:5: data.max_length", "mine.yaml:8: the key 'r'", "argument 'nonsense'",
              "command line: training.learning_rate", "model.model_name_or_path is not set"]  # fmt: skip
    assert [place for place in places if place not in said] == [], said


@pytest.mark.parametrize("count", [SHOWN, SHOWN + 1, 35])
def test_twenty_faults_are_shown_and_the_total_given(write: Write, count: int) -> None:
    name = write(MINIMAL + "lora:\n" + "".join(f"  key{i}: 1\n" for i in range(count)))
    said = message(name)
    assert said.startswith(f"{count} faults:\n")
    assert said.count("unknown key lora.key") == SHOWN
    assert said.endswith(f"... and {count - SHOWN} more") is (count > SHOWN)


# --- keys that are not ours


def test_an_unknown_key_is_answered_with_the_nearest(write: Write) -> None:
    said = message(write(MINIMAL + "training:\n  learnin_rate: 1\nlorra:\n  r: 8\n"))
    assert "mine.yaml:6: unknown key training.learnin_rate" in said
    assert "did you mean training.learning_rate?" in said
    assert "mine.yaml:7: unknown key lorra" in said
    assert "did you mean section lora?" in said


@pytest.mark.parametrize("section", ["", "training"])
def test_the_two_batch_keys_of_others_are_multiplied(write: Write, section: str) -> None:
    keys = "per_device_train_batch_size: 2", "gradient_accumulation_steps: 8"
    said = message(
        write(
            MINIMAL + (f"{section}:\n  " + "\n  ".join(keys) if section else "\n".join(keys)) + "\n"
        )
    )
    assert (
        said.count(
            "write training.global_batch_size: 16 (it counts the pairs of an optimizer step over all devices)"
        )
        == 2
    )
    dot = f"{section}." if section else ""
    said = message(write(MINIMAL), f"{dot}per_device_train_batch_size=4")
    assert "write training.global_batch_size: 4 (" in said
    said = message(
        write(MINIMAL),
        f"{dot}per_device_train_batch_size=auto",
        f"{dot}gradient_accumulation_steps=8",
    )
    assert said.count("write training.global_batch_size (") == 2


MEANT: dict[str, str] = {
    "warmup_ratio": "write training.warmup_steps (a value below 1 is a share of all steps)",
    "training.warmup_ratio": "write training.warmup_steps",
    "gradient_checkpointing": "write memory.activation_checkpointing (all, none, or a number of layers)",
    "lora_r": "write lora.r",
    "lora.lora_r": "write lora.r",
    "lora.rank": "",
    "load_in_4bit": "write quantization.load_in_4bit",
    "model.load_in_4bit": "write quantization.load_in_4bit",
    "learning_rate": "write training.learning_rate",
    "lora_alpha": "write lora.lora_alpha",
    "beta": "write loss.beta",
    "training.beta": "write loss.beta",
    "orpo_alpha": "write loss.beta",
    "base_model": "write model.model_name_or_path",
    "micro_batch_size": "write memory.micro_batch_size",
    "sequence_len": "write data.max_length",
    "report_to": "write training.report_to",
    "model.trust_remote_code": "leave the line out; code from the hub is never run",
    "bf16": "write model.dtype",
    "hub_model_id": "write output.hub_model_id",
    "training.push_to_hub": "write output.push_to_hub",
    "export_hub_model_id": "write output.hub_model_id",
    "hub_strategy": "leave the line out; the result is pushed once, at the end",
    "deepspeed": "so nothing is sharded",
    "training.evaluation_strategy": "write training.eval_steps",
    "resume_from_checkpoint": "orpo-lite train --resume",
    "lora.modules_to_save": "only LoRA is trained",
    "overwrite_output_dir": "another training.output_dir",
    "fsdp": "so nothing is sharded",
}


@pytest.mark.parametrize("key", MEANT)
def test_a_key_of_another_tool_is_answered_by_its_meaning(write: Write, key: str) -> None:
    said = message(write(MINIMAL), f"{key}=1")
    assert f"command line: unknown key {key}\n" in said
    assert f"fix: {MEANT[key]}" in said or MEANT[key] in said


def test_every_answer_leads_to_a_key_that_exists() -> None:
    all_keys = {f"{section}.{key}" for section, keys in KEYS.items() for key in keys}
    assert [ours for ours, _ in FOREIGN.values() if ours and ours not in all_keys] == []
    assert [theirs for theirs, (ours, remark) in FOREIGN.items() if not ours and not remark] == []


def test_a_positional_without_an_equals_sign_names_the_option(write: Write) -> None:
    name = write(MINIMAL)
    assert "orpo-lite train --recipe demo" in message(name, "demo")
    said = message(name, "fast")
    assert "argument 'fast': is not an override" in said
    assert "section.key=value" in said


# --- secrets

LEAKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "as a value": (MINIMAL + f"training:\n  output_dir: {TOKEN}\n", ()),
    "inside a value": (MINIMAL + f"training:\n  output_dir: https://x:{TOKEN}@hub\n", ()),
    "under a key named token": (MINIMAL + "hub_token: secret\n", ()),
    "under an unknown key": (MINIMAL + f"output:\n  auth: {TOKEN}\n", ()),
    "as a key": (MINIMAL + f"{TOKEN}: 1\n", ()),
    "as a section's text": (MINIMAL + f"lora: {TOKEN}\n", ()),
    "twice": (MINIMAL + f"lora:\n  {TOKEN}: 1\n  {TOKEN}: 1\n", ()),
    "as an anchor": (MINIMAL + f"lora: &{TOKEN}\n  r: 8\n", ()),
    "in a mapping": (MINIMAL + f"  chat_template_kwargs: {{a: [{TOKEN}]}}\n", ()),
    "on the command line": (MINIMAL, (f"output.hub_token={TOKEN}",)),
    "as an argument": (MINIMAL, (TOKEN,)),
    "as a key on the command line": (MINIMAL, (f"{TOKEN}=1",)),
}


@pytest.mark.parametrize("case", LEAKS)
def test_a_token_is_refused_and_never_shown(write: Write, case: str) -> None:
    text, overrides = LEAKS[case]
    said = message(write(text), *overrides)
    assert TOKEN not in said
    assert TOKEN[3:20] not in said
    assert "secret" not in said.replace("no access token in a recipe", "")


def test_a_token_is_shown_by_no_error_at_all() -> None:
    error = HubError(
        where=f"hub {TOKEN}", found=f"said {TOKEN}", expected=f"not {TOKEN}", fix=f"use {TOKEN}"
    )
    assert TOKEN not in str(error)
    assert TOKEN not in repr(error)
    assert TOKEN not in message(TOKEN)


# --- writing it out


def same(one: Recipe, other: Recipe) -> bool:
    return dict(one.items()) == dict(other.items())


# The fixture's folder is only written over, and a busy machine is no fault of the recipe's.
FUZZ = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_.0123456789", min_size=1, max_size=12)
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20
) | st.text("ab:#-'\" \n\t{}[],&*!|>%@`?0123456789.eE+~\x85\u2028é", min_size=1, max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "model.model_name_or_path": TEXTS,
    "model.model_revision": TEXTS,
    "model.adapter_name_or_path": st.none() | TEXTS,
    "lora.r": st.integers(1, 4096),
    "lora.lora_dropout": st.floats(0, 1, exclude_max=True),
    "lora.target_modules": st.just("all-linear") | st.lists(NAMES, min_size=1, max_size=3),
    "lora.init_lora_weights": st.sampled_from([True, "gaussian", "orthogonal"]),
    "data.column_map": st.dictionaries(
        TEXTS, TEXTS | st.lists(TEXTS, min_size=1, max_size=3), max_size=3
    ),
    "data.chat_template": TEXTS,
    "data.chat_template_kwargs": st.dictionaries(TEXTS, JSON, max_size=3),
    "data.max_samples": st.none() | st.integers(1, 10**9),
    "loss.beta": st.floats(0, 1e6),
    "loss.completion_only_loss": st.booleans(),
    "training.learning_rate": st.floats(1e-12, 1e3),
    "training.warmup_steps": st.floats(0, 1, exclude_max=True) | st.integers(0, 10**6),
    "training.seed": st.integers(0, 2**32 - 1),
    "memory.activation_checkpointing": st.sampled_from(["auto", "all", "none"])
    | st.integers(0, 200),
}


@FUZZ
@given(values=st.fixed_dictionaries({}, optional=VALID), comments=st.booleans())
@example(values={"model.model_name_or_path": "0\xa0"}, comments=False)
@example(values={"model.model_name_or_path": "\xa0"}, comments=True)
def test_any_recipe_survives_being_written_and_read(
    write: Write, values: dict[str, Any], comments: bool
) -> None:
    recipe = load_recipe("demo").override(values)
    text = recipe.to_yaml(comments=comments)
    assert all(line.startswith(("  ", *KEYS)) for line in text.splitlines())
    assert same(load_recipe(write(text)), recipe)


@FUZZ
@given(
    parts=st.lists(
        st.sampled_from([*"abr: 8-[]{}&*!|>'\"%@#,\n\t", "model:\n  ", "lora:\n  r: ", "\ufeff"]),
        max_size=30,
    )
)
def test_any_text_gives_a_recipe_or_a_fault(write: Write, parts: list[str]) -> None:
    with contextlib.suppress(RecipeError):
        assert load_recipe(write("".join(parts)), NEEDED).model.model_name_or_path == "some/base"


def test_a_value_stays_on_one_line() -> None:
    assert to_text("{% for m in messages %}\n{{ m }}\n") == '"{% for m in messages %}\\n{{ m }}\\n"'
    assert to_text(None) == "null"
    assert to_text({"a": ["x" * 300, "b c"]}) == "{a: [" + "x" * 300 + ", b c]}"


def test_a_date_for_a_template_is_its_text(write: Callable[[str], str]) -> None:
    name = write(MINIMAL + "  chat_template_kwargs: {date_string: 2024-07-26, n: [1, true]}\n")
    assert load_recipe(name).data.chat_template_kwargs == {
        "date_string": "2024-07-26",
        "n": [1, True],
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_show_prints_every_key_with_its_meaning(write: Write, name: str) -> None:
    recipe = load_recipe(name)
    text = recipe.to_yaml(comments=True)
    assert same(load_recipe(write(text)), recipe)
    assert yaml.safe_load(text).keys() == KEYS.keys()
    for section, keys in KEYS.items():
        fields = type(getattr(recipe, section)).model_fields
        for key in keys:
            comments = text[: text.index(f"\n  {key}: ")].replace("\n  # ", " ")
            assert comments.endswith(f" {fields[key].description}")


# --- the shipped recipes

SPELLED_OUT = {
    "loss.beta"
}  # equal to the default in some recipes, and the one value that the paper gives per model
LAMBDA = {  # PAPER.md: Mistral 0.1, Llama-2 0.2, Phi-2 0.25, OPT 1.0; 0.1 where the paper has none
    "mistral-qlora": 0.1, "mistral-orpo-beta-qlora": 0.1, "llama2-7b-qlora": 0.2, "llama3-8b-qlora": 0.1,
    "qwen2.5-7b-qlora": 0.1, "qwen2.5-32b-qlora": 0.1, "llama3-70b-qlora": 0.1, "qwen3-8b-qlora": 0.1,
    "qwen3-4b-qlora": 0.1, "llama3.2-3b-qlora": 0.1, "gemma3-4b-qlora": 0.1, "smollm2-135m": 0.1,
    "phi2-qlora": 0.25, "opt-125m": 1.0, "opt-350m": 1.0, "opt-1.3b": 1.0,
    "paper-orpo": 1.0,
}  # fmt: skip
# PAPER.md: loss, epochs, and ten times the paper's learning rate (reward: that of SFT; ppo: its own)
ARMS = {
    "paper-orpo": ("orpo", 10, 8e-5), "paper-sft": ("sft", 1, 1e-4), "paper-dpo": ("dpo", 3, 5e-5),
    "paper-reward": ("reward", 1, 1e-4), "paper-ppo": ("ppo", 1, 1e-5),
}  # fmt: skip


def test_the_shipped_recipes_are_those_with_a_lambda_the_arms_and_the_demo() -> None:
    assert set(shipped_recipes()) == {*LAMBDA, *ARMS, "demo"}
    assert {path.parent for path in shipped_recipes().values()} == {CHECKOUT}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_holds_only_what_differs_from_the_schema(name: str) -> None:
    path = find_recipe(name)
    recipe = load_recipe(name)
    written = {key for key, source in recipe.sources.items() if source != "default"}
    defaults = {
        f"{section}.{key}": field.default
        for section in KEYS
        for key, field in type(getattr(recipe, section)).model_fields.items()
    }
    same_as_default = {
        key for key in written - SPELLED_OUT if dict(recipe.items())[key] == defaults[key]
    }
    assert same_as_default == set()
    assert recipe.training.output_dir == f"runs/{name}"
    headline = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{10,100}[^.]", headline)
    assert all(len(line) <= 120 for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", LAMBDA)
def test_a_shipped_recipe_spells_out_the_lambda_of_its_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.loss.beta == LAMBDA[name]
    assert recipe.sources["loss.beta"].startswith(f"{name}.yaml:")


def test_the_arms_of_the_paper_differ_in_the_objective_only() -> None:
    arms = {name: load_recipe(name) for name in ARMS}
    for name, recipe in arms.items():
        training = recipe.training
        assert ARMS[name] == (recipe.loss.type, training.num_train_epochs, training.learning_rate)
    chosen = {"loss.type", "loss.beta", "model.adapter_name_or_path"} | {
        f"training.{key}" for key in ("output_dir", "num_train_epochs", "learning_rate")
    }
    of_ppo = {"training.global_batch_size": 64, "loss.response_length": 256}
    of_ppo["loss.reward_adapter_name_or_path"] = (
        f"{arms['paper-reward'].training.output_dir}/adapter"
    )
    ppo = arms["paper-ppo"]
    assert {key: dict(ppo.items())[key] for key in of_ppo} == of_ppo
    arms["paper-ppo"] = ppo.override({key: dict(arms["paper-dpo"].items())[key] for key in of_ppo})
    shared = [
        {key: value for key, value in recipe.items() if key not in chosen}
        for recipe in arms.values()
    ]
    assert shared == [shared[0]] * len(ARMS)
    starts = {name: recipe.model.adapter_name_or_path for name, recipe in arms.items()}
    of_sft = f"{arms['paper-sft'].training.output_dir}/adapter"
    assert starts == dict.fromkeys(ARMS, None) | dict.fromkeys(("paper-dpo", "paper-ppo"), of_sft)
    assert arms["paper-dpo"].loss.beta == 0.1
    early = {"training.early_stopping_patience": 3, "training.output_dir": "runs/opt-350m"}
    assert dict(arms["paper-orpo"].items()) | early == dict(load_recipe("opt-350m").items())


def test_mistral_orpo_beta_has_the_hyper_parameters_of_the_authors() -> None:
    recipe = load_recipe("mistral-orpo-beta-qlora")
    training, data = recipe.training, recipe.data
    assert (training.learning_rate, training.num_train_epochs, training.warmup_steps) == (
        5e-6,
        5,
        200,
    )
    assert (training.lr_scheduler_type, training.global_batch_size) == ("inverse_sqrt", 4 * 8)
    assert (data.max_length, data.max_prompt_length) == (2048, 1792)
    assert data.dataset_name == "argilla/ultrafeedback-binarized-preferences-cleaned"
    assert "They trained all weights" in find_recipe("mistral-orpo-beta-qlora").read_text(
        encoding="utf-8"
    )


# --- names are borrowed from their owners

OURS = ""
OWNERS: dict[str, tuple[str, str]] = {
    "model.model_name_or_path": ("trl.ModelConfig", "model_name_or_path"),
    "model.model_revision": ("trl.ModelConfig", "model_revision"),
    "model.adapter_name_or_path": (OURS, "after LLaMA-Factory"),
    "model.device": (OURS, "as torch names it"),
    "model.dtype": ("trl.ModelConfig", "dtype"),
    "model.attn_implementation": ("trl.ModelConfig", "attn_implementation"),
    "quantization.load_in_4bit": ("transformers.BitsAndBytesConfig", "load_in_4bit"),
    "quantization.bnb_4bit_quant_type": ("transformers.BitsAndBytesConfig", "bnb_4bit_quant_type"),
    "quantization.bnb_4bit_use_double_quant": (
        "transformers.BitsAndBytesConfig",
        "bnb_4bit_use_double_quant",
    ),
    "quantization.bnb_4bit_compute_dtype": (
        "transformers.BitsAndBytesConfig",
        "bnb_4bit_compute_dtype",
    ),
    "lora.r": ("peft.LoraConfig", "r"),
    "lora.lora_alpha": ("peft.LoraConfig", "lora_alpha"),
    "lora.lora_dropout": ("peft.LoraConfig", "lora_dropout"),
    "lora.target_modules": ("peft.LoraConfig", "target_modules"),
    "lora.use_rslora": ("peft.LoraConfig", "use_rslora"),
    "lora.use_dora": ("peft.LoraConfig", "use_dora"),
    "lora.init_lora_weights": ("peft.LoraConfig", "init_lora_weights"),
    "data.dataset_name": ("trl.ScriptArguments", "dataset_name"),
    "data.dataset_config": ("trl.ScriptArguments", "dataset_config"),
    "data.dataset_train_split": ("trl.ScriptArguments", "dataset_train_split"),
    "data.dataset_test_split": ("trl.ScriptArguments", "dataset_test_split"),
    "data.test_split_size": (
        OURS,
        "test_size of datasets.train_test_split splits rows; this splits prompts",
    ),
    "data.format": (OURS, ""),
    "data.column_map": (OURS, ""),
    "data.max_samples": (OURS, "after LLaMA-Factory"),
    "data.max_bad_rows": (OURS, ""),
    "data.max_length": ("trl.experimental.orpo.ORPOConfig", "max_length"),
    "data.max_prompt_length": (OURS, "in TRL's ORPOConfig until 1.0; there it cut, here it drops"),
    "data.chat_template": (
        "transformers.PreTrainedTokenizerBase.apply_chat_template",
        "chat_template",
    ),
    "data.chat_template_kwargs": ("trl.GRPOConfig", "chat_template_kwargs"),
    "loss.type": (OURS, ""),
    "loss.beta": ("trl.experimental.orpo.ORPOConfig", "beta"),
    "loss.completion_only_loss": ("trl.SFTConfig", "completion_only_loss"),
    "loss.nll_reduction": (OURS, ""),
    "loss.dpo_loss_type": (OURS, ""),  # TRL's loss_type, which other sections would take for theirs
    "loss.label_smoothing": ("trl.DPOConfig", "label_smoothing"),
    "loss.rpo_alpha": (OURS, ""),  # TRL's name until loss_weights replaced it
    "loss.cpo_alpha": ("trl.experimental.cpo.CPOConfig", "cpo_alpha"),
    "loss.simpo_gamma": ("trl.experimental.cpo.CPOConfig", "simpo_gamma"),
    "loss.ratio_of": (OURS, ""),
    "loss.reference_adapter_name_or_path": (OURS, ""),
    "loss.reward_adapter_name_or_path": (OURS, ""),
    "loss.response_length": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.temperature": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.num_ppo_epochs": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.ppo_mini_batch_size": (OURS, ""),
    "loss.kl_coef": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.kl_target": (OURS, ""),
    "loss.kl_horizon": (OURS, ""),
    "loss.gamma": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.lam": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.cliprange": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.cliprange_value": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.vf_coef": (OURS, "in TRL's PPOConfig until 1.0"),
    "loss.center_rewards_coefficient": ("trl.RewardConfig", "center_rewards_coefficient"),
    "training.output_dir": ("transformers.TrainingArguments", "output_dir"),
    "training.learning_rate": ("transformers.TrainingArguments", "learning_rate"),
    "training.global_batch_size": (OURS, "pairs per optimizer step over all devices"),
    "training.num_train_epochs": ("transformers.TrainingArguments", "num_train_epochs"),
    "training.max_steps": ("transformers.TrainingArguments", "max_steps"),
    "training.lr_scheduler_type": ("transformers.TrainingArguments", "lr_scheduler_type"),
    "training.warmup_steps": ("transformers.TrainingArguments", "warmup_steps"),
    "training.optim": ("transformers.TrainingArguments", "optim"),
    "training.adam_beta1": ("transformers.TrainingArguments", "adam_beta1"),
    "training.adam_beta2": ("transformers.TrainingArguments", "adam_beta2"),
    "training.adam_epsilon": ("transformers.TrainingArguments", "adam_epsilon"),
    "training.weight_decay": ("transformers.TrainingArguments", "weight_decay"),
    "training.max_grad_norm": ("transformers.TrainingArguments", "max_grad_norm"),
    "training.eval_steps": ("transformers.TrainingArguments", "eval_steps"),
    "training.load_best_model_at_end": ("transformers.TrainingArguments", "load_best_model_at_end"),
    "training.early_stopping_patience": (
        "transformers.EarlyStoppingCallback",
        "early_stopping_patience",
    ),
    "training.seed": ("transformers.TrainingArguments", "seed"),
    "training.full_determinism": ("transformers.TrainingArguments", "full_determinism"),
    "training.report_to": ("transformers.TrainingArguments", "report_to"),
    "memory.budget": (OURS, "peers ask for batch size and accumulation, and find out"),
    "memory.packing": (OURS, "TRL's SFTConfig packs by cutting; here pairs stay whole"),
    "memory.prompt_sharing": (OURS, ""),
    "memory.micro_batch_tokens": (OURS, ""),
    "memory.micro_batch_size": (OURS, ""),
    "memory.head_chunk": (OURS, ""),
    "memory.fused_lora": (OURS, ""),
    "memory.activation_checkpointing": (
        OURS,
        "a truth value in TrainingArguments; here also a number of layers",
    ),
    "memory.checkpoint_offload": (OURS, ""),
    "memory.mlp_tile": (OURS, ""),
    "memory.embedding_on_cpu": (OURS, ""),
    "memory.shard": (OURS, ""),
    "output.merge": (OURS, ""),
    "output.report": (OURS, ""),
    "output.samples": (OURS, ""),
    "output.max_new_tokens": (
        OURS,
        "after transformers' GenerationConfig, which takes any keyword",
    ),
    "output.push_to_hub": ("transformers.TrainingArguments", "push_to_hub"),
    "output.hub_model_id": ("transformers.TrainingArguments", "hub_model_id"),
    "output.hub_private_repo": ("transformers.TrainingArguments", "hub_private_repo"),
    "output.send_report": (OURS, ""),
}


def test_every_key_has_an_owner_or_is_ours() -> None:
    assert list(OWNERS) == [key for key, _ in load_recipe("demo").items()]
    assert [
        key for key, (owner, field) in OWNERS.items() if owner and field != key.partition(".")[2]
    ] == []


def test_the_owners_still_call_them_so() -> None:
    import peft
    import transformers
    import trl

    with warnings.catch_warnings(action="ignore"):  # TRL warns that its ORPO is experimental
        from trl.experimental.cpo import CPOConfig
        from trl.experimental.orpo import ORPOConfig

    experimental: dict[str, Any] = {"ORPOConfig": ORPOConfig, "CPOConfig": CPOConfig}
    places = {"trl": trl, "transformers": transformers, "peft": peft}
    missing = []
    for key, (owner, field) in OWNERS.items():
        if not owner:
            continue
        first, *parts = owner.split(".")
        thing: Any = experimental.get(parts[-1])
        if thing is None:
            thing = places[first]
            for part in parts:
                thing = getattr(thing, part)
        known = (
            {f.name for f in dataclasses.fields(thing)}
            if dataclasses.is_dataclass(thing)
            else set()
        )
        if field not in known | set(inspect.signature(thing).parameters):
            missing.append(f"{key}: {owner}({field})")
    assert missing == []


def test_the_values_offered_are_the_owners_own() -> None:
    """A Literal of ours that the owner does not know would fail after the weights have loaded."""
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    fields = type(load_recipe("demo").training).model_fields
    schedulers = set(fields["lr_scheduler_type"].annotation.__args__)  # type: ignore[union-attr]
    optimizers = set(fields["optim"].annotation.__args__)  # type: ignore[union-attr]
    assert schedulers <= {member.value for member in SchedulerType}
    assert optimizers <= {member.value for member in OptimizerNames}


def test_the_schema_needs_no_torch() -> None:
    code = "import sys, orpo_lite; orpo_lite.load_recipe('demo'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
