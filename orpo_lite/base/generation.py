"""The generation config of a base: read as it is, with the tokens that end a reply."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo_lite.errors import first_line

GENERATION_CONFIG = "generation_config.json"
# What shapes a sampled answer besides the temperature. Beam search and its kin are no sampling.
SAMPLING = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


def read_generation_config(folder: Path) -> tuple[dict[str, Any], str]:
    """What transformers generates with by default; and why the base's own file is left out, "" where it is not.

    The file is kept as it is: transformers loads many a config that it refuses to save, and each change that would
    please it changes what it means. Without the file, transformers takes the defaults of config.json, and so where it
    cannot read it.
    """
    from transformers import GenerationConfig

    file, note = folder / GENERATION_CONFIG, ""
    if file.is_file():
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            GenerationConfig.from_dict(config)
        except Exception as error:  # whatever its checks of a value raise
            said = first_line(error)
            note = f"{file} is left out: transformers cannot load it ({said})"
        else:
            return config, ""
    try:
        options = {"config_file_name": "config.json", "_from_model_config": True}
        config = GenerationConfig.from_pretrained(folder, **options).to_diff_dict()
    except Exception:  # as above
        config = {}
    config.pop(
        "_from_model_config", None
    )  # some versions would take that of config.json in its place
    return config, note


def with_ends(config: Mapping[str, Any], end_id: int, pad_id: int) -> dict[str, Any]:
    """The config with ``end_id`` as the first token that ends a reply: a base's own often lacks the template's."""
    known = config.get("eos_token_id")
    ends = [end_id, *(known if isinstance(known, list) else [known])]
    ends = [end for end in ends if isinstance(end, int)]
    return {**config, "eos_token_id": list(dict.fromkeys(ends)), "pad_token_id": pad_id}
