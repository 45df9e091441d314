"""A base's config.json read and checked: a causal model of transformers in 16 bit, or an error that says what to take.

Nothing is loaded, and no code of the base runs.
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
CAUSAL = "a decoder-only (causal) language model of transformers"


def read_config(path: Path, name: str) -> Any:
    """The transformers configuration of a base that can be trained. Raises :class:`ModelError`."""
    from transformers import AutoConfig

    raw = _read_raw(path, name)
    if "auto_map" in raw:
        raise ModelError(
            where=f"model {name}",
            found="needs code of its own (auto_map)",
            expected="an architecture that transformers ships",
        )
    _refuse_quantised(raw, name)
    _refuse_unknown(raw, name)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises whatever a value of the file leads to
        raise _unbuildable(path, error) from error
    _refuse_other_kinds(config, name)
    build_empty(config, path)
    return config


def build_empty(config: Any, path: Path) -> Any:
    """The model that a configuration describes, without weights, on meta. Raises :class:`ModelError`."""
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
            expected=", ".join(packages) or str(error).strip().splitlines()[0],
            fix=Command(f"pip install {' '.join(packages)}") if packages else "",
        ) from error
    except Exception as error:  # as above
        raise _unbuildable(path, error) from error


def read_sizes(folder: Path) -> dict[str, Any]:
    """What config.json says of the text model's sizes, read without transformers; {} when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    text = config.get("text_config") if isinstance(config, dict) else None
    return (
        {**config, **(text if isinstance(text, dict) else {})} if isinstance(config, dict) else {}
    )


def refuse_adapter(path: Path, name: str) -> None:
    """Raise :class:`ModelError` for the folder of an adapter, and name its base. Its own weights are not asked for."""
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
        expected=f"its base, and the adapter as {ADAPTER} if it is to be trained on",
        fix=Overrides({BASE: base, ADAPTER: name}) if isinstance(base, str) and base else "",
    )


def _read_raw(path: Path, name: str) -> dict[str, Any]:
    """The object in config.json. Raises :class:`ModelError`."""
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"it holds a {type(raw).__name__}")
    except FileNotFoundError:
        refuse_adapter(path, name)
        inside = [*sorted(path.glob("*/config.json")), *sorted(path.glob("*/*/config.json"))]
        raise ModelError(
            where=f"model {name}",
            found="has no config.json"
            + (f"; {inside[0].parent.relative_to(path)} in it has" if inside else ""),
            expected="a transformers model folder",
            fix=Overrides({BASE: str(inside[0].parent)}) if inside else "",
        ) from None
    except ValueError as error:
        raise ModelError(
            where=str(file), found=f"is not JSON: {error}", expected="a transformers configuration"
        ) from None
    return raw


def _refuse_quantised(raw: dict[str, Any], name: str) -> None:
    """Raise :class:`ModelError` for weights that are quantised already, with a command that undoes it if one does."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    text = raw.get("text_config")
    places = [raw, text if isinstance(text, dict) else {}]
    found = next(
        (place[key] for place in places for key in QUANTISED if place.get(key) is not None), None
    )
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    fix: str = "take the model that it was quantised from, which its model card names"
    if not found:
        fix = "take the key out of config.json, if the weights are in 16 bit"
    if kind is not None and "dequantize" in inspect.signature(kind).parameters:
        folder = f"./{Path(name).name}-bfloat16"
        fix = _python(
            f"from transformers import {kind.__name__}, AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, dtype="bfloat16", '
            f"quantization_config={kind.__name__}(dequantize=True))",
            f"model.save_pretrained({json.dumps(folder)}, save_original_format=False)",
            f"AutoTokenizer.from_pretrained({json.dumps(name)}).save_pretrained({json.dumps(folder)})",
            then=f" writes them; then {BASE}={shlex.quote(folder)}; or take a 16-bit copy",
        )
    raise ModelError(
        where=f"model {name}",
        found="is already quantised" + (f" ({method})" if method else ""),
        expected="the 16-bit weights: quantising and merging start from them",
        fix=fix,
    )


QUANTISED = ("quantization_config", "compression_config")


def _refuse_unknown(raw: dict[str, Any], name: str) -> None:
    """Raise :class:`ModelError` for a model_type that this transformers does not have."""
    from packaging.version import InvalidVersion, Version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind, own = raw.get("model_type"), importlib.metadata.version("transformers")
    if kind in CONFIG_MAPPING_NAMES:
        return
    try:
        saved = Version(str(raw.get("transformers_version")))
    except InvalidVersion:
        saved = Version("0")
    near = difflib.get_close_matches(str(kind), CONFIG_MAPPING_NAMES, n=1, cutoff=0.8)
    if saved.release > Version(own).release:
        wanted = shlex.quote(f"transformers>={saved.base_version}")
        fix: str = Command(f"pip install --upgrade {wanted}", f", for it was saved by {saved}")
    else:
        fix = (
            f"if it is misspelt: {near[0]}"
            if near
            else "a later release of transformers, if one has it"
        )
    raise ModelError(
        where=f"model {name}",
        found=f"model_type {kind!r} is not in transformers {own}"
        if kind
        else "its config.json names no model_type",
        expected=CAUSAL,
        fix=fix if kind else "",
    )


def _refuse_other_kinds(config: Any, name: str) -> None:
    """Raise :class:`ModelError` for a model that is no causal language model, and say what transformers has of it."""
    from transformers.models.auto import modeling_auto as auto

    kind, fix = config.model_type, ""
    encoder = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    multimodal = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind)
    if config.is_encoder_decoder:
        said = "is an encoder-decoder"
    elif encoder and not getattr(config, "is_decoder", False):
        said = f"is an encoder ({encoder}), whose tokens see the later ones"
    elif kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    elif multimodal:
        said = f"is multimodal: transformers has {multimodal}"
        fix = _text_part(config, name)
    else:
        said = f"is {auto.MODEL_MAPPING_NAMES.get(kind, 'a part of a model')}, without a language model"
    raise ModelError(
        where=f"model {name}", found=f"model_type {kind!r} {said}", expected=CAUSAL, fix=fix
    )


def _text_part(config: Any, name: str) -> str:
    """What to do about a multimodal model: a command that saves its text part, where that can be tuned by itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, kind = config.get_text_config(), config.get_text_config().model_type
    if getattr(text, "use_bidirectional_attention", None):
        return f"take a text model: the tokens of its text part ({kind}) see those that come after"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return (
            f"take a text model: its text part ({kind}) has no causal language model there either"
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
        f"AutoTokenizer.from_pretrained({json.dumps(name)}).save_pretrained({json.dumps(folder)})",
        then=f" saves its text part ({kind}), which can be tuned by itself; then {BASE}={shlex.quote(folder)}",
    )


def _python(*lines: str, then: str) -> Command:
    return Command(f"python -c {shlex.quote('; '.join(lines))}", then)


def _unbuildable(path: Path, error: Exception) -> ModelError:
    """What transformers cannot make a model of. The first line of its message names the value."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ModelError(
        where=str(path / "config.json"),
        found=f"transformers {importlib.metadata.version('transformers')} cannot build the model that it describes: "
        f"{type(error).__name__}: {' '.join(lines[:2])}",
        expected="values that its architecture takes",
        fix="download config.json again; or a later release of transformers, if the model is newer",
    )
