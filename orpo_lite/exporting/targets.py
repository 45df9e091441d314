"""Export a finished run for llama.cpp, Ollama or vLLM: one function for each target."""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orpo_lite.base.adapter import not_in_vllm, vllm_rank
from orpo_lite.base.blocks import Stored, stored_tensors
from orpo_lite.base.config import read_config
from orpo_lite.base.download import check_disk
from orpo_lite.base.find import load_tokenizer
from orpo_lite.base.generation import read_generation_config
from orpo_lite.errors import CheckpointError, Command, ModelError, OrpoLiteError, RecipeError
from orpo_lite.exporting.gguf_family import describe, find_targets
from orpo_lite.exporting.gguf_file import OUTTYPES, write_gguf
from orpo_lite.exporting.gguf_tokenizer import SPACE, describe_tokenizer
from orpo_lite.exporting.llama_cpp import (
    PROBES,
    QUANTISED,
    check_tokens,
    is_installed,
    not_installed,
    quantise,
    require_llama_cpp,
)
from orpo_lite.exporting.ollama_template import Render, find_turns, renderer
from orpo_lite.recipe.schema import DataSection, Recipe
from orpo_lite.runs.atomic import new_folder, write_text
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, merge_command, quoted
from orpo_lite.runs.folder import find_finished_adapter, find_merged, locked, merged_folder
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import read_json
from orpo_lite.updates import Update, run_to_end, with_torch_defaults

STORED = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}  # the widest last
BITS = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q3_k_m": 4.0,
    "q4_k_m": 5.0,
    "q5_k_m": 5.8,
    "q6_k": 6.6,
}
NAMES_WITH_RULES = (
    r"(?i)phi-?3|modern-bert"  # llama.cpp strips spaces around tokens of these models
)
# Largest num_ctx (in tokens) that a Modelfile sets. Ollama's default is a few thousand. A context
# of 128k tokens would need several GB.
MOST_CONTEXT = 8192
NO_SCORE_HEAD = {
    "gguf": "llama.cpp has score heads only for some models that rank documents",
    "ollama": "Ollama serves no models that return a score",
}


@dataclass(frozen=True)
class ExportResult:
    """The result of an export: a folder on disk, and how to run the model in it."""

    folder: Path
    bytes: int
    command: str
    """The shell command that runs the exported model."""
    notes: tuple[str, ...] = ()
    """Differences between the export and the merged model in transformers, one line each."""


Exporting = Generator[Update, None, ExportResult]


@dataclass(frozen=True)
class _Request:
    path: Path
    name: str
    """The model's name in the export."""
    merged: Path
    outtype: str | None
    weights: Weights
    recipe: Recipe

    def folder(self, to: str, outtype: str = "") -> Path:
        """Return the folder of an export."""
        parts = [to, outtype, "" if self.weights == "original" else self.weights]
        return self.path / "export" / "-".join(part for part in parts if part)


def export(
    run_folder: str | Path, to: str, *, outtype: str | None = None, weights: Weights = "original"
) -> ExportResult:
    """Export a run and return the result. Arguments and errors: see :func:`export_events`."""
    return run_to_end(
        export_events(run_folder, to, outtype=outtype, weights=weights), lambda _: None
    )


