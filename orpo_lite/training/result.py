"""What a training leaves: the adapter that is kept, with its tokenizer, template and generation config."""

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_lite.errors import CheckpointError
from orpo_lite.model.generate import Sample
from orpo_lite.model.pair_model import PairModel
from orpo_lite.runs.atomic import new_folder, to_json, write_text
from orpo_lite.runs.folder import RESULT
from orpo_lite.runs.inputs import Inputs
from orpo_lite.training import checkpoint
from orpo_lite.training.session import Session
from orpo_lite.training.state import TrainState
from orpo_lite.updates import Update


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    run: Path
    steps: int
    seconds: float
    before: Mapping[str, float]
    """Held-out metrics before the first step; {} without held-out pairs."""
    after: Mapping[str, float]
    """Held-out metrics of the adapter that was kept."""
    kept_step: int
    samples: tuple[Sample, ...]
    """What is answered before and after (``output.samples``)."""


def keep_best(session: Session, state: TrainState) -> Generator[Update, None, int]:
    """Write ``adapter/`` from the best checkpoint, else from the last step; returns the step it is of."""
    kept, path = state.step, session.path
    if session.recipe.training.load_best_model_at_end and state.best_step is not None:
        try:
            checkpoint.load_adapter(checkpoint.at_step(path, state.best_step), session.pair_model)
            kept = state.best_step
        except CheckpointError as error:  # the training is not lost for that
            yield Update("note", f"the best checkpoint cannot be used, the last step is kept ({error.found})")
    if kept != state.best_step:
        state.after = state.latest
    elif kept == 0:
        yield Update("note", "no step was better than the start: lower training.learning_rate, or train longer")
    session.processes.on_main(save_adapter, path / "adapter", session.pair_model, session.inputs)
    record = to_json({"steps": state.step, "kept_step": kept})
    session.processes.on_main(write_text, path / RESULT, record)
    session.processes.wait()
    return kept


def save_adapter(folder: Path, model: PairModel, inputs: Inputs) -> None:
    """The result: adapter, tokenizer with its template, generation config; complete or not there."""
    from transformers import GenerationConfig

    with new_folder(folder) as temporary:
        model.model.peft_config["default"].base_model_name_or_path = inputs.base.name  # type: ignore[index,union-attr]
        model.model.save_pretrained(temporary)  # type: ignore[operator]
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        _with_bos(inputs.tokenizer).save_pretrained(temporary)
        has_own = (inputs.base.path / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(inputs.base.path) if has_own else GenerationConfig()
        known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        # The reply ends with the template's own end token, which a base's config often does not know.
        config.eos_token_id = list(dict.fromkeys([inputs.end_id, *(i for i in known if i is not None)]))
        config.pad_token_id = inputs.pad_id
        if config.temperature is not None or config.top_p is not None:
            config.do_sample = True  # Llama 2 ships them without it, and transformers refuses to save that
        config.save_pretrained(temporary)


def _with_bos(tokenizer: Any) -> Any:
    """The tokenizer, its template writing the bos where training had one before the text and the template has none.

    Whoever serves the model renders the template and adds nothing: the model would miss the token that it began with.
    """
    template, bos = tokenizer.chat_template, tokenizer.bos_token
    leads = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not leads or not isinstance(template, str):
        return tokenizer
    turns = [{"role": "user", "content": "a"}]
    if str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)).startswith(bos):
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + template
    return tokenizer
