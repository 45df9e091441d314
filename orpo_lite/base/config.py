"""Read a base's config.json, and check that the base can be trained.

The installed transformers must support the base. The base must be a causal language model, and its
weights must not be quantised. No weights are loaded, and no code of the base runs.
"""

import difflib
import importlib.metadata
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

from orpo_lite.errors import Command, ModelError, Overrides

BASE, ADAPTER = "model.model_name_or_path", "model.adapter_name_or_path"
CAUSAL = "a decoder-only (causal) language model that transformers supports"


def read_config(path: Path, name: str) -> Any:
    """Return the transformers configuration of the base in a folder.

    Args:
        path: the folder.
        name: the base's name, for error messages.

    Raises:
        ModelError: the base cannot be trained.
    """
    from transformers import AutoConfig

    raw = _read_raw(path, name)
    if "auto_map" in raw:
        raise ModelError(
            where=f"model {name}",
            found="needs Python code from its repository (auto_map in config.json)",
            expected="a model whose code is a part of transformers",
        )
    _refuse_quantised(raw, name)
    _refuse_unknown(raw, name)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # a value in the file can raise anything
        raise _unbuildable(path, error) from error
    _refuse_non_causal(config, name)
    build_empty(config, path)
    return config


def build_empty(config: Any, path: Path) -> Any:
    """Build the model of a transformers configuration on torch's meta device, without weights.

    ``path`` is the base's folder, for error messages.

    Raises:
        ModelError: transformers cannot build the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ImportError as error:
        packages = sorted(set(re.findall(r"pip install ([\w-]+)", str(error))))
        raise ModelError(
            where=f"model {path}",
            found=f"model_type {config.model_type!r} needs packages that are not installed",
            expected=f"the packages {', '.join(packages)}"
            if packages
            else str(error).strip().splitlines()[0],
            fix=Command(f"pip install {' '.join(packages)}") if packages else "",
        ) from error
    except Exception as error:  # a value in the file can raise anything
        raise _unbuildable(path, error) from error


def read_sizes(folder: Path) -> dict[str, Any]:
    """Return the values in a folder's config.json, or {} if the file cannot be read.

    The values of ``text_config`` are copied to the top level. transformers is not imported.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def refuse_adapter(path: Path, name: str) -> None:
    """Raise :class:`ModelError` if the folder ``path`` holds an adapter instead of a base.

    ``name`` is the hub name or the path of the adapter. The fix of the error moves ``name`` from
    the recipe's key for the base to its key for the adapter. The base is then the one that
    adapter_config.json names. If this file names no base, there is no fix.
    """
    file = path / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise ModelError(
        where=f"{BASE}: {name}",
        found="is an adapter, not a base",
        expected=f"a base; to train this adapter further, set {ADAPTER}",
        fix=Overrides({BASE: base, ADAPTER: name}) if isinstance(base, str) and base else "",
    )


def _read_raw(path: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in config.json. Raise :class:`ModelError` if there is none."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}")
    except FileNotFoundError:
        refuse_adapter(path, name)
        inside = [*sorted(path.glob("*/config.json")), *sorted(path.glob("*/*/config.json"))]
        hint = f", but its subfolder {inside[0].parent.relative_to(path)} has one" if inside else ""
        raise ModelError(
            where=f"model {name}",
            found=f"has no config.json{hint}",
            expected="the folder of a transformers model",
            fix=Overrides({BASE: str(inside[0].parent)}) if inside else "",
        ) from None
    except ValueError as error:
        raise ModelError(
            where=str(file),
            found=f"is not a JSON object: {error}",
            expected="a transformers configuration",
        ) from None
    return raw


