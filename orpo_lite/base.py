"""The base and adapter on disk: found, fetched from the hub, checked. Nothing is loaded, and no code of theirs runs."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # its client's own, of a connection that fails
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from orpo_lite.errors import FULL, FitError, HubError, ModelError, Overrides
from orpo_lite.recipe import Recipe, gib

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
HUB_TIMEOUT = 30.0  # seconds; the hub's client would wait for ever
# What is fetched: of a base, and all of an adapter. Pickles never are.
TEXT = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
NOT_FETCHED = ["*/*", "consolidated*"]  # other people's formats: original/, onnx/, Mistral's own copy of its weights
# All the hub's own errors are among these; ValueError is a page that is not the hub's, or a name that cannot be one.
UNREACHABLE = (HTTPError, OSError, ValueError)


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
    if lacking := [file.name for file in weight_files(path) if not commit and not file.is_file()]:
        raise ModelError(
            where=f"model {name}",
            found=f"has no {lacking[0]}",
            expected="weights in safetensors; pickles are never loaded",
        )
    return Base(name, path, commit, "", read_config(path, name))


def find_texts(name: str, revision: str, *, weights: bool = False) -> tuple[Path, str | None]:
    """The folder of a base's text files, tokenizer and configuration among them, and its hub commit; None if local.

    With ``weights``, a hub name is also checked for weights and for disk space for them. Raises as find_base.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local.resolve(), None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        where = f"model.model_name_or_path: {name}"
        raise ModelError(
            where=where, found="no such folder", expected="a folder with config.json and safetensors, or a hub name"
        )
    commit = resolve(name, revision, [*TEXT, *(WEIGHTS if weights else [])])
    return download(name, commit, TEXT), commit


def fetch_weights(base: Base) -> Base:
    """The same base with its weights on disk and its fingerprint taken. Raises :class:`HubError`."""
    if base.revision is not None:
        download(base.name, base.revision, [*TEXT, *WEIGHTS])
        if lacking := [file.name for file in weight_files(base.path) if not file.is_file()]:
            where, fix = f"hub, {base.name} at {base.revision}", _by_hand(base.name, base.revision)
            raise HubError(
                where=where, found=f"{lacking[0]} is not in the cache", expected="all of the weights", fix=fix
            )
    return replace(base, fingerprint=fingerprint(base.path))


def resolve(name: str, revision: str, patterns: list[str]) -> str:
    """The commit of a hub repository that we may read and whose files we have room for; offline, the cached one.

    Raises:
        ModelError: it has no weights in safetensors.
        FitError: not enough disk space.
        HubError: unknown, gated, or unreachable.
    """
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except UNREACHABLE as error:
        refused = isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError)
        cached = None if refused else _cached(name, revision, [p for p in patterns if "safetensors" not in p])
        if cached is None:
            raise hub_error(name, revision, error) from error
        logger.warning("the hub cannot be reached (%s); using the cached copy of %s", type(error).__name__, name)
        return cached.name
    commit, files = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = list(filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=NOT_FETCHED))
    if WEIGHTS[0] in patterns and not any(file.endswith(".safetensors") for file in wanted):
        raise ModelError(
            where=f"model {name}",
            found="has no weights in safetensors",
            expected="safetensors; pickles are never loaded",
        )
    missing = [f for f in wanted if not isinstance(try_to_load_from_cache(name, f, revision=commit), str)]
    check_disk(Path(constants.HF_HUB_CACHE), sum(files[f] for f in missing), f"downloading {name}")
    if revision != commit:
        _remember(name, revision, commit)
    return commit


def hub_host() -> str:
    """Whom the hub's client asks; "" when it is told to ask nobody."""
    return "" if constants.HF_HUB_OFFLINE else urlsplit(constants.ENDPOINT).netloc


def _remember(name: str, revision: str, commit: str) -> None:
    """Note in the cache where a branch stands, for the day without a network; a download by commit does not."""
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "refs" / revision
    with suppress(OSError):  # a cache that others fill, and we only read
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")


