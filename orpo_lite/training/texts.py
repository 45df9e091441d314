"""The files that go with an adapter's weights: tokenizer, chat templates, generation config."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orpo_lite.base.find import load_tokenizer
from orpo_lite.base.generation import GENERATION_CONFIG, read_generation_config, with_ends
from orpo_lite.errors import ModelError, first_line
from orpo_lite.runs.atomic import new_files, to_json
from orpo_lite.runs.inputs import Inputs

PROBE = "Is this the same text, in 2 or 3 words?\n"


def make_texts(inputs: Inputs) -> tuple[dict[str, bytes], str]:
    """The files by their names in ``adapter/``, and a note on the generation config or "".

    They are made before the training, and the tokenizer is read back: what is wrong with one shows now.

    Raises:
        ModelError: transformers cannot save the tokenizer, or what it saves is another one.
    """
    config, note = read_generation_config(inputs.base.path)
    with TemporaryDirectory(prefix="orpo-lite-") as name:
        folder = Path(name)
        try:
            tokenizer = _with_templates(inputs)
            tokenizer.save_pretrained(folder)
            is_same = load_tokenizer(folder)(PROBE)["input_ids"] == tokenizer(PROBE)["input_ids"]
            found = "" if is_same else "is another one when it is saved and loaded"
        except Exception as error:  # of a class of transformers' or of the tokenizers library
            found = f"cannot be saved and loaded ({first_line(error)})"
        if found:
            raise ModelError(
                where=f"tokenizer in {inputs.base.path}",
                found=found,
                expected="a tokenizer that can go with the adapter",
                fix="a tokenizer.json and tokenizer_config.json as the installed transformers saves them",
            )
        (folder / GENERATION_CONFIG).write_text(
            to_json(with_ends(config, inputs.end_id, inputs.pad_id)), "utf-8"
        )
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}, note


def write_texts(folder: Path, texts: dict[str, bytes]) -> None:
    """Write what :func:`make_texts` made. Raises CheckpointError, FitError."""
    with new_files(folder) as temporary:
        for name, content in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)


def _with_templates(inputs: Inputs) -> Any:
    """The tokenizer with the base's named templates (``tool_use``, ``rag``) next to the one that was trained with.

    Each writes the bos where training had one before the text and the template has none. Whoever serves the model
    renders a template and adds nothing: the model would miss the token that it began with.
    """
    tokenizer = copy.copy(inputs.tokenizer)
    template, own = tokenizer.chat_template, load_tokenizer(inputs.base.path).chat_template
    if not isinstance(template, str):  # of a training on plain text
        return tokenizer
    named = own if isinstance(own, dict) else {}
    leads = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
    templates = {
        name: "{{ bos_token }}" + text if leads and not _begins_with_bos(tokenizer, text) else text
        for name, text in {**named, "default": template}.items()
    }
    tokenizer.chat_template = templates if named else templates["default"]
    return tokenizer


def _begins_with_bos(tokenizer: Any, template: str) -> bool:
    turns = [{"role": "user", "content": "a"}]
    try:
        text = tokenizer.apply_chat_template(
            turns, template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # one that wants documents or tools
        return "bos_token" in template or tokenizer.bos_token in template
    return str(text).startswith(tokenizer.bos_token)