@with_torch_defaults
def export_events(
    run_folder: str | Path,
    to: str,
    *,
    outtype: str | None = None,
    weights: Weights = "original",
    needs_llama_cpp: bool = False,
) -> Exporting:
    """Export a run to a folder in ``RUN/export``: yield updates; finally return the result.

    The folder is written completely or not at all.

    Args:
        run_folder: the folder of a finished run.
        to: the target. "gguf" writes the merged model as one GGUF file. "ollama" writes a GGUF file
            and a Modelfile. "vllm" writes a command that serves the base with the adapter. It is
            the only target of a reward model.
        outtype: the type of the matrices in the GGUF file: f32, f16, bf16, q8_0, or a type of
            llama.cpp's quantiser (``QUANTISED``). None: the type of the merged model's matrices.
        weights: the merged model to export. "original" is the model in ``RUN/merged``,
            "dequantized" the model in ``RUN/merged-dequantized``.
        needs_llama_cpp: whether llama.cpp must be installed, for a check of the exported file.

    Raises:
        RecipeError: ``to`` or ``outtype`` is unknown.
        CheckpointError: the run is not finished or not merged.
        ModelError: the target does not support the model, tokenizer or chat template.
        FitError: a library is not installed, or there is not enough disk space.
    """
    path = Path(run_folder).expanduser()
    if to not in TARGETS:
        raise RecipeError(
            where="--to",
            found=f"{to!r} is not a target",
            expected=f"one of {', '.join(TARGETS)}",
            fix=Command(f"orpo-lite export {quoted(path)} --to gguf"),
        )
    merged = path / merged_folder(weights)
    known = (*OUTTYPES, *QUANTISED)
    if outtype is not None and (to == "vllm" or outtype not in known):
        expected = (
            "no --outtype, because vLLM serves the weights unchanged"
            if to == "vllm"
            else f"one of {', '.join(known)}"
        )
        raise RecipeError(where="--outtype", found=f"{outtype!r}", expected=expected)
    find_finished_adapter(path)
    recipe = trained_recipe(path)
    if recipe.loss.trains_reward_model and to != "vllm":
        raise _no_reward_model(path, to, weights)
    if needs_llama_cpp:
        require_llama_cpp()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).strip("-.") or "model"
    with locked(path) as notes, _replaced_in_errors("RUN", quoted(path)):
        for note in notes:
            yield Update("note", note)
        return (yield from TARGETS[to](_Request(path, name, merged, outtype, weights, recipe)))


def _no_reward_model(path: Path, to: str, weights: Weights) -> ModelError:
    """Return the error for a target that has no reward models."""
    option = "" if weights == "original" else f" --base {weights}"
    command = f"orpo-lite export {quoted(path)} --to vllm{option}"
    try:
        find_merged(path, weights)
    except CheckpointError:
        command = f"{merge_command(path, weights)} && {command}"
    return ModelError(
        where=f"run {path}",
        found=f"is a reward model, which --to {to} cannot export: {NO_SCORE_HEAD[to]}",
        expected="--to vllm, or the merged model in transformers",
        fix=Command(command),
    )


def to_gguf(request: _Request) -> Exporting:
    """Write a GGUF file for llama.cpp, with weights, tokenizer and chat template."""
    outtype = request.outtype or _stored_type(request)
    folder = request.folder("gguf", outtype)
    with new_folder(folder) as temporary, _replaced_in_errors(temporary, folder):
        file = f"{request.name}-{outtype}.gguf"
        notes, _ = yield from _write_model(request, temporary / file, outtype)
    command = f"llama-cli -m {quoted(folder / file)}"
    return ExportResult(folder, _size(folder), command, tuple(notes))


def to_ollama(request: _Request) -> Exporting:
    """Write a GGUF file and a Modelfile for Ollama.

    The Modelfile sets the template, the stop tokens, the context size and the sampling parameters.
    """
    outtype = request.outtype or _stored_type(request)
    folder = request.folder("ollama", request.outtype or "")
    tokenizer = load_tokenizer(request.merged)
    data = request.recipe.data
    if data.chat_template == "none":
        tokenizer.chat_template = None
    turns, missing = find_turns(renderer(tokenizer, data.chat_template_kwargs), "chat template")
    is_fixed = "date_string" in data.chat_template_kwargs
    if "strftime_now" in str(tokenizer.chat_template) and not is_fixed:
        missing.append(
            "the chat template writes today's date; Ollama's template always writes the date of "
            "the export"
        )
    with new_folder(folder) as temporary, _replaced_in_errors(temporary, folder):
        file = f"{request.name}-{outtype}.gguf"
        notes, keys = yield from _write_model(request, temporary / file, outtype)
        bos = tokenizer.bos_token
        if keys["tokenizer.ggml.add_bos_token"] and bos:  # Ollama adds the bos automatically
            turns = turns.with_heads(lambda head: head.removeprefix(bos))
        turns = turns.with_heads(lambda head: _lead(keys) + head)
        context = next(value for key, value in keys.items() if key.endswith(".context_length"))
        lines = [
            f"FROM ./{file}",
            f'TEMPLATE """{turns.to_go()}"""',
            f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}",
        ]
        stops = tokenizer.batch_decode([[end] for end in _ends(request, tokenizer)])
        lines += [
            f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops if text
        ]
        lines += [f"PARAMETER {key} {value}" for key, value in _sampling(request).items()]
        write_text(temporary / "Modelfile", "\n".join(lines) + "\n")
    modelfile = quoted(folder / "Modelfile")
    command = (
        f"ollama create {request.name.lower()} -f {modelfile} && ollama run {request.name.lower()}"
    )
    return ExportResult(folder, _size(folder), command, (*notes, *missing))


