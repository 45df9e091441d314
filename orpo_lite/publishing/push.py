"""Push a run's adapter or merged model to a repository of the hub, with its card; by an allow-list of files."""

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
from orpo_lite.publishing.card_facts import Shown, read_objective
from orpo_lite.publishing.edited_card import adopt_card, changed_card, loads_adapter
from orpo_lite.publishing.licences import find_license_files, read_licences, read_text, refuse_name
from orpo_lite.publishing.model_card import make_card
from orpo_lite.publishing.retry import LEAST, UnreadableError, own_token, run_in_thread
from orpo_lite.publishing.upload import check_card, commit_files
from orpo_lite.recipe.schema import Recipe, refuse_repository
from orpo_lite.runs.atomic import to_json
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import Weights, merge_command, quoted, resume_command
from orpo_lite.runs.folder import find_finished_adapter, find_merged, locked
from orpo_lite.runs.inputs import Inputs
from orpo_lite.runs.lock import read_lock
from orpo_lite.runs.records import SAMPLES, read_json, read_samples
from orpo_lite.updates import Update, run_to_end

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "generation_config.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
# The words of the base, which are no place to write a path, and where /root may well be one of them.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MERGED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
WRITTEN = ("README.md", ".gitattributes", "verify.json")  # not news when they stay here
HEADER = 1 << 24  # bytes of a safetensors header that are looked at


@dataclass(frozen=True)
class PushResult:
    """What went to the hub."""

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
    """Push the adapter of a run, or its merged model, in one commit; private unless ``is_public``.

    Weights and configurations of an earlier push that this one does not bring go in the same commit.

    Args:
        run_folder: of a finished run.
        repository: owner/name, or a name alone, which is then yours.
        merged: the model merged onto these weights, in place of the adapter.
        is_public: everybody can see it.
        samples: so many prompts of the data are shown in the card, with their answers, in place of neutral ones.

    Raises:
        RecipeError: a name that the hub, or the base's licence, does not allow.
        ModelError: the base's licence asks for a text that is not there.
        CheckpointError: nothing finished to push, a file that is a link or not whole, or that holds what must not be
            published.
        HubError: refused, or unreachable after the attempts.
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
    """:func:`push` as a generator: yields an :class:`Update` for all that happens and returns the result."""
    path = Path(run_folder).expanduser()
    try:
        refuse_repository(repository)
    except ValueError as error:
        raise RecipeError(
            where=f"REPO {repository!r}",
            found="is no name of a repository",
            expected=str(error),
            fix=push_command(
                path, _name_in(repository), merged=merged, is_public=is_public, samples=samples
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
    licences = run_in_thread(lambda: _licences(lock, recipe))
    refuse_name(repository, licences["base"], f"REPO {repository}")
    try:
        with locked(path) as notes:
            for note in notes:
                yield Update("note", note)
            _refuse_samples(path, samples)
            pushed = _files(folder, lock, again, is_merged=merged is not None)
            base = lock["base"]
            papers = run_in_thread(
                lambda: find_license_files(
                    licences["base"],
                    base["name"],
                    base["revision"],
                    Path(base["path"]),
                    [folder, path],
                )
            )
            files = papers | pushed
            target = yield from check_target(repository, is_private=not is_public)
            shown = Shown(target.repository, merged, licences, samples)
            card = _card(path, shown)
            if merged and loads_adapter(card):
                yield Update(
                    "note",
                    f"{path / 'README.md'} says how to load an adapter; this is a merged model",
                )
            files["README.md"] = card.encode()
            _refuse_leaks(files, path, lock, recipe)
            yield from _said(folder, files, licences)
            yield from check_card(target, card, str(path / "README.md"))
            what, title = (
                "Merged model" if merged else "LoRA adapter",
                read_objective(recipe, lock)["title"],
            )
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
        raise  # something has to change first, and perhaps the command with it
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
    """The line that pushes, to be pasted."""
    flags = ["--merged"] if merged else []
    flags += ["--base", merged] if merged == "dequantized" else []
    flags += ["--public"] if is_public else []
    flags += ["--samples", str(samples)] if samples else []
    return Command(
        " ".join(["orpo-lite push", quoted(path), *map(shlex.quote, [repository, *flags])])
    )


def _name_in(text: str) -> str:
    """The repository that an address leads to; else what stands for one."""
    found = "/".join(text.split("://")[-1].strip("/").split("/")[1:3]) if "://" in text else ""
    try:
        refuse_repository(found)
    except ValueError:
        return "OWNER/NAME"
    return found


def _licences(lock: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """As the run noted them; asked for again where it could not, for the rules depend on them."""
    base = lock["base"]
    return read_licences(
        base["name"], base["revision"], Path(base["path"]), recipe.data.names, lock.get("licences")
    )


def _files(
    folder: Path, lock: Mapping[str, Any], again: str, *, is_merged: bool
) -> dict[str, bytes | Path]:
    """What is pushed of a folder: the files on the list, by their names in it; anything else stays."""
    patterns = (*(MERGED if is_merged else ADAPTER), *TOKENIZER)
    files: dict[str, bytes | Path] = {}
    for file in sorted(folder.glob("**/*")):  # which enters no folder that is a link
        name = file.relative_to(folder).as_posix()
        if not any(fnmatch.fnmatchcase(name, p) for p in patterns):
            continue
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(
                where=str(file),
                found="is a link" if file.is_symlink() else "is no file",
                expected="a file; links are not followed",
                fix="a copy in its place",
            )
        files[name] = file
    _refuse_broken(folder, files, again, is_merged=is_merged)
    if is_merged:
        return files
    # peft looks here for the base; the path of a local one says nothing to others, and more of us than it should.
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
    """A model without its weights, or its tokenizer, would be pushed with success and load for nobody."""
    weights = weight_files(folder) if is_merged else [folder / ADAPTER[1]]
    for file in (
        folder / (MERGED if is_merged else ADAPTER)[0],
        *weights,
        folder / "tokenizer.json",
    ):
        if file.name not in files:
            found = (
                f"is not on the list of what is pushed: {file.name}"
                if file.exists()
                else f"has no {file.name}"
            )
            raise CheckpointError(
                where=str(folder), found=found, expected="a whole model", fix=again
            )
    for file in weights:
        try:
            with safe_open(file, "np"):  # the header, and whether the file is as long as that says
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                where=str(file),
                found=f"cannot be read ({error})",
                expected="whole safetensors",
                fix=again,
            ) from error


def _card(path: Path, shown: Shown) -> str:
    """The card for this repository; the run's own where a person has changed it."""
    text = changed_card(path)
    if not text:
        return make_card(path, shown)
    if shown.samples:
        raise RecipeError(
            where="--samples",
            found=f"given, and {path / 'README.md'} was changed by hand",
            expected="a card that is made afresh",
            fix="leave it out, and paste them; or remove the file",
        )
    return adopt_card(path, text, shown)


