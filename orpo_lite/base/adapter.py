"""Find, download and check a LoRA adapter."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orpo_lite.base.download import ADAPTER, ADAPTER_WEIGHTS, download, refuse_pointers, resolve
from orpo_lite.errors import Command, ModelError, Overrides, RecipeError, raise_all
from orpo_lite.recipe.reader import load_recipe, shipped_recipes
from orpo_lite.recipe.schema import LoraSection, Recipe
from orpo_lite.recipe.text import to_text
from orpo_lite.recipe.values import has_form_of_path

INITIAL, REFERENCE = "model.adapter_name_or_path", "loss.reference_adapter_name_or_path"
REWARD = "loss.reward_adapter_name_or_path"


def named_adapters(recipe: Recipe) -> dict[str, str]:
    """Return the adapters that a training reads: key that names an adapter -> its name."""
    names = {
        INITIAL: recipe.model.adapter_name_or_path,
        REFERENCE: recipe.loss.reference_adapter,
        REWARD: recipe.loss.reward_adapter_name_or_path,
    }
    return {key: name for key, name in names.items() if name}


def missing_adapters(recipe: Recipe) -> dict[str, ModelError]:
    """Return the local adapters that a recipe names and that are not there: key -> error.

    The hub is not asked for other adapters.
    """
    missing = {}
    for key, name in named_adapters(recipe).items():
        if has_form_of_path(name) or Path(name).is_dir():
            try:
                find_adapter(name, key)
            except ModelError as error:
                missing[key] = error
    return missing


def find_adapter(name: str, key: str = INITIAL) -> Path:
    """Return the folder of a LoRA adapter. Download it if ``name`` is a hub name, not a folder.

    ``key``: the setting that names the adapter, for error messages.

    Raises:
        ModelError: there is no such folder, or it holds no peft adapter in safetensors format.
        HubError: the adapter cannot be downloaded.
    """
    local = Path(name).expanduser()
    if has_form_of_path(name) and not local.is_dir():
        raise ModelError(
            where=f"{key}: {name}",
            found="no such folder",
            expected=f"a folder with {' and '.join(ADAPTER)}, or a hub name",
            fix=_how_to_make(local),
        )
    folder = local if local.is_dir() else download(name, resolve(name, "main", ADAPTER), ADAPTER)
    for file in ADAPTER:
        if not (folder / file).is_file():
            raise ModelError(
                where=f"{key}: {name}",
                found=f"has no {file}",
                expected="a peft LoRA adapter in safetensors",
                fix=_how_to_make(local) if local.is_dir() else "",
            )
    refuse_pointers(folder, ADAPTER)
    return folder


def _how_to_make(folder: Path) -> str:
    """Return the fix for a missing adapter: the command that trains it, if it is known.

    The command is known if the folder is ``RUN/adapter``, and RUN is a run that has not ended, or
    the run folder of a shipped recipe.
    """
    run = folder.parent
    if folder.name == "adapter":
        if (run / "recipe.yaml").is_file():
            return Command(f"orpo-lite train --resume {shlex.quote(str(run))}")
        if run.name in shipped_recipes():
            output_dir = Path(load_recipe(run.name).training.output_dir)
            if output_dir.resolve() == run.resolve():
                return Command(f"orpo-lite train --recipe {run.name}", ", which makes the adapter")
    return "correct the path, or make the adapter first"


def note_on_base(folder: Path, base: str, key: str) -> Iterator[str]:
    """Yield a note if an adapter's configuration names another base than ``base``.

    ``key``: the setting that names the adapter.
    """
    trained_on = base_of_adapter(folder)
    if trained_on and not same_base(trained_on, base):
        yield (
            f"{key}: according to its configuration, the adapter was trained on {trained_on}, "
            f"but the base is {base}; an adapter is useless on another base"
        )


def reference_folder(recipe: Recipe) -> Path | None:
    """Return the folder of the reference model's adapter; None if the base alone is the reference.

    By default the reference is the model before the first step: the adapter that the training
    starts from, or the base.
    """
    name = reference_name(recipe)
    return find_adapter(name) if name else None


def reference_name(recipe: Recipe) -> str | None:
    """Return the name of the reference model's adapter; None if the base is the reference."""
    if recipe.loss.reference_adapter_name_or_path is not None:
        return recipe.loss.reference_adapter
    return recipe.model.adapter_name_or_path


