"""Push a run's adapter or merged model with its card to the hub; only listed files are pushed."""

import fnmatch
import json
import re
import shlex
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from orpo_lite.base.find import weight_files
from orpo_lite.errors import (
    TOKEN,
    CheckpointError,
    Command,
    HubError,
    ModelError,
    OrpoLiteError,
    Overrides,
    RecipeError,
    reworded,
)
from orpo_lite.publishing.account import WrongTargetError, check_target
from orpo_lite.publishing.card_facts import CardOptions, read_objective
from orpo_lite.publishing.edited_card import complete_card, loads_adapter, read_edited_card
from orpo_lite.publishing.licences import find_license_files, read_licences, read_text, refuse_name
from orpo_lite.publishing.model_card import make_card
from orpo_lite.publishing.retry import LEAST, UnreadableError, own_token, run_in_thread
from orpo_lite.publishing.upload import check_card, commit_files
from orpo_lite.recipe.schema import Recipe
from orpo_lite.recipe.values import refuse_repository
from orpo_lite.runs.atomic import to_json
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, merge_command, quoted, resume_command
from orpo_lite.runs.folder import find_finished_adapter, find_merged, locked
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import SAMPLES, read_json, read_samples
from orpo_lite.updates import Update, run_to_end

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "generation_config.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# Vocabularies are not searched for local paths: nobody writes one there, but /root may be a token.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MERGED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
# Files whose omission is not reported.
EXPECTED_LOCAL = ("README.md", ".gitattributes", "verify.json")
MAX_HEADER = 1 << 24  # bytes of a safetensors header that are searched


@dataclass(frozen=True)
class PushResult:
    """A finished push."""

    repository: str
    page: str
    commit: str
    files: tuple[str, ...]


def push(
    run_folder: str | Path,
    repository: str,
    *,
    merged: Weights | None = None,
    is_public: bool = False,
    samples: int = 0,
) -> PushResult:
    """Push the adapter of a run, or its merged model, in one commit.

    The commit also removes weights and configurations of an earlier push that this push does not
    contain.

    Args:
        run_folder: the folder of a finished run.
        repository: owner/name, or only a name, which then belongs to your account.
        merged: push the model merged onto these weights instead of the adapter.
        is_public: a new repository is public, else private.
        samples: number of held-out prompts of the data to show in the card with answers, instead of
            neutral prompts.

    Raises:
        RecipeError: the hub or the base's licence does not allow the name.
        ModelError: the base's licence requires a text that is missing.
        CheckpointError: the run is not finished, or a file is a link, is incomplete or contains
            something that must not be published.
        HubError: the hub refuses, or is still unreachable after all attempts.
    """
    updates = push_events(
        run_folder, repository, merged=merged, is_public=is_public, samples=samples
    )
    return run_to_end(updates, lambda _: None)


def push_events(
    run_folder: str | Path,
    repository: str,
    *,
    merged: Weights | None = None,
    is_public: bool = False,
    samples: int = 0,
) -> Generator[Update, None, PushResult]:
    """Do the same as :func:`push`, as a generator that yields updates and returns the result."""
    path = Path(run_folder).expanduser()
    try:
        refuse_repository(repository)
    except ValueError as error:
        raise RecipeError(
            where=f"REPO {repository!r}",
            found="is not a valid repository name",
            expected=str(error),
            fix=push_command(
                path,
                _repository_in(repository),
                merged=merged,
                is_public=is_public,
                samples=samples,
            ),
        ) from None
    lock, recipe = read_lock(path), trained_recipe(path)
    folder = find_finished_adapter(path)
    again = merge_command(path, merged) if merged else resume_command(path)
    if merged:
        try:
            folder = find_merged(path, merged)
        except ModelError as error:
            raise CheckpointError(
                where=error.where, found=error.found, expected=error.expected, fix=again
            ) from None
    licences = run_in_thread(lambda: _read_licences(lock, recipe))
    refuse_name(repository, licences["base"], f"REPO {repository}")
    try:
        with locked(path) as notes:
            for note in notes:
                yield Update("note", note)
            _refuse_samples(path, samples)
            pushed = _select_files(folder, lock, again, is_merged=merged is not None)
            base = lock["base"]
            license_files = run_in_thread(
                lambda: find_license_files(
                    licences["base"],
                    base["name"],
                    base["revision"],
                    Path(base["path"]),
                    [folder, path],
                )
            )
            files = license_files | pushed
            target = yield from check_target(repository, is_private=not is_public)
            options = CardOptions(target.repository, merged, licences, samples)
            card = _card(path, options)
            if merged and loads_adapter(card):
                yield Update(
                    "note",
                    f"{path / 'README.md'} explains how to load an adapter; this is a merged model",
                )
            files["README.md"] = card.encode()
            _refuse_leaks(files, path, lock, recipe)
            yield from _notes(folder, files, licences)
            yield from check_card(target, card, str(path / "README.md"))
            title = read_objective(recipe, lock)["title"]
            what = "Merged model" if merged else "LoRA adapter"
            message = f"{what}, tuned with {title} by orpo-lite"
            commit = yield from commit_files(target, files, message, ours=(*ADAPTER, *MERGED))
    except UnreadableError as error:
        error.fix = again
        raise
    except WrongTargetError as error:
        public = not error.is_private
        command = push_command(
            path, error.instead, merged=merged, is_public=public, samples=samples
        )
        error.fix = reworded(error.fix, f"{error.fix}\n  then: {command}")
        raise
    except (RecipeError, CheckpointError):
        raise  # the same command would fail again
    except OrpoLiteError as error:
        command = push_command(
            path, repository, merged=merged, is_public=is_public, samples=samples
        )
        error.fix = reworded(error.fix, f"{error.fix}\n  then: {command}") if error.fix else command
        raise
    return PushResult(target.repository, target.page, commit, tuple(sorted(files)))


