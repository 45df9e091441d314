"""The base on disk: found, fetched, checked, and its tokenizer. Nothing is loaded, and no code of the base runs."""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo_lite.base.config import build_empty, read_config, refuse_adapter
from orpo_lite.base.download import TEXT, WEIGHTS, by_hand, download, refuse_pointers, resolve
from orpo_lite.errors import Command, HubError, ModelError, Overrides, RecipeError, first_line
from orpo_lite.recipe.schema import Recipe

BLOCK = 1 << 20


@dataclass(frozen=True)
class Base:
    """A base model on disk, checked to be one that can be trained."""

    name: str
    """As the recipe names it; a local folder as an absolute path."""
    path: Path
    revision: str | None
    """The hub commit; None for a local folder."""
    fingerprint: str
    """Hash of the configuration and of samples of the weights, once they are there: tells one base from another."""
    config: Any
    """The transformers configuration."""


def find_base(name: str, revision: str) -> Base:
    """The base's text files on disk; a hub name is checked for access and disk space first. No weights yet.

    Raises:
        ModelError: not a causal model in safetensors that needs no code of its own.
        FitError: not enough disk space for the download.
        HubError: unknown, gated, or unreachable.
    """
    path, commit = find_texts(name, revision, weights=True)
    name = name if commit else str(path)
    config = read_config(path, name)
    if lacking := [file.name for file in weight_files(path) if not commit and not file.is_file()]:
        refuse_adapter(path, name)
        raise ModelError(
            where=f"model {name}",
            found=f"has no {lacking[0]}",
            expected="weights in safetensors; pickles are never loaded",
        )
    return Base(name, path, commit, "", config)


def find_texts(name: str, revision: str, *, weights: bool = False) -> tuple[Path, str | None]:
    """The folder of a base's text files, tokenizer and configuration among them, and its hub commit; None if local.

    With ``weights``, a hub name is also checked for weights and for disk space for them. Raises as find_base.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        refuse_pointers(local, [*TEXT, *(WEIGHTS if weights else [])])
        return local.resolve(), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            where=f"model.model_name_or_path: {name}",
            found="no such folder",
            expected="a folder with config.json and safetensors, or a hub name",
        )
    commit = resolve(name, revision, [*TEXT, *(WEIGHTS if weights else [])])
    return download(name, commit, TEXT), commit


def fetch_weights(base: Base) -> Base:
    """The same base with its weights on disk and its fingerprint taken. Raises :class:`HubError`."""
    if base.revision is not None:
        download(base.name, base.revision, [*TEXT, *WEIGHTS])
        if lacking := [file.name for file in weight_files(base.path) if not file.is_file()]:
            refuse_adapter(base.path, base.name)
            raise HubError(
                where=f"hub, {base.name} at {base.revision}",
                found=f"{lacking[0]} is not in the cache",
                expected="all of the weights",
                fix=by_hand(base.name, base.revision),
            )
    return replace(base, fingerprint=fingerprint(base.path))


def is_wrapper(config: Any) -> bool:
    """Whether a base's files are of a model around the one that is trained, which names its layers otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    trained = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    return config.get_text_config() is not config and trained not in (config.architectures or [])


def positions_switch(config: Any, max_length: int) -> bool:
    """Whether the rotary embedding takes other frequencies for sequences that ``max_length`` allows."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    original = getattr(config, "original_max_position_embeddings", None)
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = (
                kind.get("original_max_position_embeddings")
                or original
                or config.max_position_embeddings
            )
            if max_length > limit:
                return True
    return False


def find_config(name: str, revision: str) -> Any:
    """A base's configuration and nothing else of it: of a folder, of the hub, or, for our recipes' bases, as shipped.

    Raises as :func:`find_base`.
    """
    from transformers import AutoConfig

    shipped = json.loads((Path(__file__).parent / "bases.json").read_text(encoding="utf-8"))
    if name in shipped and revision == "main" and not Path(name).is_dir():
        return AutoConfig.for_model(**shipped[name])
    local = Path(name).expanduser()
    if local.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        path, _ = find_texts(name, revision)
        return read_config(path, name)
    patterns = ["config.json"]
    return read_config(download(name, resolve(name, revision, patterns), patterns), name)


def weight_files(path: Path) -> list[Path]:
    """What transformers loads from a folder: model.safetensors, else the files that its index names, there or not.

    Raises:
        ModelError: an index that is broken or leads out of the folder.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            where=str(index),
            found=f"is broken: {error!r}",
            expected="a weight_map of file names beside it",
        ) from None
    return [path / name for name in names]