def to_vllm(request: _Request) -> Exporting:
    """Write a vLLM command that serves the base with the adapter. No weights are copied.

    If vLLM does not support the adapter, the command serves the merged model instead. A reward
    model is always served merged, because vLLM loads no score head from an adapter: its PEFTHelper
    refuses ``modules_to_save``.
    """
    yield Update("stage", "writing the vLLM command")
    lock = read_lock(request.path)
    adapter = request.path.resolve() / "adapter"
    config = read_json(adapter / "adapter_config.json")
    name, base, rank = request.name, lock["base"], vllm_rank(config, lock["base"])
    notes: list[str] = []
    is_reward_model = request.recipe.loss.trains_reward_model
    if rank is None or is_reward_model:
        find_merged(request.path, request.weights)
        feature = not_in_vllm(config, base)
        if is_reward_model:
            feature = "an adapter with a score head"
        notes.append(f"vLLM cannot serve {feature}: the command serves the merged model instead")
        parts = ["vllm", "serve", str(request.merged.resolve()), "--served-model-name", name]
        if is_reward_model:
            parts += ["--runner", "pooling"]
            notes.append(_reward_request(request.recipe.data))
    else:
        parts = ["vllm", "serve", base["name"]]
        if not base["revision"] and not Path(base["name"]).is_dir():
            notes.append(
                f"the base's folder {base['name']} does not exist any more: write the base's new "
                "folder into the command"
            )
        if base["revision"]:
            parts += ["--revision", base["revision"]]
        # The tokenizer, its chat template and the end tokens are read from the run.
        parts += ["--tokenizer", str(adapter), "--generation-config", str(adapter)]
        parts += [
            "--enable-lora",
            "--lora-modules",
            f"{name}={adapter}",
            "--max-lora-rank",
            str(rank),
        ]
    command = shlex.join(parts)
    folder = request.folder("vllm")
    with new_folder(folder) as temporary:
        write_text(temporary / "serve.sh", f"#!/bin/sh\n{command}\n")
    return ExportResult(folder, _size(folder), command, tuple(notes))


def _reward_request(data: DataSection) -> str:
    """Return a note that tells how vLLM is asked for a reward, from vLLM's documentation."""
    text = 'send a conversation as "messages" to /classify'
    if data.chat_template == "none":
        text = 'send prompt, reply and end token, joined, as "input" to /classify'
    keys = ['"use_activation": false']
    if data.chat_template_kwargs and data.chat_template != "none":
        keys.append(f'"chat_template_kwargs": {json.dumps(data.chat_template_kwargs)}')
    return (
        f'{text}, with {" and ".join(keys)}; the reward is the number in "probs" of the answer '
        "(from vLLM's documentation)"
    )


TARGETS: dict[str, Callable[[_Request], Exporting]] = {
    "gguf": to_gguf,
    "ollama": to_ollama,
    "vllm": to_vllm,
}


def _stored_type(request: _Request) -> str:
    """Return the type of the merged model's matrices, or the widest type if there are several."""
    find_merged(request.path, request.weights)
    tensors = _tensors(request.merged).values()
    dtypes = {tensor.dtype for tensor in tensors if len(tensor.shape) == 2}
    return next((STORED[dtype] for dtype in reversed(STORED) if dtype in dtypes), "f32")


def _tensors(folder: Path) -> dict[str, Stored]:
    """Return a model's tensors by name. Raise :class:`ModelError` for an unsupported type."""
    tensors = stored_tensors(folder)
    for tensor in tensors.values():
        if tensor.dtype not in STORED:
            raise ModelError(
                where=str(tensor.file),
                found=f"the tensor {tensor.name} has the type {tensor.dtype}",
                expected="float16, bfloat16 or float32",
            )
    return tensors


@contextmanager
def _replaced_in_errors(placeholder: str | Path, actual: str | Path) -> Generator[None]:
    """In an error's place and fix, replace a placeholder or temporary path by the actual path."""
    try:
        yield
    except OrpoLiteError as error:
        error.where = error.where.replace(str(placeholder), str(actual))
        if f" {placeholder} " in error.fix:
            error.fix = error.fix.replace(f" {placeholder} ", f" {actual} ")
        raise


