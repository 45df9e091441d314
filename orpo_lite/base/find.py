"""Find, download and check a base model, and load its tokenizer.

No weights are loaded, and no code of the base runs.
"""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo_lite.base.config import build_empty, read_config, refuse_adapter
from orpo_lite.base.download import (
    TEXT,
    WEIGHTS,
    download,
    manual_download,
    refuse_pointers,
    resolve,
)
from orpo_lite.errors import Command, HubError, ModelError, Overrides, RecipeError, first_line
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.values import has_form_of_path

BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Base:
    """A base model that can be trained. Its text files (config, tokenizer) are on disk."""

    name: str
    """The name on the hub, or the absolute path of a local folder."""
    path: Path
    revision: str | None
    """The commit on the hub, or None for a local folder."""
    fingerprint: str
    """The result of :func:`fingerprint`, or "" if the weights are not on disk yet."""
    config: Any
    """The transformers configuration."""


def find_base(name: str, revision: str) -> Base:
    """Find and check a base, and download its text files (config, tokenizer), not its weights.

    If the base is on the hub, check the access and the disk space for the weights.

    Args:
        name: a hub name (owner/name) or a local folder.
        revision: a branch, tag or commit on the hub.

    Raises:
        ModelError: the base is not a causal language model, has no weights in safetensors format,
            or needs Python code from its repository.
        FitError: there is not enough disk space for the download.
        HubError: the repository is unknown or gated, or the hub cannot be reached.
    """
    path, commit = find_text_files(name, revision, weights=True)
    name = name if commit else str(path)
    config = read_config(path, name)
    files = [] if commit else weight_files(path)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        refuse_adapter(path, name)
        raise ModelError(
            where=f"model {name}",
            found=f"has no {missing[0]}",
            expected="safetensors files, because pickle files are never loaded",
        )
    return Base(name, path, commit, "", config)


def find_text_files(name: str, revision: str, *, weights: bool = False) -> tuple[Path, str | None]:
    """Find or download the text files of a base (config, tokenizer). Return (folder, commit).

    For a local folder, the commit is None. If ``weights`` is true, also check that the hub has the
    weights and that the disk has space for them. Raises the same errors as :func:`find_base`.
    """
    local = Path(name).expanduser()
    patterns = [*TEXT, *WEIGHTS] if weights else TEXT
    if local.is_dir():
        refuse_pointers(local, patterns)
        return local.resolve(), None
    if has_form_of_path(name):
        raise ModelError(
            where=f"model.model_name_or_path: {name}",
            found="no such folder",
            expected="a folder with config.json and safetensors files, or a hub name",
        )
    commit = resolve(name, revision, patterns)
    return download(name, commit, TEXT), commit


def fetch_weights(base: Base) -> Base:
    """Download the weights of a base, and return the base with its fingerprint.

    Raises:
        HubError: the weights are not in the cache and cannot be downloaded.
        FitError: the disk is full.
    """
    if base.revision is not None:
        download(base.name, base.revision, [*TEXT, *WEIGHTS])
        missing = [file.name for file in weight_files(base.path) if not file.is_file()]
        if missing:
            refuse_adapter(base.path, base.name)
            raise HubError(
                where=f"hub, {base.name} at {base.revision}",
                found=f"{missing[0]} is not in the cache",
                expected="all weight files",
                fix=manual_download(base.name, base.revision),
            )
    return replace(base, fingerprint=fingerprint(base.path))


def is_wrapper(config: Any) -> bool:
    """Return True if the base is a larger model of which only the language model is trained.

    Example: the base has an image encoder and a language model. Its files then name a layer of the
    language model differently than the trained model does.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    trained = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return config.get_text_config() is not config and trained not in (config.architectures or [])


def changes_frequencies(config: Any, max_length: int) -> bool:
    """Return True if two sequences of up to ``max_length`` tokens can have different frequencies.

    The rope types dynamic and longrope have other rotary frequencies for a sequence that is longer
    than the model's original maximum. The result is True if the model has one of these types and
    ``max_length`` is above the original maximum.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models have one set of parameters per layer type.
    is_per_type = all(isinstance(value, dict) for value in rope.values())
    original = getattr(config, "original_max_position_embeddings", None)
    for parameters in rope.values() if is_per_type else [rope]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            own = parameters.get("original_max_position_embeddings")
            if max_length > (own or original or config.max_position_embeddings):
                return True
    return False


def find_config(name: str, revision: str) -> Any:
    """Return the transformers configuration of a base in a folder or on the hub.

    bases.json in this package holds the configurations of the bases that the shipped recipes use.
    For revision "main" of such a base, no request to the hub is needed.

    Raises the same errors as :func:`find_base`.
    """
    from transformers import AutoConfig

    shipped = json.loads((Path(__file__).parent / "bases.json").read_text(encoding="utf-8"))
    if name in shipped and revision == "main" and not Path(name).is_dir():
        return AutoConfig.for_model(**shipped[name])
    local = Path(name).expanduser()
    if local.is_dir() or has_form_of_path(name):
        path, _ = find_text_files(name, revision)
        return read_config(path, name)
    patterns = ["config.json"]
    return read_config(download(name, resolve(name, revision, patterns), patterns), name)