def push_command(
    path: Path,
    repository: str,
    *,
    merged: Weights | None = None,
    is_public: bool = False,
    samples: int = 0,
) -> Command:
    """Return the command that pushes a run."""
    flags = ["--merged"] if merged else []
    flags += ["--base", merged] if merged == "dequantized" else []
    flags += ["--public"] if is_public else []
    flags += ["--samples", str(samples)] if samples else []
    words = map(shlex.quote, [repository, *flags])
    return Command(" ".join(["orpo-lite push", quoted(path), *words]))


def _repository_in(text: str) -> str:
    """Return the repository in a URL; a placeholder if there is none."""
    found = ""
    if "://" in text:
        parts = text.split("://")[-1].strip("/").split("/")
        found = "/".join(parts[1:3])  # after the host
    try:
        refuse_repository(found)
    except ValueError:
        return "OWNER/NAME"
    return found


def _read_licences(lock: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the licences in lock.json; read missing ones again, as the rules depend on them."""
    base = lock["base"]
    return read_licences(
        base["name"], base["revision"], Path(base["path"]), recipe.data.names, lock.get("licences")
    )


def _select_files(
    folder: Path, lock: Mapping[str, Any], again: str, *, is_merged: bool
) -> dict[str, bytes | Path]:
    """Return the listed files of a folder by name, as paths or content. Others are not pushed."""
    patterns = (*(MERGED if is_merged else ADAPTER), *TOKENIZER)
    files: dict[str, bytes | Path] = {}
    for file in sorted(folder.glob("**/*")):  # does not follow links to folders
        name = file.relative_to(folder).as_posix()
        if not any(fnmatch.fnmatchcase(name, p) for p in patterns):
            continue
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(
                where=str(file),
                found="is a link" if file.is_symlink() else "is not a file",
                expected="a file; links are not followed",
                fix="replace it by a copy",
            )
        files[name] = file
    _refuse_broken(folder, files, again, is_merged=is_merged)
    if is_merged:
        return files
    # peft reads the base from this key. The path of a local base would be useless and private.
    try:
        config = read_json(folder / "adapter_config.json")
    except CheckpointError as error:
        error.fix = again
        raise
    config["base_model_name_or_path"] = lock["base"]["name"] if lock["base"]["revision"] else None
    files["adapter_config.json"] = to_json(config).encode()
    return files


def _refuse_broken(
    folder: Path, files: Mapping[str, object], again: str, *, is_merged: bool
) -> None:
    """Raise :class:`CheckpointError` for a model without complete weights or tokenizer."""
    weights = weight_files(folder) if is_merged else [folder / ADAPTER[1]]
    config = MERGED[0] if is_merged else ADAPTER[0]
    for file in (folder / config, *weights, folder / "tokenizer.json"):
        if file.name not in files:
            found = f"has no {file.name}"
            if file.exists():
                found = f"has {file.name}, which is not in the list of files to push"
            raise CheckpointError(
                where=str(folder), found=found, expected="a complete model", fix=again
            )
    for file in weights:
        try:
            with safe_open(file, "np"):  # checks the header and the file size
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                where=str(file),
                found=f"cannot be read ({error})",
                expected="a complete safetensors file",
                fix=again,
            ) from error


def _card(path: Path, options: CardOptions) -> str:
    """Return the card for this repository; an edited card is kept."""
    text = read_edited_card(path)
    if not text:
        return make_card(path, options)
    if options.samples:
        raise RecipeError(
            where="--samples",
            found=f"cannot be used, because {path / 'README.md'} was edited",
            expected="an unedited card",
            fix="leave it out and add the samples to the file; or remove the file",
        )
    return complete_card(path, text, options)


def _refuse_samples(path: Path, count: int) -> None:
    """Raise :class:`CheckpointError` if held-out samples are requested and there are none."""
    if count and not any(sample.source == "held-out" for sample in read_samples(path)):
        raise CheckpointError(
            where=f"run {path}",
            found=f"has no answers to held-out prompts in {SAMPLES}",
            expected="a run with output.samples and held-out pairs",
            fix="leave --samples out",
        )


def _notes(
    folder: Path, files: Mapping[str, object], licences: Mapping[str, Any]
) -> Generator[Update, None, None]:
    """Yield notes on the files before they are pushed."""
    known = {name.partition("/")[0] for name in files} | set(EXPECTED_LOCAL)
    omitted = sorted(file.name for file in folder.iterdir() if file.name not in known)
    if omitted:
        more = f" and {len(omitted) - 5} more" if len(omitted) > 5 else ""
        yield Update("note", f"not pushed: {', '.join(omitted[:5])}{more}")
    if not licences["base"]:
        yield Update(
            "note",
            "the base's card names no licence or cannot be read, so the model card names none",
        )
    yield Update("note", f"files: {', '.join(sorted(files))}")


def _refuse_leaks(
    files: Mapping[str, Path | bytes], path: Path, lock: Mapping[str, Any], recipe: Recipe
) -> None:
    """Raise :class:`CheckpointError` for an access token or a local path in a file to push."""
    own = own_token(f"run {path}") or ""
    paths = _local_paths(path, lock, recipe)
    for name, content in files.items():
        text = _header(content) if name.endswith(".safetensors") else read_text(content)
        text = _without_escapes(text)
        is_vocabulary = any(fnmatch.fnmatchcase(name, pattern) for pattern in VOCABULARY)
        local = None if is_vocabulary else paths.search(text)
        has_own_token = len(own) >= LEAST and own in text
        if has_own_token or TOKEN.search(text):
            found = "an access token"
        elif local:
            found = f"a path of this machine, {local[0]}"
        else:
            continue
        raise CheckpointError(
            where=f"run {path}, {name}",
            found=f"contains {found}",
            expected="no tokens or local paths in pushed files",
            fix="remove it from the file",
        )


def _local_paths(path: Path, lock: Mapping[str, Any], recipe: Recipe) -> re.Pattern[str]:
    """Return an expression for local paths of the run, base, data, hub cache and home.

    Each matches as a whole path or as the start of one; a short path such as /root or /data only as
    the start.
    """
    local = [
        str(path.absolute()),
        str(path.resolve()),
        lock["base"]["path"],
        constants.HF_HUB_CACHE,
        str(Path.home()),
    ]
    local += [
        name
        for name in (*recipe.data.names, recipe.data.dataset_test_split or "")
        if name.startswith("/")
    ]
    names = sorted({name.rstrip("/") for name in local} - {""}, key=len, reverse=True)
    ends = ["/" if name.count("/") == 1 else r"(?!\w)" for name in names]
    return re.compile(
        "|".join(re.escape(name) + end for name, end in zip(names, ends, strict=True))
    )


def _without_escapes(text: str) -> str:
    """Return a text with JSON's escapes of letters and slashes replaced."""
    text = re.sub(r"(?:\\u[0-9a-fA-F]{4})+", lambda found: str(json.loads(f'"{found[0]}"')), text)
    return text.replace("\\/", "/")


def _header(content: Path | bytes) -> str:
    """Return the header of a safetensors file, which can contain texts."""
    if isinstance(content, bytes):
        return read_text(content[:MAX_HEADER])
    with content.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), MAX_HEADER)
        return stream.read(length).decode("utf-8", "replace")


def check_push(recipe: Recipe, *, resume: bool) -> Generator[Update, None, None]:
    """Raise an error before a training whose push would fail. A resumed run only gets a note."""
    if not recipe.output.push_to_hub:
        return
    yield Update("stage", f"asking the hub whether {recipe.output.hub_model_id} may be written to")
    try:
        yield from check_target(
            str(recipe.output.hub_model_id), is_private=recipe.output.hub_private_repo
        )
    except HubError as error:
        if not resume:
            either = f"{error.fix}; or set output.push_to_hub=false and use `orpo-lite push` later"
            error.fix = Overrides({"output.push_to_hub": False}, text=either)
            raise
        yield Update("note", f"the push at the end may fail: {error.where} {error.found}")


def find_licences(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """Return the licences for lock.json.

    If the recipe has a push, check that the base's licence allows it.
    """
    base = inputs.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(
            str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"]
        )
        find_license_files(licences["base"], base.name, base.revision, base.path)
    return licences