def _refuse_quantised(raw: dict[str, Any], name: str) -> None:
    """Raise :class:`ModelError` if the weights are quantised.

    If transformers can dequantise the weights, the fix is a command that does so.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    text = raw.get("text_config")
    places = [raw, text if isinstance(text, dict) else {}]
    settings = [place[key] for place in places for key in QUANTISED if place.get(key) is not None]
    if not settings:
        return
    found = settings[0]
    method = found.get("quant_method") if isinstance(found, dict) else None
    config_type = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    fix: str = "use the original 16-bit model, which the model card should name"
    if not found:
        fix = f"if the weights are in 16 bit, remove {' or '.join(QUANTISED)} from config.json"
    if config_type is not None and "dequantize" in inspect.signature(config_type).parameters:
        folder = f"./{Path(name).name}-bfloat16"
        fix = _python(
            f"from transformers import AutoModelForCausalLM, AutoTokenizer, {config_type.__name__}",
            f'model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype="bfloat16", '
            f"quantization_config={config_type.__name__}(dequantize=True))",
            f"model.save_pretrained({json.dumps(folder)}, save_original_format=False)",
            _save_tokenizer(name, folder),
            then=f" writes 16-bit weights; then set {BASE}={shlex.quote(folder)}; "
            "or use a 16-bit copy of the model",
        )
    raise ModelError(
        where=f"model {name}",
        found="is already quantised" + (f" ({method})" if method else ""),
        expected="16-bit weights, which the quantisation and the merge need",
        fix=fix,
    )


QUANTISED = ("quantization_config", "compression_config")


def _refuse_unknown(raw: dict[str, Any], name: str) -> None:
    """Raise :class:`ModelError` if the installed transformers does not have the model_type."""
    from packaging.version import InvalidVersion, Version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type, own = raw.get("model_type"), importlib.metadata.version("transformers")
    if model_type in CONFIG_MAPPING_NAMES:
        return
    try:
        saved = Version(str(raw.get("transformers_version")))
    except InvalidVersion:
        saved = Version("0")
    near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=1, cutoff=0.8)
    if saved.release > Version(own).release:
        wanted = shlex.quote(f"transformers>={saved.base_version}")
        fix: str = Command(
            f"pip install --upgrade {wanted}", f", because transformers {saved} saved the model"
        )
    elif near:
        fix = f"if model_type is misspelt, write {near[0]}"
    else:
        fix = "install a newer transformers, if a newer version has this model_type"
    found = f"model_type {model_type!r} is not in transformers {own}"
    raise ModelError(
        where=f"model {name}",
        found=found if model_type else "config.json has no model_type",
        expected=CAUSAL,
        fix=fix if model_type else "",
    )


def _refuse_non_causal(config: Any, name: str) -> None:
    """Raise :class:`ModelError` if the model is not a causal language model."""
    from transformers.models.auto import modeling_auto as auto

    model_type, fix = config.model_type, ""
    encoder = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(model_type)
    multimodal = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(model_type)
    if config.is_encoder_decoder:
        found = "is an encoder-decoder model"
    elif encoder and not getattr(config, "is_decoder", False):
        found = f"is an encoder ({encoder}), whose tokens attend to later tokens"
    elif model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    elif multimodal:
        found = f"is a multimodal model ({multimodal} in transformers)"
        fix = _text_part(config, name)
    else:
        own_class = auto.MODEL_MAPPING_NAMES.get(model_type, "a part of a larger model")
        found = f"is {own_class}, which is not a language model"
    raise ModelError(
        where=f"model {name}", found=f"model_type {model_type!r} {found}", expected=CAUSAL, fix=fix
    )


def _text_part(config: Any, name: str) -> str:
    """Return the fix for a multimodal model.

    If the text part is a causal language model, the fix is a command that saves it as a new model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, model_type = config.get_text_config(), config.get_text_config().model_type
    if getattr(text, "use_bidirectional_attention", None):
        return (
            f"use another model, because in this model's text part ({model_type}), tokens "
            "attend to later tokens"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return (
            "use another model, because transformers has no causal language model for this "
            f"model's text part ({model_type})"
        )
    folder = f"./{Path(name).name}-text"
    return _python(
        "from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer",
        f'whole = AutoModelForMultimodalLM.from_pretrained({json.dumps(name)}, dtype="auto")',
        "config = whole.config.get_text_config()",
        "config.tie_word_embeddings = whole.config.tie_word_embeddings",
        "text = AutoModelForCausalLM.from_config(config, dtype=whole.dtype)",
        "setattr(text, text.base_model_prefix, whole.get_decoder())",
        "text.set_output_embeddings(whole.get_output_embeddings())",
        f"text.save_pretrained({json.dumps(folder)})",
        _save_tokenizer(name, folder),
        then=f" saves the model's text part ({model_type}) as a separate model; "
        f"then set {BASE}={shlex.quote(folder)}",
    )


def _save_tokenizer(name: str, folder: str) -> str:
    """Return a line of Python that copies a model's tokenizer to a folder."""
    return (
        f"AutoTokenizer.from_pretrained({json.dumps(name)}).save_pretrained({json.dumps(folder)})"
    )


def _python(*lines: str, then: str) -> Command:
    """Return a shell command that runs lines of Python. ``then`` is advice after the command."""
    return Command(f"python -c {shlex.quote('; '.join(lines))}", then)


def _unbuildable(path: Path, error: Exception) -> ModelError:
    """Return the error for a config.json from which transformers cannot build a model.

    The error quotes the first two lines of transformers' message. They name the wrong value.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ModelError(
        where=str(path / "config.json"),
        found=f"transformers {importlib.metadata.version('transformers')} cannot build the model: "
        f"{type(error).__name__}: {' '.join(lines[:2])}",
        expected="values that are valid for the model's architecture",
        fix="download config.json again; if the model is newer than transformers, upgrade "
        "transformers",
    )