def download(name: str, commit: str, patterns: list[str]) -> Path:
    """A hub repository's files at one commit, from the cache where they are there.

    Raises:
        FitError: the disk filled up.
        HubError: gated, or unreachable.
    """
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=NOT_FETCHED))
    except UNREACHABLE as error:
        if isinstance(error, OSError) and error.errno in FULL:
            found, fix = "the disk is full", "free some space, or set HF_HOME to another disk"
            raise FitError(where=f"downloading {name}, to {constants.HF_HUB_CACHE}", found=found, fix=fix) from error
        raise hub_error(name, commit, error) from error


def _cached(name: str, revision: str, patterns: list[str]) -> Path | None:
    try:
        options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": NOT_FETCHED, "local_files_only": True}
        return Path(snapshot_download(name, revision=revision, **options))
    except UNREACHABLE:
        return None


def hub_error(name: str, revision: str, error: Exception) -> HubError:
    """What the hub's refusal means and what to do about it."""
    where = f"hub, {name} at {revision}"
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, UNREACHABLE):
        error = error.__cause__  # it was asked for, this was the answer, and it is not in the cache either
    if isinstance(error, GatedRepoError):
        fix = f"ask for it at {page}, then `hf auth login`"
        return HubError(where=where, found="is gated", expected="access granted to your account", fix=fix)
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            where=where,
            found="has no such revision",
            expected="a branch, tag or commit",
            fix=f"see {page}/commits/main",
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        fix = "check the spelling; a private one needs `hf auth login`; a local folder must exist"
        return HubError(
            where=where, found="is not a repository that you can see", expected="owner/name, or a local folder", fix=fix
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        fix = f"`hf auth login` with a token that may read {page}"
        return HubError(
            where=where, found=f"is refused to you ({status})", expected="access granted to your account", fix=fix
        )
    what = f"is not served ({status})" if status else f"cannot be reached ({type(error).__name__})"
    fix = f"try again later; or {_by_hand(name, revision)}"
    return HubError(
        where=where, found=f"{what} and is not in the cache", expected="a connection, or a downloaded copy", fix=fix
    )


def _by_hand(name: str, revision: str) -> str:
    return f"on a connected machine: hf download {name} --revision {revision}"


def check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Raise :class:`FitError` unless ``needed`` bytes are free where ``folder`` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        found, fix = f"{gib(needed)} needed, {gib(free)} free", "free some space"
        if purpose.startswith("downloading"):
            fix += ", or set HF_HOME to another disk"
        raise FitError(where=f"{purpose}, to {folder}", found=found, fix=fix)


def read_config(path: Path, name: str) -> Any:
    """The transformers configuration of a base that can be trained. Raises :class:`ModelError`."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = f"model {name}"
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(where=where, found="has no config.json", expected="a transformers model folder") from None
    except ValueError as error:
        raise ModelError(
            where=f"{path / 'config.json'}", found=f"is not JSON: {error}", expected="a transformers configuration"
        ) from None
    if "auto_map" in raw:
        raise ModelError(
            where=where, found="needs code of its own (auto_map)", expected="an architecture that transformers ships"
        )
    if "quantization_config" in raw:
        raise ModelError(
            where=where,
            found="is already quantised",
            expected="the 16-bit weights: quantising and merging start from them",
        )
    if raw.get("is_encoder_decoder") or raw.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            where=where,
            found=f"model_type {raw.get('model_type')!r}",
            expected="a decoder-only (causal) language model",
        )
    return AutoConfig.from_pretrained(path)


def positions_switch(config: Any, max_length: int) -> bool:
    """Whether the rotary embedding takes other frequencies for sequences that ``max_length`` allows."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    original = getattr(config, "original_max_position_embeddings", None)
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = kind.get("original_max_position_embeddings") or original or config.max_position_embeddings
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


def read_sizes(folder: Path) -> dict[str, Any]:
    """What config.json says of the text model's sizes, read without transformers; {} when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {**config, **config.get("text_config", {})} if isinstance(config, dict) else {}


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
            where=str(index), found=f"is broken: {error!r}", expected="a weight_map of file names beside it"
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


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a base or adapter folder. Raises :class:`ModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # else it would ask at the terminal
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            where=f"tokenizer in {path}", found=reason, expected="tokenizer.json beside the weights"
        ) from error


def pad_id(tokenizer: Any) -> int:
    """An id to fill rows with; any will do, for padding is masked by position."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def linear_names(base: Base) -> list[str]:
    """Names of the base's linear layers without the head, read from the architecture alone."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    # GPT-2's Conv1D counts as linear for peft too.
    return [
        name
        for name, module in modules
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def check_targets(recipe: Recipe, base: Base) -> None:
    """Refuse a target that matches nothing, which peft accepts as long as another one matches."""
    if recipe.lora.target_modules == "all-linear":
        return
    known = linear_names(base)
    for target in recipe.lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in known):  # as peft matches them
            where = recipe.sources["lora.target_modules"]
            found = f"lora.target_modules: {target} matches no layer of {base.name}"
            if target == "lm_head":
                found = "lora.target_modules: lm_head is the output head, which a recipe does not adapt"
            ends = sorted({name.rsplit(".", 1)[-1] for name in known})
            raise ModelError(
                where=where,
                found=found,
                expected=f"of {', '.join(ends)}",
                fix=Overrides({"lora.target_modules": "all-linear"}),
            )


# --- an adapter to train on from


def find_adapter(name: str) -> Path:
    """The folder of a LoRA adapter in safetensors, local or fetched. Raises :class:`ModelError`, :class:`HubError`."""
    local = Path(name).expanduser()
    folder = local if local.is_dir() else download(name, resolve(name, "main", ADAPTER), ADAPTER)
    for file in ADAPTER:
        if not (folder / file).is_file():
            where = f"model.adapter_name_or_path: {name}"
            raise ModelError(where=where, found=f"has no {file}", expected="a peft LoRA adapter in safetensors")
    return folder


# What an adapter may choose; any other option of LoraConfig must stand at its default.
ADAPTER_KEYS = (
    "r lora_alpha lora_dropout target_modules use_rslora use_dora rank_pattern alpha_pattern init_lora_weights "
    "exclude_modules target_parameters layers_to_transform layers_pattern fan_in_fan_out "
    "auto_mapping base_model_name_or_path inference_mode peft_version revision task_type"
).split()


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for --max-lora-rank


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The ``--max-lora-rank`` that serves an adapter; None for one that vLLM does not serve as it is.

    It knows neither DoRA nor adapted experts, and has one scale, ``lora_alpha / r``, for all layers (its PEFTHelper).
    """
    if any(config.get(key) for key in ("use_dora", "target_parameters", "rank_pattern", "alpha_pattern")):
        return None
    return next((rank for rank in VLLM_RANKS if rank >= config["r"]), None)


def read_adapter_config(folder: Path) -> Any:
    """The peft configuration of a LoRA that trains nothing else and fits the base as it is; or :class:`ModelError`."""
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        options = dict(raw)
    except (ValueError, TypeError) as error:
        raise ModelError(
            where=str(path), found=f"is no JSON object: {error}", expected="a peft configuration"
        ) from None
    # peft would take its own defaults for them, and with these the adapter is another one.
    saved = "as the adapter was saved with"
    for key in ("r", "lora_alpha"):
        value = options.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value % 1 or value <= 0:
            raise ModelError(where=str(path), found=f"{key}: {json.dumps(value)}", expected=f"a whole number, {saved}")
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ModelError(where=str(path), found="names no target_modules", expected=f"those, {saved}")
    default = LoraConfig().to_dict()
    for key, value in options.items():
        if value and key not in ADAPTER_KEYS and value != default.get(key):
            raise ModelError(
                where=str(path), found=f"{key}: {value!r}", expected="plain LoRA, and nothing else that trains"
            )
    init = options.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ModelError(
            where=str(path), found=f"init_lora_weights: {init!r}", expected="one that leaves the base as it is"
        )
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False  # as saved, an adapter is for use; here it trains on
    config.init_lora_weights = True  # any will do: the adapter's own weights follow
    return config
