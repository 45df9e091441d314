"""Push a run's adapter or merged model to the hub, with its model card.

Only these files are pushed: files whose names are in the lists of this module, the base's licence
files and the model card.
"""

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

from orpo_lite.base.download import ADAPTER
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
# Vocabularies are not searched for local paths. A token may look like a path, such as /root.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
MERGED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
# Files that are never pushed as they are. The note on files that are not pushed leaves them out.
EXPECTED_LOCAL = ("README.md", ".gitattributes", "verify.json")
MAX_HEADER = 1 << 24  # largest number of bytes of a safetensors header that are searched


@dataclass(frozen=True)
class PushResult:
    """The result of a push: the repository, the commit and the names of the files."""

    repository: str
    """The full name, such as "me/model"."""
    page: str
    """The URL of the repository."""
    commit: str
    """The URL of the commit."""
    files: tuple[str, ...]
    """The names of the pushed files."""


def push(
    run_folder: str | Path,
    repository: str,
    *,
    merged: Weights | None = None,
    is_public: bool = False,
    samples: int = 0,
) -> PushResult:
    """Push the adapter of a run, or its merged model, in one commit.

    The repository may have weights and configurations from an earlier push. If this push does not
    replace such a file, the commit removes the file.

    Args:
        run_folder: the folder of a finished run.
        repository: owner/name, or only a name. Without owner, your account is the owner.
        merged: the merged model to push, "original" or "dequantized" (the value of
            `merge --base`). None: push the adapter.
        is_public: True for a public repository, False for a private one. An existing repository
            must have this visibility already.
        samples: number of held-out prompts that the card shows with answers. 0: the card shows
            neutral prompts, which are not from the data.

    Raises:
        RecipeError: the hub or the base's licence does not allow the repository's name, or
            ``samples`` is set although a person has edited the card.
        ModelError: a text that the base's licence requires is missing.
        CheckpointError: the run is not finished, or a file is a symbolic link, is incomplete, or
            contains an access token or a local path.
        HubError: the hub refused the push, or the hub could not be reached.
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
    """Do the same as :func:`push`, but yield updates; finally return the result."""
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
            _refuse_samples(path, recipe, samples)
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
                    f"{path / 'README.md'} explains how to load an adapter, but a merged model is "
                    "pushed",
                )
            files["README.md"] = card.encode()
            _refuse_leaks(files, path, lock, recipe)
            yield from _notes(folder, files, licences)
            yield from check_card(target, card, str(path / "README.md"))
            what = "Merged model" if merged else "LoRA adapter"
            message = f"{what}, tuned with {read_objective(recipe, lock)['title']} by orpo-lite"
            if recipe.loss.trains_reward_model:
                what = "Merged reward model" if merged else "LoRA adapter of a reward model"
                message = f"{what}, trained by orpo-lite"
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
    """Return the shell command for a push. It has the same arguments as :func:`push`."""
    flags = ["--merged"] if merged else []
    flags += ["--base", merged] if merged == "dequantized" else []
    flags += ["--public"] if is_public else []
    flags += ["--samples", str(samples)] if samples else []
    words = map(shlex.quote, [repository, *flags])
    return Command(" ".join(["orpo-lite push", quoted(path), *words]))


def _repository_in(text: str) -> str:
    """Return owner/name from a URL: "https://huggingface.co/me/x/tree/main" -> "me/x".

    If there is no valid name, return "OWNER/NAME".
    """
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
    """Return the licences in lock.json. Licences that it lacks are read from the cards."""
    base = lock["base"]
    return read_licences(
        base["name"], base["revision"], Path(base["path"]), recipe.data.names, lock.get("licences")
    )


def _select_files(
    folder: Path, lock: Mapping[str, Any], again: str, *, is_merged: bool
) -> dict[str, bytes | Path]:
    """Return name -> path or content of the files to push. Only files in our lists are pushed.

    ``again`` is the command that writes the folder again. Errors name it as their fix.
    """
    patterns = (*(MERGED if is_merged else ADAPTER), *TOKENIZER)
    files: dict[str, bytes | Path] = {}
    for file in sorted(folder.glob("**/*")):  # does not follow links to folders
        name = file.relative_to(folder).as_posix()
        if not any(fnmatch.fnmatchcase(name, p) for p in patterns):
            continue
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(
                where=str(file),
                found="is a symbolic link" if file.is_symlink() else "is not a regular file",
                expected="a regular file, because symbolic links are not followed",
                fix="replace it by a copy of the file",
            )
        files[name] = file
    _refuse_broken(folder, files, again, is_merged=is_merged)
    if is_merged:
        return files
    # peft reads the base's name from this key. The path of a local base is private, and useless on
    # other machines.
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
    """Raise :class:`CheckpointError` if a needed file is missing or the weights are incomplete."""
    weights = weight_files(folder) if is_merged else [folder / ADAPTER[1]]
    config = MERGED[0] if is_merged else ADAPTER[0]
    for file in (folder / config, *weights, folder / "tokenizer.json"):
        if file.name not in files:
            found = f"has no {file.name}"
            if file.exists():
                found = f"has {file.name}, but this name is not in the list of files to push"
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
    """Return the card to push. If a person has edited README.md, its text is kept."""
    text = read_edited_card(path)
    if not text:
        return make_card(path, options)
    if options.samples:
        raise RecipeError(
            where="--samples",
            found=f"cannot be used, because {path / 'README.md'} was edited",
            expected="a card that nobody has edited",
            fix="leave --samples out and add the samples to README.md yourself; "
            "or remove README.md, so that a new card is written",
        )
    return complete_card(path, text, options)


def _refuse_samples(path: Path, recipe: Recipe, count: int) -> None:
    """Raise :class:`CheckpointError` if held-out samples are requested and the run has none."""
    found = ""
    if recipe.loss.trains_reward_model:
        found = "is a reward model, which writes no answers"
    elif not any(sample.source == "held-out" for sample in read_samples(path)):
        found = f"{SAMPLES} has no answers to held-out prompts"
    if count and found:
        raise CheckpointError(
            where=f"run {path}",
            found=found,
            expected="a run with held-out pairs and output.samples greater than 0",
            fix="leave --samples out",
        )


def _notes(
    folder: Path, files: Mapping[str, object], licences: Mapping[str, Any]
) -> Generator[Update, None, None]:
    """Yield notes about files that are not pushed, a missing licence, and files that are pushed."""
    known = {name.partition("/")[0] for name in files} | set(EXPECTED_LOCAL)
    omitted = sorted(file.name for file in folder.iterdir() if file.name not in known)
    if omitted:
        more = f" and {len(omitted) - 5} more" if len(omitted) > 5 else ""
        yield Update("note", f"not pushed: {', '.join(omitted[:5])}{more}")
    if not licences["base"]:
        yield Update(
            "note",
            "the model card names no licence, because the base's card names none or cannot be read",
        )
    yield Update("note", f"files to push: {', '.join(sorted(files))}")


def _refuse_leaks(
    files: Mapping[str, Path | bytes], path: Path, lock: Mapping[str, Any], recipe: Recipe
) -> None:
    """Raise :class:`CheckpointError` if a file to push contains an access token or a local path."""
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
            expected="no access tokens and no local paths in pushed files",
            fix=f"remove {'the path' if found.startswith('a path') else 'the token'} from the file",
        )


def _local_paths(path: Path, lock: Mapping[str, Any], recipe: Recipe) -> re.Pattern[str]:
    """Return a regular expression for the paths of the run, base, data, hub cache and home.

    It matches these paths and longer paths that begin with one of them. For a path with one part,
    such as /data, it matches only longer paths, such as /data/x.
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
    r"""Return a text with JSON's escapes replaced: ``\u0041`` -> ``A``, ``\/`` -> ``/``."""
    text = re.sub(r"(?:\\u[0-9a-fA-F]{4})+", lambda found: str(json.loads(f'"{found[0]}"')), text)
    return text.replace("\\/", "/")


