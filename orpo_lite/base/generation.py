"""Read the generation config of a base, and add the end token of an answer to eos_token_id."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_lite.errors import first_line

GENERATION_CONFIG = "generation_config.json"
# Options of sampling other than the temperature. Beam search and similar methods do not sample.
SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


def read_generation_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return (config, note): a base's generation config, and a note for the user or "".

    The config has the values of generation_config.json, unchanged, even if transformers would
    refuse to save them. If the file is missing or cannot be loaded, the config is made from
    config.json, as transformers does. The note gives the reason if the file cannot be loaded.
    """
    from transformers import GenerationConfig

    file, note = folder / GENERATION_CONFIG, ""
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            GenerationConfig.from_dict(config)
        except Exception as error:  # its checks of values can raise anything
            note = f"{file} is not used: transformers cannot load it ({first_line(error)})"
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
    """Return the config with ``end_id`` as the first id in eos_token_id.

    ``end_id`` is the token that ends an answer in the chat template. The config of a base often
    lacks this token. ``pad_id`` becomes the config's pad_token_id.
    """
    known = config.get("eos_token_id")
    ends = [end_id, *(known if isinstance(known, list) else [known])]
    ends = [end for end in ends if isinstance(end, int)]
    return {**config, "eos_token_id": list(dict.fromkeys(ends)), "pad_token_id": pad_id}