def _refuse_samples(path: Path, count: int) -> None:
    if count and not any(row.get("source", "held-out") == "held-out" for row in read_samples(path)):
        raise CheckpointError(
            where=f"run {path}",
            found=f"has no answers to its data in {SAMPLES}",
            expected="a run with output.samples and held-out pairs",
            fix="leave --samples out",
        )


def _said(
    folder: Path, files: Mapping[str, object], licences: Mapping[str, Any]
) -> Generator[Update, None, None]:
    """What a person should know before the files leave."""
    going = {name.partition("/")[0] for name in files}
    if staying := sorted(
        file.name for file in folder.iterdir() if file.name not in {*going, *WRITTEN}
    ):
        more = f" and {len(staying) - 5} more" if len(staying) > 5 else ""
        yield Update("note", f"not pushed: {', '.join(staying[:5])}{more}")
    if not licences["base"]:
        yield Update(
            "note", "the base's card names no licence, or cannot be read: the model card names none"
        )
    yield Update("note", f"files: {', '.join(sorted(files))}")


def _refuse_leaks(
    files: Mapping[str, Path | bytes], path: Path, lock: Mapping[str, Any], recipe: Recipe
) -> None:
    """The last look: a token, or a path of this machine, in anything that would leave it."""
    own = own_token(f"run {path}") or ""
    places = _places(path, lock, recipe)
    for name, content in files.items():
        text = _beginning(content) if name.endswith(".safetensors") else read_text(content)
        text = _plain(text)
        is_vocabulary = any(fnmatch.fnmatchcase(name, pattern) for pattern in VOCABULARY)
        place = None if is_vocabulary else places.search(text)
        if TOKEN.search(text) or (len(own) >= LEAST and own in text):
            found = "an access token"
        elif place:
            found = f"a path of this machine, {place[0]}"
        else:
            continue
        raise CheckpointError(
            where=f"run {path}, {name}",
            found=f"holds {found}",
            expected="nothing of the machine in what is pushed",
            fix="take it out of the file",
        )


def _places(path: Path, lock: Mapping[str, Any], recipe: Recipe) -> re.Pattern[str]:
    """Where things lie here: each as the whole of a path or as its beginning; /root or /data as the beginning alone."""
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
    return re.compile(
        "|".join(re.escape(name) + ("/" if name.count("/") == 1 else r"(?!\w)") for name in names)
    )


def _plain(text: str) -> str:
    """A text as JSON means it: letters may be escaped there."""
    text = re.sub(r"(?:\\u[0-9a-fA-F]{4})+", lambda found: str(json.loads(f'"{found[0]}"')), text)
    return text.replace("\\/", "/")


def _beginning(content: Path | bytes) -> str:
    """The header of a safetensors file, which can hold texts."""
    if isinstance(content, bytes):
        return read_text(content[:HEADER])
    with content.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), HEADER)
        return stream.read(length).decode("utf-8", "replace")


def check_push(recipe: Recipe, *, resume: bool) -> Generator[Update, None, None]:
    """Refuse to begin what could not be pushed in the end; a run that goes on is not held up for that."""
    if not recipe.output.push_to_hub:
        return
    yield Update("stage", f"asking the hub whether {recipe.output.hub_model_id} may be written to")
    try:
        yield from check_target(
            str(recipe.output.hub_model_id), is_private=recipe.output.hub_private_repo
        )
    except HubError as error:
        if not resume:
            either = f"{error.fix}; or output.push_to_hub=false, and `orpo-lite push` later"
            error.fix = Overrides({"output.push_to_hub": False}, text=either)
            raise
        yield Update("note", f"the push at the end may fail: {error.where} {error.found}")


def find_licences(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """What lock.json says of licences; where the recipe asks for a push, the base's must allow it."""
    base = inputs.base
    licences = read_licences(base.name, base.revision, base.path, recipe.data.names)
    if recipe.output.push_to_hub:
        refuse_name(
            str(recipe.output.hub_model_id), licences["base"], recipe.sources["output.hub_model_id"]
        )
        find_license_files(licences["base"], base.name, base.revision, base.path)
    return licences