def fingerprint(path: Path) -> str:
    """Hash of config.json and, of each weight file, its size, its first and last MiB and 16 blocks between.

    Reading all of a 7B base would take a minute from a slow disk; fine-tuning moves every block of a tensor.
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
    """Names of the base's linear layers without the head, read from the architecture alone."""
    from torch import nn

    model = build_empty(base.config, base.path)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    # GPT-2's Conv1D counts as linear for peft too.
    return [
        name
        for name, module in modules
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def check_targets(recipe: Recipe, base: Base) -> None:
    """Refuse a target that matches nothing, which peft accepts as long as another one matches.

    Those of an adapter on disk are judged with its tensors, when its merge is planned.
    """
    if recipe.lora.target_modules == "all-linear" or recipe.model.adapter_name_or_path:
        return
    known = linear_names(base)
    for target in recipe.lora.target_modules:
        if not any(
            name == target or name.endswith(f".{target}") for name in known
        ):  # as peft matches them
            where = recipe.sources["lora.target_modules"]
            found = f"lora.target_modules: {target} matches no layer of {base.name}"
            if target == "lm_head":
                found = (
                    "lora.target_modules: lm_head is the output head, which a recipe does not adapt"
                )
            ends = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise ModelError(
                where=where,
                found=found,
                expected=f"of {', '.join(ends)}",
                fix=Overrides({"lora.target_modules": "all-linear"}),
            )


def check_embedding(recipe: Recipe, config: Any) -> None:
    """Refuse to move an embedding to host memory that is the output head as well. Raises :class:`RecipeError`."""
    if recipe.memory.embedding_on_cpu is True and config.get_text_config().tie_word_embeddings:
        raise RecipeError(
            where=recipe.sources["memory.embedding_on_cpu"],
            found="memory.embedding_on_cpu: true",
            expected="a base whose input embedding is not its output head as well",
            fix="leave it out",
        )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a base or adapter folder, as tokenizer.json says it. Raises :class:`ModelError`.

    Some classes of transformers keep only the vocabulary of tokenizer.json and build the rest themselves. Where that
    makes another tokenizer, or a slow one, the class is not used, and ``replaced`` says so in a sentence; it is ""
    otherwise.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    said, file, known = "", path / "tokenizer.json", {}
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=False
            )  # else it would ask at the terminal
            if file.is_file() and not tokenizer.is_fast:
                said = f"{type(tokenizer).__name__} is a slow one"
            elif changed := _changed_parts(file, tokenizer):
                said = f"{type(tokenizer).__name__} would change its {', '.join(changed)}"
            if said:
                vocabulary = _read_tokenizer(file)
                named = {
                    name: token
                    for name, token in tokenizer.special_tokens_map.items()
                    if isinstance(token, str)
                }
                known = {
                    name: token
                    for name, token in named.items()
                    if vocabulary.token_to_id(token) is not None
                }
        except Exception as error:  # a class may want packages that tokenizer.json does not need
            if isinstance(error, OSError | ValueError) or not file.is_file():
                raise
            said = f"its own class raises {type(error).__name__}"
        if said:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **known)
    except Exception as error:
        said = first_line(error)
        fix = ""
        settings = path / "tokenizer_config.json"
        if settings.is_file() and not _holds_object(settings):
            said, fix = f"{settings.name} is no JSON object", "download it again"
        elif file.is_file():
            said += f" (tokenizers {importlib.metadata.version('tokenizers')})"
            fix = Command(
                "pip install --upgrade tokenizers transformers",
                ", if it is newer; else download it again",
            )
        raise ModelError(
            where=f"tokenizer in {path}",
            found=said,
            expected="tokenizer.json beside the weights",
            fix=fix,
        ) from error
    tokenizer.replaced = said and f"tokenizer.json is used as it is: {said}"
    return tokenizer


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def _read_tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _changed_parts(file: Path, tokenizer: Any) -> list[str]:
    """The parts of tokenizer.json that a tokenizer does not have as they are written there."""
    from transformers import PreTrainedTokenizerFast

    # The general class reads the file itself.
    if type(tokenizer) is PreTrainedTokenizerFast or not file.is_file():
        return []
    written, built = (
        json.loads(backend.to_str())
        for backend in (_read_tokenizer(file), tokenizer.backend_tokenizer)
    )
    for parts in (written, built):  # an empty prefix is none
        parts["model"] = {name: value for name, value in parts["model"].items() if value}
    if written["post_processor"] is None:  # transformers writes one that does nothing
        built["post_processor"] = None
    built["added_tokens"] = [
        token for token in built["added_tokens"] if token in written["added_tokens"]
    ]
    names = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder", "added_tokens")
    return [name for name in names if written[name] != built[name]]


def pad_id(tokenizer: Any) -> int:
    """An id to fill rows with; any will do, for padding is masked by position."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
