"""Load a finished run, a model folder or a hub model, to score pairs or to answer prompts."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from orpo_lite import demo
from orpo_lite.base.find import Base, fetch_weights, find_base, load_tokenizer, pad_id
from orpo_lite.base.generation import read_generation_config, with_ends
from orpo_lite.data.chat_template import set_chat_template
from orpo_lite.data.dataset import PromptTokenizer
from orpo_lite.errors import CheckpointError, FitError, ModelError, first_line
from orpo_lite.model.generate import Answerer
from orpo_lite.model.load import choose_dtype, load_base, load_pair_model
from orpo_lite.model.pair_model import PairModel
from orpo_lite.model.score_head import is_reward_model
from orpo_lite.ops.devices import device_kind, dtype_name, is_out_of_memory
from orpo_lite.recipe.schema import Recipe
from orpo_lite.runs.changes import trained_recipe
from orpo_lite.runs.commands import quoted
from orpo_lite.runs.folder import FOLDERS, find_finished_adapter, find_merged, find_trained_base
from orpo_lite.runs.lock import read_lock, with_pinned_base
from orpo_lite.updates import Update

NO_LIMIT = 1 << 30  # of tokens
FREE_MEMORY = (
    "end other programs that use the GPU (nvidia-smi lists them); CUDA_VISIBLE_DEVICES= in front "
    "of the command computes on the CPU, which is slow"
)
NO_DATA = "none"  # data.dataset_name for a model that is not a run


@dataclass(frozen=True)
class FoundModel:
    """A model whose weights are on disk and not loaded yet."""

    name: str
    """The name that the person gave."""
    run: Path | None
    """The run folder; None for a model that does not belong to a run."""
    recipe: Recipe
    """The recipe of the run, with the built-in names resolved and the base pinned. For a model
    without a run it is the default recipe, with :data:`NO_DATA` as ``data.dataset_name``."""
    base: Base
    adapter: Path | None
    """The folder of the run's adapter; None for a model without an adapter."""
    files: Path
    """The folder with the tokenizer and the generation config."""
    device: torch.device
    dtype: str
    """The dtype in which the base is loaded."""

    @property
    def loading(self) -> Recipe:
        """The recipe for loading the weights. It has the values of ``dtype`` and ``adapter``."""
        adapter = str(self.adapter.resolve()) if self.adapter else None
        return self.recipe.override(
            {"model.dtype": self.dtype, "model.adapter_name_or_path": adapter}
        )


@dataclass(frozen=True)
class OpenRun(FoundModel):
    """A loaded model with its tokenizer."""

    model: PairModel
    """``model.without_adapter()`` switches the adapter off. Without an adapter it does nothing."""
    tokenizer: Any
    """Its chat template is the run's. Without a run, it is the one that a training would choose."""

    def prompt_tokenizer(self) -> PromptTokenizer:
        """Return a tokenizer for conversations. It uses the chat template and has no length limit.

        Use it as a context manager.
        """
        values: dict[str, Any] = dict.fromkeys(("max_length", "max_prompt_length"), NO_LIMIT)
        if self.run and self.recipe.data.chat_template != "none":
            # The tokenizer has the template. The file that the recipe names may be gone.
            values["chat_template"] = "auto"
        return PromptTokenizer(self.recipe.data.model_copy(update=values), self.tokenizer)

    def answerer(self, end_id: int) -> Answerer:
        """Return an :class:`Answerer` of this model. ``end_id`` is the token that ends an answer.

        The generation config may name more tokens that end an answer.
        """
        generation, _ = read_generation_config(self.files)
        return Answerer(self.model, with_ends(generation, end_id, pad_id(self.tokenizer)))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def open_run(
    name: str | Path, *, base_path: str | Path | None = None, command: str = "eval"
) -> Generator[Update, None, OpenRun]:
    """Find and load a model. For the arguments see :func:`find_model`.

    Raises:
        OrpoLiteError: an error of :func:`find_model` or :func:`load_model`.
    """
    yield Update("stage", f"loading {name}")
    return load_model(find_model(name, base_path=base_path, command=command))