def base_of_adapter(folder: Path) -> str | None:
    """Read the base's name from an adapter's configuration. Return None if the name is missing.

    The name is a hub name or the path of a folder.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def same_base(one: str, other: str) -> bool:
    """Return True if two names may refer to the same base. A name is a hub name or a folder.

    If both names are folders with a config.json, the two files are compared. Otherwise the last
    parts of the names are compared, because a folder often has the name of its hub repository:
    "org/model-7b" and "/data/model-7b" -> True.
    """
    names, configs = set(), []
    for name in (one, other):
        path = Path(name).expanduser()
        cached = [part for part in path.parts if part.startswith("models--")]  # the hub's cache
        repository = cached[0] if cached else path.name
        names.add(repository.rsplit("--", 1)[-1].lower())
        if (path / "config.json").is_file():
            configs.append((path / "config.json").read_bytes())
    return configs[0] == configs[1] if len(configs) == 2 else len(names) == 1


CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"  # peft's task types: a language model, a reward model
SCORE_HEADS = frozenset({"classifier", "score"})  # peft saves layers of these names for SEQ_CLS

# Options of LoraConfig that an adapter may set. Other options must have their default values.
ADAPTER_KEYS = (
    "r lora_alpha lora_dropout target_modules use_rslora use_dora rank_pattern alpha_pattern "
    "init_lora_weights exclude_modules target_parameters layers_to_transform layers_pattern "
    "fan_in_fan_out auto_mapping base_model_name_or_path inference_mode peft_version revision "
    "task_type"
).split()

EMBEDDINGS = ("embed", "lm_head", "wte", "wpe")  # parts of the names of input and output embeddings
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # valid values of vLLM's --max-lora-rank


def not_in_vllm(config: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return a feature of an adapter that vLLM does not support, such as "DoRA".

    Return "" if vLLM supports the adapter. The reasons for two of the features:

    - Other ranks or scales for some layers: vLLM uses one scale, ``lora_alpha / r``, for all layers
      of an adapter (source: vLLM's PEFTHelper).
    - An adapter of a part of a larger model, such as the language model of an image-and-text model:
      vLLM builds the larger model. The larger model's layers have other names than the adapter's
      layers.

    Args:
        config: the adapter's configuration.
        base: the ``base`` entry of lock.json.
    """
    if base.get("wrapper"):  # runs of older versions did not record it
        return "an adapter of a part of the base (the layer names differ in the whole base)"
    if config.get("use_dora"):
        return "DoRA"
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "target_parameters")):
        return "different ranks or scales per layer, or adapted experts"
    targets = config.get("target_modules") or ()
    named = targets if isinstance(targets, str) else " ".join(targets)  # a string is a regex
    if any(name in named for name in EMBEDDINGS):
        return "an adapter with embeddings"  # peft saves full embeddings in addition to A and B
    return "" if config["r"] <= VLLM_RANKS[-1] else f"a rank of {config['r']}"


def vllm_rank(config: Mapping[str, Any], base: Mapping[str, Any]) -> int | None:
    """Return the value of vLLM's option ``--max-lora-rank`` for an adapter.

    Return None if vLLM cannot serve the adapter.
    """
    if not_in_vllm(config, base):
        return None
    return next(rank for rank in VLLM_RANKS if rank >= config["r"])


