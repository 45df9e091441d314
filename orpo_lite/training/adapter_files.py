"""Make the files that are saved with an adapter: tokenizer, chat template, generation config."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orpo_lite.base.find import load_tokenizer
from orpo_lite.base.generation import GENERATION_CONFIG, read_generation_config, with_ends
from orpo_lite.errors import ModelError, first_line
from orpo_lite.runs.atomic import new_files, to_json
from orpo_lite.runs.inputs import Inputs

SAMPLE_TEXT = "Is this the same text, in 2 or 3 words?\n"


def make_adapter_files(inputs: Inputs, *, is_reward_model: bool) -> tuple[dict[str, bytes], str]:
    """Return the tokenizer files and the generation config as {name: content}, and also a note.

    The files are for the folder ``adapter/``. The note says why the base's generation_config.json
    cannot be loaded; the note is "" if the file is loaded or missing.

    This function is called before the training, to find errors early. The function saves the
    tokenizer, loads the saved copy, and compares the tokens that both give for a sample text.

    ``is_reward_model``: whether the adapter is trained as a reward model.

    Raises:
        ModelError: transformers cannot save or load the tokenizer, or the loaded copy gives other
            tokens than the original.
    """
    config, note = read_generation_config(inputs.base.path)
    with TemporaryDirectory(prefix="orpo-lite-") as name:
        folder = Path(name)
        try:
            tokenizer = _with_templates(inputs)
            if is_reward_model:
                tokenizer = _for_rewards(tokenizer, inputs.end_id)
            tokenizer.save_pretrained(folder)
            saved = load_tokenizer(folder)
            is_same = saved(SAMPLE_TEXT)["input_ids"] == tokenizer(SAMPLE_TEXT)["input_ids"]
            found = "" if is_same else "gives other tokens after it is saved and loaded"
        except Exception as error:  # transformers and tokenizers raise errors of many types
            found = f"cannot be saved and loaded ({first_line(error)})"
        if found:
            raise ModelError(
                where=f"tokenizer in {inputs.base.path}",
                found=found,
                expected="a tokenizer that can be saved with the adapter",
                fix="replace the tokenizer's files by a tokenizer.json and a tokenizer_config.json "
                "that the installed version of transformers has written",
            )
        (folder / GENERATION_CONFIG).write_text(
            to_json(with_ends(config, inputs.end_id, inputs.pad_id)), "utf-8"
        )
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}, note


def write_adapter_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files that :func:`make_adapter_files` returned into ``folder``.

    Raises:
        CheckpointError: the folder cannot be written.
        FitError: the disk is full.
    """
    with new_files(folder) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)


def _with_templates(inputs: Inputs) -> Any:
    """Return the tokenizer with the chat template of the training.

    If the base has named templates (for instance ``tool_use``, ``rag``), they are kept. If texts
    began with the bos token in training, the token is added to each template that does not write
    it. Otherwise the token would be missing when a server renders a template, because servers add
    no tokens.
    """
    tokenizer = copy.copy(inputs.tokenizer)
    template, own = tokenizer.chat_template, load_tokenizer(inputs.base.path).chat_template
    if not isinstance(template, str):  # trained on plain text
        return tokenizer
    named = own if isinstance(own, dict) else {}
    templates = {**named, "default": template}
    first_ids = tokenizer("a")["input_ids"][:1]
    if tokenizer.bos_token is not None and first_ids == [tokenizer.bos_token_id]:
        for name, text in templates.items():
            if not _begins_with_bos(tokenizer, text):
                templates[name] = "{{ bos_token }}" + text
    tokenizer.chat_template = templates if named else templates["default"]
    return tokenizer


def _for_rewards(tokenizer: Any, end_id: int) -> Any:
    """Return a tokenizer that makes conversations end as in the training of a reward model.

    The reward is read at the token that ends a reply. Many chat templates write a line end after
    this token, and some write no end token. So the template's text is cut after the last end token.
    transformers reads the reward at the last token that is not the pad token. So the pad token must
    not be the end token.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id in (None, end_id):
        others = (tokenizer.unk_token, tokenizer.bos_token)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in others if token}
        tokenizer.pad_token = next((token for token in ids if ids[token] != end_id), None)
    end = json.dumps(tokenizer.convert_ids_to_tokens(end_id))
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _cut(text, end) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _cut(templates, end)
    return tokenizer


def _cut(template: str, end: str) -> str:
    """Return a template whose conversations end with ``end``, a quoted text."""
    whole = f"{{% set conversation %}}{template}{{% endset %}}"
    cut = f"conversation.rsplit({end}, 1)[0] + {end}"
    return f"{whole}{{{{ conversation if add_generation_prompt else {cut} }}}}"


def _begins_with_bos(tokenizer: Any, template: str) -> bool:
    messages = [{"role": "user", "content": "a"}]
    try:
        text = tokenizer.apply_chat_template(
            messages, template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template that needs documents or tools
        return "bos_token" in template or tokenizer.bos_token in template
    return str(text).startswith(tokenizer.bos_token)
