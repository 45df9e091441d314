"""The tokenizer of a base or adapter folder."""

from pathlib import Path
from typing import Any

from orpo_lite.errors import ModelError


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a base or adapter folder. Raises :class:`ModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # else it would ask at the terminal
    except (OSError, ValueError) as error:
        raise ModelError(
            where=f"tokenizer in {path}", found=str(error).splitlines()[0], expected="tokenizer.json beside the weights"
        ) from error


def pad_id(tokenizer: Any) -> int:
    """An id to fill rows with; any will do, for padding is masked by position."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