def read_adapter_config(folder: Path) -> Any:
    """Read the peft configuration of a LoRA adapter, and set ``inference_mode`` to False.

    Raises:
        ModelError: the configuration is invalid, the adapter is not plain LoRA, or the adapter's
            initialisation changed the base's weights.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        options = dict(raw)
    except (ValueError, TypeError) as error:
        raise ModelError(
            where=str(path), found=f"is not a JSON object: {error}", expected="a peft configuration"
        ) from None
    if options.get("task_type") not in (None, CAUSAL_LM, SEQ_CLS):
        raise ModelError(
            where=str(path),
            found=f"task_type: {options['task_type']!r}",
            expected=f"{CAUSAL_LM!r} or {SEQ_CLS!r}, because an adapter for another type of model "
            "does not fit",
            fix=Overrides({"model.adapter_name_or_path": None}, ", which trains a new adapter"),
        )
    # If a value is missing, peft would use its default. That would change the adapter.
    saved = "that the adapter was trained with"
    for key in ("r", "lora_alpha"):
        value: Any = options.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value <= 0 or value != int(value):
            raise ModelError(
                where=str(path),
                found=f"{key}: {json.dumps(value)}",
                expected=f"the whole number {saved}",
            )
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ModelError(
            where=str(path), found="has no target_modules", expected=f"the target_modules {saved}"
        )
    default = LoraConfig().to_dict()
    saved_modules = options.get("modules_to_save") or ()
    if options.get("task_type") == SEQ_CLS and SCORE_HEADS.issuperset(saved_modules):
        default["modules_to_save"] = saved_modules
    for key, value in options.items():
        if value and key not in ADAPTER_KEYS and value != default.get(key):
            raise ModelError(
                where=str(path),
                found=f"{key}: {value!r}",
                expected=f"a plain LoRA adapter, which does not set {key}",
            )
    init = options.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            where=str(path),
            found=f"init_lora_weights: {init!r}",
            expected="an initialisation that does not change the base's weights",
        )
    config = LoraConfig.from_pretrained(folder)
    config.r = int(config.r)  # some tools write 4.0
    config.inference_mode = False  # saved adapters are set to inference
    config.init_lora_weights = True  # irrelevant: the adapter's own weights are loaded later
    return config


def adopt_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe with the lora settings of the adapter in model.adapter_name_or_path.

    This adapter exists already and will be trained further. If model.adapter_name_or_path is not
    set, return the recipe unchanged.

    Raises:
        RecipeError: the recipe sets a key of the section lora, and the adapter has another value.
    """
    if not recipe.model.adapter_name_or_path:
        return recipe
    folder = find_adapter(recipe.model.adapter_name_or_path)
    config = read_adapter_config(folder)
    shape = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    values = {f"lora.{key}": getattr(config, key) for key in shape}
    values["lora.target_modules"] = adapted_modules(config, folder)
    values["lora.init_lora_weights"] = True  # irrelevant: the adapter's own weights are loaded
    defaults = LoraSection()
    differing = {}
    for key, wanted in recipe.items():
        if key not in values or values[key] == (
            sorted(wanted) if isinstance(wanted, list) else wanted
        ):
            continue
        default = getattr(defaults, key.removeprefix("lora."))
        if recipe.sources[key] != "default" or wanted != default:
            differing[key] = wanted
    own = {}
    for key in differing:
        value = values[key]
        own[key] = ",".join(value) if isinstance(value, list) else value
    raise_all(
        [
            RecipeError(
                where=recipe.sources[key],
                found=f"{key}: {to_text(wanted)} differs from the adapter in "
                "model.adapter_name_or_path",
                expected=f"{to_text(values[key])} (the adapter's value), or no value",
                fix=Overrides(own, ", or leave the key out"),
            )
            for key, wanted in differing.items()
        ]
    )
    return recipe.override(values)


def adapted_modules(config: Any, folder: Path) -> str | list[str]:
    """Return the modules and parameters that an adapter changes: "all-linear" or sorted names.

    If target_modules is a regular expression, the module names are read from the names of the
    adapter's tensors.
    """
    targets = config.target_modules or []
    if targets == "all-linear":
        return "all-linear"
    if isinstance(targets, str):
        file = folder / ADAPTER_WEIGHTS
        try:
            with safe_open(file, "np") as tensors:
                found = [MODULE.fullmatch(name) for name in tensors.keys()]  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(
                where=str(file),
                found=f"cannot be read ({error})",
                expected="a complete safetensors file",
                fix="download the file again",
            ) from error
        targets = {match["module"] for match in found if match}
    return sorted({*targets, *(config.target_parameters or [])})


# Matches the name that peft gives to a tensor of an adapter.
MODULE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)*\.lora_\w+(\.weight)?")