def find_model(
    name: str | Path, *, base_path: str | Path | None = None, command: str = "eval"
) -> FoundModel:
    """Find a model by name. Weights of a hub model are downloaded, but no weights are loaded.

    A run will be loaded as it was trained: with the adapter, in the dtype of lock.json, and with
    the base in 4 bit if the training used 4 bit. All other models will be loaded without
    quantization, in 16 bit on a GPU and in float32 on a CPU. A merged folder inside a run has the
    run's recipe.

    Args:
        name: a run folder; ``RUN/merged`` or any other model folder of transformers; or a hub name.
        base_path: the folder that the run's base was moved to; None if the base was not moved.
        command: the orpo-lite command in the fix of an error, such as "eval".

    Raises:
        CheckpointError: there is no such folder, or its training or merge is not finished.
        ModelError: the folder has no causal model; or the base of the run is missing, or is not the
            base that the run was trained on.
        HubError: the hub has no such model, or is unreachable.
    """
    path = Path(name).expanduser()
    if (path / "recipe.yaml").is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return _find_trained(name, path, base_path, command)
    if not path.is_dir() and _is_meant_as_path(str(name), path):
        raise CheckpointError(
            where=f"run {path}",
            found="no such folder",
            expected="the folder of a run, the folder of a model, or a hub name",
        )
    weights = next((key for key, folder in FOLDERS.items() if folder == path.name), None)
    run = path.absolute().parent if weights else None
    if run and weights and (run / "recipe.yaml").is_file():
        base = find_base(str(find_merged(run, weights)), "main")
        recipe = demo.resolve_builtin(trained_recipe(run))
    else:
        run, base = None, fetch_weights(find_base(str(name), "main"))
        recipe = Recipe.model_validate(
            {"model": {"model_name_or_path": base.name}, "data": {"dataset_name": NO_DATA}}
        )
    recipe = recipe.override(
        {
            "model.model_name_or_path": base.name,
            "model.model_revision": base.revision or "main",
            "quantization.load_in_4bit": False,
            **({"loss.type": "reward"} if is_reward_model(base.config) else {}),
        }
    )
    device = choose_device(recipe)
    dtype = dtype_name(choose_dtype(recipe.model.dtype, device_kind(device)))
    return FoundModel(str(name), run, recipe, base, None, base.path, device, dtype)


def _find_trained(
    name: str | Path, path: Path, base_path: str | Path | None, command: str
) -> FoundModel:
    adapter, lock = find_finished_adapter(path), read_lock(path)
    base = find_trained_base(path, base_path, command=command)
    recipe = with_pinned_base(demo.resolve_builtin(trained_recipe(path)), lock)
    if base_path is not None:
        recipe = recipe.override({"model.model_name_or_path": str(base.path)})
    device = choose_device(recipe)
    # 4-bit weights depend on the dtype from which they are quantised. Use the training's dtype.
    dtype = lock.get("dtype") or dtype_name(choose_dtype(recipe.model.dtype, device_kind(device)))
    return FoundModel(str(name), path, recipe, base, adapter, adapter, device, dtype)


def choose_device(recipe: Recipe) -> torch.device:
    """Return the GPU if there is one and ``model.device`` is not ``cpu``; else the CPU."""
    is_gpu = torch.cuda.is_available() and recipe.model.device != "cpu"
    return torch.device("cuda" if is_gpu else "cpu")


def load_model(found: FoundModel) -> OpenRun:
    """Load the weights and the tokenizer of a model from :func:`find_model`.

    Raises:
        FitError: the GPU has too little memory.
        ModelError: the weights or the tokenizer cannot be read, or the tokenizer of a run lacks
            the chat template of the training.
    """
    tokenizer = load_tokenizer(found.files)
    if found.run is None:
        set_chat_template(tokenizer, found.recipe.data)
    elif tokenizer.chat_template is None and found.recipe.data.chat_template != "none":
        raise ModelError(
            where=f"tokenizer in {found.files}",
            found="has no chat template",
            expected="the chat template of the training",
            fix="restore the files that the training wrote to this folder",
        )
    with explain_out_of_memory(f"loading {found.name}", "enough memory for the weights"):
        if found.adapter:
            model = load_pair_model(found.loading, found.base, found.device)
        else:
            model = load_merged(found.loading, found.base, found.device)
    model.train(False)
    return OpenRun(**vars(found), model=model, tokenizer=tokenizer)


def load_merged(recipe: Recipe, base: Base, device: torch.device) -> PairModel:
    """Load a language model or a reward model that has no adapter."""
    kind = AutoModelForCausalLM
    if is_reward_model(base.config):
        kind = AutoModelForSequenceClassification
    return PairModel(load_base(recipe, base, device, kind).requires_grad_(False), recipe.memory)


def refuse_reward_model(found: FoundModel, where: str) -> None:
    """Raise ModelError if a model writes no text. ``where``: the command that needs text."""
    if found.recipe.loss.trains_reward_model:
        raise ModelError(
            where=where,
            found=f"{found.name} is a reward model, which writes no text",
            expected="a language model",
            fix=f"orpo-lite score {quoted(Path(found.name))} --data FILE writes the rewards of the "
            "replies in FILE",
        )


@contextmanager
def explain_out_of_memory(where: str, expected: str, fix: str = FREE_MEMORY) -> Iterator[None]:
    """Raise :class:`FitError` if the code in the ``with`` block runs out of GPU memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise FitError(
            where=where,
            found=f"the GPU is out of memory ({first_line(error)})",
            expected=expected,
            fix=fix,
        ) from error


def _is_meant_as_path(name: str, path: Path) -> bool:
    """Return True if a name that is not a folder looks like a path and not like a hub name."""
    is_near = name.count("/") == 1 and path.parent.is_dir()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or is_near