def _write_model(
    request: _Request, file: Path, outtype: str
) -> Generator[Update, None, tuple[list[str], dict[str, Any]]]:
    """Write a GGUF file: yield updates; finally return (notes on differences, GGUF keys)."""
    where = f"model {request.merged}"
    find_merged(request.path, request.weights)
    if importlib.util.find_spec("gguf") is None:
        raise not_installed("gguf>=0.19")
    if outtype in QUANTISED:
        require_llama_cpp()
    config = read_config(request.merged, str(request.merged))
    made = describe(config, where)
    tensors = _tensors(request.merged)
    targets = find_targets(
        made, config.get_text_config() if made.is_multimodal else config, tensors, where
    )
    rows = next((t.stored.shape[0] for t in targets if t.name == "token_embd.weight"), 0)
    tokenizer = load_tokenizer(request.merged)
    variables = request.recipe.data.chat_template_kwargs
    if not tokenizer.is_fast:
        raise ModelError(
            where=f"tokenizer in {request.merged}",
            found="is not a fast tokenizer",
            expected="a fast tokenizer, which has a tokenizer.json",
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    about, notes = describe_tokenizer(
        tokenizer, spec, rows, _ends(request, tokenizer), f"tokenizer in {request.merged}"
    )
    probes = _probes(
        tokenizer, renderer(tokenizer, variables), f"chat template in {request.merged}"
    )
    title = re.sub(NAMES_WITH_RULES, "model", request.name)
    keys = {"general.name": title, **made.keys, **about, f"{made.family.arch}.vocab_size": rows}
    first = outtype if outtype in OUTTYPES else _stored_type(request)
    numbers = sum(target.stored.shape[0] * target.stored_columns for target in targets)
    bits = BITS[outtype] + (BITS[first] if first != outtype else 0)
    check_disk(request.path, int(numbers * bits / 8), f"exporting {request.path}")
    full = file if first == outtype else file.with_name("full.gguf")
    for done, steps in write_gguf(full, made, keys, targets, first):
        yield Update("stage", f"writing the tensors as {first}", done, steps)
    if full != file:
        yield Update("stage", f"quantising to {outtype}")
        quantise(full, file, outtype)
        full.unlink()
    if is_installed():
        yield Update("stage", "comparing the tokens from llama.cpp and transformers")
        check_tokens(file, tokenizer, probes, _lead(keys))
    return [*made.notes, *notes], keys


def _ends(request: _Request, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer. The chat template's end token is first."""
    ends = _generation_config(request).get("eos_token_id")
    ends = [
        read_lock(request.path).get("end_token_id"),
        *(ends if isinstance(ends, list) else [ends]),
    ]
    return [end for end in dict.fromkeys(ends) if isinstance(end, int)] or [tokenizer.eos_token_id]


def _sampling(request: _Request) -> dict[str, float]:
    """Return the sampling parameters for Ollama. Greedy decoding becomes temperature 0."""
    config = _generation_config(request)
    if config.get("do_sample") is False:
        return {"temperature": 0}
    values = {key: config.get(key) for key in ("temperature", "top_p", "top_k", "min_p")}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _generation_config(request: _Request) -> dict[str, Any]:
    """Return the run's generation config, or {} if it cannot be read."""
    return read_generation_config(request.path / "adapter")[0]


def _lead(keys: dict[str, Any]) -> str:
    """Return " " if the exported chat template begins with an added space, else ""."""
    return " " if str(keys.get("tokenizer.chat_template")).startswith(SPACE) else ""


def _probes(tokenizer: Any, render: Render, where: str) -> list[str]:
    """Return the texts whose tokens are compared: questions rendered by the chat template.

    Without the chat template, llama.cpp and transformers may tokenise a text differently.
    """
    if not tokenizer.chat_template:
        # Some tokenizers add a space only to a text that does not begin with a space.
        return [text.lstrip() for text in PROBES]
    try:
        return [render([{"role": "user", "content": text}]) for text in PROBES]
    except Exception as error:  # a template can raise anything
        raise ModelError(
            where=where,
            found=f"cannot render a question: {type(error).__name__}: {error}",
            expected="a chat template that can render a user message",
            fix="run orpo-lite merge RUN to write the merged model again",
        ) from None


def _size(folder: Path) -> int:
    """Return the total size of a folder's files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
