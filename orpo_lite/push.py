"""Push: a run's adapter, or its merged model, to a repository of the hub, with its card; by an allow-list of files."""

import fnmatch
import shlex
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from orpo_lite import run
from orpo_lite.card import Shown, adopt_card, changed_card, loads_adapter, make_card
from orpo_lite.errors import TOKEN, CheckpointError, OrpoLiteError, RecipeError
from orpo_lite.licence import find_papers, read_licences, read_text, refuse_name
from orpo_lite.recipe import Recipe, refuse_repository
from orpo_lite.run import Update, Weights
from orpo_lite.upload import check_target, commit_files

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER)
MERGED = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors", *TOKENIZER)
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

    Args:
        run_folder: of a finished run.
        repository: owner/name, or a name alone, which is then yours.
        merged: the model merged onto these weights, in place of the adapter.
        is_public: everybody can see it.
        samples: so many prompts of the data are shown in the card, with their answers, in place of neutral ones.

    Raises:
        RecipeError: a name that the hub, or the base's licence, does not allow.
        ModelError: the base's licence asks for a text that is not there.
        CheckpointError: nothing finished to push, or a file that holds what must not be published.
        HubError: refused, or unreachable after the attempts.
    """
    updates = pushing(run_folder, repository, merged=merged, is_public=is_public, samples=samples)
    return run.drain(updates, lambda _: None)


def pushing(
    run_folder: str | Path,
    repository: str,
    *,
    merged: Weights | None = None,
    is_public: bool = False,
    samples: int = 0,
) -> Generator[Update, None, PushResult]:
    """:func:`push` as a generator: yields an :class:`Update` for all that happens and returns the result."""
    path = Path(run_folder)
    try:
        refuse_repository(repository)
    except ValueError as error:
        raise RecipeError(f"REPO {repository!r}", "is no name of a repository", str(error)) from None
    lock, recipe = run.read_lock(path), run.read_recipe(path)
    folder = run.find_result(path)
    if merged:
        folder = run.find_merged(path, merged)
    licences = _licences(lock, recipe)
    refuse_name(repository, licences["base"], f"REPO {repository}")
    try:
        with run.locked(path):
            _refuse_samples(path, samples)
            base = lock["base"]
            papers = find_papers(licences["base"], base["name"], base["revision"], Path(base["path"]), [folder, path])
            files = papers | _files(folder, lock, is_merged=merged is not None)
            target = yield from check_target(repository, is_private=not is_public)
            shown = Shown(target.repository, merged, licences, samples)
            card = _card(path, shown)
            if merged and loads_adapter(card):
                yield Update("note", f"{path / 'README.md'} says how to load an adapter; this is a merged model")
            files["README.md"] = card.encode()
            _refuse_leaks(files, path, lock, recipe)
            yield from _said(folder, files, licences)
            message = f"{'Merged model' if merged else 'LoRA adapter'}, tuned with ORPO by orpo-lite"
            commit = yield from commit_files(target, files, message)
    except OrpoLiteError as error:
        command = push_command(path, repository, merged=merged, is_public=is_public, samples=samples)
        error.remedy = f"{error.remedy}\n  then: {command}" if error.remedy else command
        raise
    return PushResult(target.repository, target.page, commit, tuple(sorted(files)))


def push_command(
    path: Path, repository: str, *, merged: Weights | None = None, is_public: bool = False, samples: int = 0
) -> str:
    """The line that pushes, to be pasted."""
    flags = ["--merged"] if merged else []
    flags += ["--base", merged] if merged == "dequantized" else []
    flags += ["--public"] if is_public else []
    flags += ["--samples", str(samples)] if samples else []
    return shlex.join(["orpo-lite", "push", str(path), repository, *flags])


def _licences(lock: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """As the run noted them; asked for again where it could not, for the rules depend on them."""
    base = lock["base"]
    return read_licences(base["name"], base["revision"], Path(base["path"]), recipe.data.names, lock.get("licences"))


def _files(folder: Path, lock: Mapping[str, Any], *, is_merged: bool) -> dict[str, bytes | Path]:
    """What is pushed of a folder: regular files on the list, by their plain names; anything else stays."""
    patterns = MERGED if is_merged else ADAPTER
    files: dict[str, bytes | Path] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.is_symlink() and any(fnmatch.fnmatchcase(file.name, p) for p in patterns):
            files[file.name] = file
    if is_merged:
        return files
    # peft looks here for the base; the path of a local one says nothing to others, and more of us than it should.
    config = run.read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = lock["base"]["name"] if lock["base"]["revision"] else None
    files["adapter_config.json"] = run.to_json(config).encode()
    return files


def _card(path: Path, shown: Shown) -> str:
    """The card for this repository; the run's own where a person has changed it."""
    text = changed_card(path)
    if not text:
        return make_card(path, shown)
    if shown.samples:
        found, remedy = (
            f"given, and {path / 'README.md'} was changed by hand",
            "leave it out, and paste them; or remove the file",
        )
        raise RecipeError("--samples", found, "a card that is made afresh", remedy)
    return adopt_card(path, text, shown)


def _refuse_samples(path: Path, count: int) -> None:
    if count and not any(row.get("source", "held-out") == "held-out" for row in run.read_samples(path)):
        expected = "a run with output.samples and held-out pairs"
        raise CheckpointError(
            f"run {path}", f"has no answers to its data in {run.SAMPLES}", expected, "leave --samples out"
        )


def _said(folder: Path, files: Mapping[str, object], licences: Mapping[str, Any]) -> Generator[Update, None, None]:
    """What a person should know before the files leave."""
    if staying := sorted(file.name for file in folder.iterdir() if file.name not in {*files, *WRITTEN}):
        more = f" and {len(staying) - 5} more" if len(staying) > 5 else ""
        yield Update("note", f"not pushed: {', '.join(staying[:5])}{more}")
    if not licences["base"]:
        yield Update("note", "the base's card names no licence, or cannot be read: the model card names none")
    yield Update("note", f"files: {', '.join(sorted(files))}")


def _refuse_leaks(files: Mapping[str, Path | bytes], path: Path, lock: Mapping[str, Any], recipe: Recipe) -> None:
    """The last look: a token, or a path of this machine, in anything that would leave it."""
    local = [str(path.resolve()), lock["base"]["path"], constants.HF_HUB_CACHE, str(Path.home())]
    local += [name for name in (*recipe.data.names, recipe.data.dataset_test_split or "") if name.startswith("/")]
    local = [name for name in local if name.count("/") > 1]  # /root may well be a word of a vocabulary
    for name, content in files.items():
        if name in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt") or name.endswith(".model"):
            continue  # the base's vocabulary, which is no place to write anything
        text = _beginning(content) if name.endswith(".safetensors") else read_text(content)
        found = next((word for word in local if word in text), "") or ("an access token" * bool(TOKEN.search(text)))
        if found:
            shown = found if found == "an access token" else f"a path of this machine, {found}"
            expected = "nothing of the machine in what is pushed"
            raise CheckpointError(f"run {path}, {name}", f"holds {shown}", expected, "take it out of the file")


def _beginning(content: Path | bytes) -> str:
    """The header of a safetensors file, which can hold texts."""
    if isinstance(content, bytes):
        return read_text(content[:HEADER])
    with content.open("rb") as stream:
        length = min(int.from_bytes(stream.read(8), "little"), HEADER)
        return stream.read(length).decode("utf-8", "replace")