def weight_files(path: Path) -> list[Path]:
    """Return the paths of the weight files that transformers would load from a folder.

    If model.safetensors exists, or if there is no index, return only the path of model.safetensors.
    Otherwise return the paths in the index, model.safetensors.index.json. The files may be missing.

    Raises:
        ModelError: the index is damaged, or names a file outside the folder.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names a file outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            where=str(index),
            found=f"is damaged: {error!r}",
            expected="a weight_map with names of files in the same folder",
        ) from None
    return [path / name for name in names]


def fingerprint(path: Path) -> str:
    """Return a hash of a base: of its config.json and of samples of each weight file.

    The samples of a weight file are its name, its size, its first MiB, its last MiB, and 16
    blocks of 1 MiB between the first and the last. Reading a whole 7B base from a slow disk would
    take a minute. Samples are enough, because fine-tuning changes every block of a tensor.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for block in range(18):
                stream.seek(max(0, size - BLOCK) * block // 17)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def linear_names(base: Base) -> list[str]:
    """Return the names of the base's linear layers, without the output head. Load no weights."""
    from torch import nn

    model = build_empty(base.config, base.path)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    # peft treats GPT-2's Conv1D as linear too.
    return [
        name
        for name, module in modules
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def check_targets(recipe: Recipe, base: Base) -> None:
    """Raise :class:`ModelError` if an entry of lora.target_modules matches no layer.

    peft raises no error for such an entry if another entry matches a layer. If the recipe continues
    an existing adapter, the adapter's entries are checked later, before the merge.
    """
    if recipe.lora.target_modules == "all-linear" or recipe.model.adapter_name_or_path:
        return
    known = linear_names(base)
    for target in recipe.lora.target_modules:
        # peft matches names in the same way.
        if not any(name == target or name.endswith(f".{target}") for name in known):
            where = recipe.sources["lora.target_modules"]
            found = f"lora.target_modules: {target} matches no layer of {base.name}"
            if target == "lm_head":
                found = "lora.target_modules: lm_head is the output head, which gets no adapter"
            ends = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise ModelError(
                where=where,
                found=found,
                expected=f"one or more of {', '.join(ends)}",
                fix=Overrides({"lora.target_modules": "all-linear"}),
            )


def check_embedding(recipe: Recipe, config: Any) -> None:
    """Raise :class:`RecipeError` if memory.embedding_on_cpu is true and the embedding is tied.

    A tied embedding has the same weights as the output head, so the embedding cannot move to the
    CPU.
    """
    if recipe.memory.embedding_on_cpu is True and config.get_text_config().tie_word_embeddings:
        raise RecipeError(
            where=recipe.sources["memory.embedding_on_cpu"],
            found="memory.embedding_on_cpu: true",
            expected="a base whose input embedding is not tied to its output head",
            fix="leave the key out",
        )


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a base or adapter folder, exactly as tokenizer.json defines it.

    PreTrainedTokenizerFast reads tokenizer.json unchanged. It replaces the tokenizer's own class in
    three cases:

    - The own class changes a part of tokenizer.json.
    - The own class is a slow tokenizer.
    - The own class raises an error, but not an OSError or ValueError.

    The attribute ``replaced`` of the result gives the reason. It is "" without a replacement.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reason, file, known = "", path / "tokenizer.json", {}
    try:
        try:
            # Without trust_remote_code=False it could ask a question in the terminal.
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            if file.is_file() and not tokenizer.is_fast:
                reason = f"{type(tokenizer).__name__} is a slow tokenizer"
            elif changed := _changed_parts(file, tokenizer):
                reason = f"{type(tokenizer).__name__} would change its {', '.join(changed)}"
            if reason:
                known = _known_special_tokens(file, tokenizer)
        except Exception as error:  # a class may need packages that reading the file does not need
            if isinstance(error, OSError | ValueError) or not file.is_file():
                raise
            reason = f"its own class raises {type(error).__name__}"
        if reason:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **known)
    except Exception as error:
        found = first_line(error)
        fix = ""
        settings = path / "tokenizer_config.json"
        if settings.is_file() and not _holds_object(settings):
            found, fix = f"{settings.name} is not a JSON object", "download this file again"
        elif file.is_file():
            found += f" (tokenizers {importlib.metadata.version('tokenizers')})"
            fix = Command(
                "pip install --upgrade tokenizers transformers",
                ", if the tokenizer is newer than these packages; else download tokenizer.json "
                "again",
            )
        raise ModelError(
            where=f"tokenizer in {path}",
            found=found,
            expected="tokenizer.json next to the weights",
            fix=fix,
        ) from error
    tokenizer.replaced = f"tokenizer.json is used unchanged, because {reason}" if reason else ""
    return tokenizer


def _known_special_tokens(file: Path, tokenizer: Any) -> dict[str, str]:
    """Return name -> token of the special tokens that are in the vocabulary of tokenizer.json."""
    vocabulary = _read_tokenizer(file)
    return {
        name: token
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and vocabulary.token_to_id(token) is not None
    }


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _read_tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _changed_parts(file: Path, tokenizer: Any) -> list[str]:
    """Return the names of the parts in which a loaded tokenizer differs from tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    # The general class reads the file unchanged.
    if type(tokenizer) is PreTrainedTokenizerFast or not file.is_file():
        return []
    written = json.loads(_read_tokenizer(file).to_str())
    built = json.loads(tokenizer.backend_tokenizer.to_str())
    for parts in (written, built):  # an empty value means the same as no value
        parts["model"] = {name: value for name, value in parts["model"].items() if value}
    if written["post_processor"] is None:  # transformers adds one without effect
        built["post_processor"] = None
    built["added_tokens"] = [
        token for token in built["added_tokens"] if token in written["added_tokens"]
    ]
    names = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder", "added_tokens")
    return [name for name in names if written[name] != built[name]]


def pad_id(tokenizer: Any) -> int:
    """Return a token id for padding. Any id is right, because padding is masked by position."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return 0 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