def _header(content: Path | bytes) -> str:
    """Return the header of a safetensors file as text. Its metadata can contain any text."""
    if isinstance(content, bytes):
        return read_text(content[:MAX_HEADER])
    with content.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), MAX_HEADER)
        return stream.read(length).decode("utf-8", "replace")


def check_push(recipe: Recipe, *, resume: bool) -> Generator[Update, None, None]:
    """Check before the training that the push after the training is possible.

    If the push is not possible, raise :class:`HubError`. For a resumed run, yield a note instead
    of the error.
    If ``output.push_to_hub`` is false, check nothing.
    """
    if not recipe.output.push_to_hub:
        return
    yield Update("stage", f"checking the write access to {recipe.output.hub_model_id} on the hub")
    try:
        yield from check_target(
            str(recipe.output.hub_model_id), is_private=recipe.output.hub_private_repo
        )
    except HubError as error:
        if not resume:
            either = f"{error.fix}; or set output.push_to_hub=false and run `orpo-lite push` later"
            error.fix = Overrides({"output.push_to_hub": False}, text=either)
            raise
        yield Update("note", f"the push after the training may fail: {error.where}: {error.found}")


def find_licences(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """Return the licences of base and data, for lock.json.

    If ``output.push_to_hub`` is true, check that the base's licence allows the repository's name,
    and that all texts that the licence requires exist.

    Raises:
        RecipeError: the base's licence does not allow the repository's name.
        ModelError: a text that the base's licence requires is missing.
    """
    base = inputs.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(
            str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"]
        )
        find_license_files(licences["base"], base.name, base.revision, base.path)
    return licences
