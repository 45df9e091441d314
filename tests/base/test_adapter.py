"""An adapter to train on from sets all of `lora`: a recipe that says otherwise is refused."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model

from orpo_lite.base.adapter import INITIAL, REFERENCE, adopt_adapter, missing_adapters
from orpo_lite.errors import Command, ModelError, Overrides, RecipeError
from orpo_lite.recipe.schema import Recipe

Build = Callable[..., Recipe]
FROM = "model.adapter_name_or_path=./adapter"


def write_adapter(folder: Path, **options: Any) -> None:
    """An adapter of the workspace's base, as peft writes it."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    get_peft_model(tiny_llama(len(byte_tokenizer())), config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"target_modules": ["v_proj", "q_proj"]}, ["q_proj", "v_proj"]),
        (
            {
                "target_modules": ["q_proj", "v_proj"],
                "layers_to_transform": [1],
                "rank_pattern": {"v_proj": 2},
            },
            ["q_proj", "v_proj"],
        ),
        (
            {"target_modules": r".*layers\.1\..*\.(up|down)_proj"},
            ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"],
        ),
    ],
)
def test_the_recipe_states_what_the_adapter_adapts(
    small_recipe: Build, workspace: Path, options: dict[str, Any], found: list[str]
) -> None:
    write_adapter(workspace / "adapter", **options)
    lora = adopt_adapter(small_recipe(FROM)).lora
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 8, found)


def test_what_a_recipe_says_beside_an_adapter_is_the_adapter_s_or_refused(
    small_recipe: Build, workspace: Path
) -> None:
    write_adapter(workspace / "adapter", target_modules=["q_proj", "v_proj"])
    said = (
        "lora.r=8",
        "lora.lora_alpha=32",
        "lora.target_modules=all-linear",
        "lora.init_lora_weights=gaussian",
    )
    with pytest.raises(RecipeError, match="4 faults") as raised:
        adopt_adapter(small_recipe(FROM, *said))
    fix = raised.value.fix
    assert isinstance(fix, Overrides)
    assert fix.startswith(
        "lora.r=4 lora.lora_alpha=8 lora.target_modules=q_proj,v_proj lora.init_lora_weights=true"
    )
    words = shlex.split(fix.partition(", or")[0])
    for recipe in (
        small_recipe(FROM, *said, *words),
        small_recipe(FROM, *said).override(fix.values),
    ):
        assert adopt_adapter(recipe).lora == adopt_adapter(small_recipe(FROM)).lora
    with pytest.raises(
        RecipeError, match=r"lora\.r: 8"
    ):  # and in a notebook, where no file or line is its source
        adopt_adapter(small_recipe(FROM).override({"lora.r": 8}))
    same = small_recipe(FROM, "lora.r=4", "lora.target_modules=v_proj,q_proj")
    assert adopt_adapter(same).lora.target_modules == ["q_proj", "v_proj"]


def test_an_adapter_of_experts_names_them(small_recipe: Build, workspace: Path) -> None:
    write_adapter(workspace / "adapter", target_modules=["q_proj"])
    file = workspace / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_parameters": ["mlp.experts.gate_up_proj"]}))
    assert adopt_adapter(small_recipe(FROM)).lora.target_modules == [
        "mlp.experts.gate_up_proj",
        "q_proj",
    ]


def test_a_rank_may_be_written_as_a_fraction(small_recipe: Build, workspace: Path) -> None:
    write_adapter(workspace / "adapter", target_modules=["q_proj"])
    file = workspace / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4.0}))
    assert repr(adopt_adapter(small_recipe(FROM)).lora.r) == "4"


def test_an_adapter_that_is_not_there_is_said_with_the_command_that_makes_it(
    small_recipe: Build, workspace: Path
) -> None:
    def fix(name: str) -> str:
        with pytest.raises(ModelError) as raised:
            adopt_adapter(small_recipe(f"{INITIAL}={name}"))
        assert raised.value.where == f"{INITIAL}: {name}"
        fix = raised.value.fix
        return fix.line if isinstance(fix, Command) else fix

    first = "orpo-lite train --recipe paper-sft"
    assert fix("runs/paper-sft/adapter") == fix(str(workspace / "runs/paper-sft/adapter")) == first
    for name in ("./elsewhere", "elsewhere/paper-sft/adapter", "runs/unknown/adapter"):
        assert "correct the path" in fix(name)
    run = workspace / "runs" / "paper-sft"
    (run / "adapter").mkdir(parents=True)  # that of a training that has not ended
    (run / "recipe.yaml").touch()
    assert fix("runs/paper-sft/adapter") == "orpo-lite train --resume runs/paper-sft"


def test_only_local_adapters_are_looked_for(small_recipe: Build, workspace: Path) -> None:
    write_adapter(workspace / "adapter", target_modules=["q_proj"])
    both = ("loss.type=dpo", f"{REFERENCE}=./nowhere")
    assert missing_adapters(small_recipe(*both, FROM)).keys() == {REFERENCE}
    (workspace / "adapter" / "adapter_model.safetensors").unlink()
    for name in ("./adapter", "adapter"):
        missing = missing_adapters(small_recipe(*both, f"{INITIAL}={name}"))
        assert missing.keys() == {INITIAL, REFERENCE}
    of_hub = (f"{INITIAL}=owner/start", "loss.type=dpo", f"{REFERENCE}=owner/reference")
    assert missing_adapters(small_recipe(*of_hub)) == {}
    assert missing_adapters(small_recipe("loss.type=dpo", f"{REFERENCE}=base")) == {}
