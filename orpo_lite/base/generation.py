"""Read a base's generation config and add the token that ends an answer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_lite.errors import first_line

GENERATION_CONFIG = "generation_config.json"
# Sampling options besides the temperature. Beam search and similar methods are not sampling.
SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


def read_generation_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the generation config of a base, and a note if its file cannot be used ("" if it can).

    The file's values are not changed: transformers loads some configs that it refuses to save, and
    any correction would change their meaning. If the file is missing or cannot be read, the
    defaults of config.json are returned, as transformers does.
    """
    from transformers import GenerationConfig

    file, note = folder / GENERATION_CONFIG, ""
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            GenerationConfig.from_dict(config)
        except Exception as error:  # its checks of values can raise anything
            note = f"{file} is left out: transformers cannot load it ({first_line(error)})"
        else:
            return config, ""
    try:
        options = {"config_file_name": "config.json", "_from_model_config": True}
        config = GenerationConfig.from_pretrained(folder, **options).to_diff_dict()
    except Exception:  # its checks of values can raise anything
        config = {}
    config.pop("_from_model_config", None)  # with it, some versions read config.json instead
    return config, note


def with_ends(config: Mapping[str, Any], end_id: int, pad_id: int) -> dict[str, Any]:
    """Return the config with ``end_id`` as the first token that ends an answer.

    A base's config often lacks the chat template's end token.
    """
    known = config.get("eos_token_id")
    ends = [end_id, *(known if isinstance(known, list) else [known])]
    ends = [end for end in ends if isinstance(end, int)]
    return {**config, "eos_token_id": list(dict.fromkeys(ends)), "pad_token_id": pad_id}
