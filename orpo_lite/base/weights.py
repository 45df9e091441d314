"""The weights of a base against its config.json, by the headers of the files: nothing is loaded."""

from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.config import build_empty
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError

SHOWN = 3


def check_weights(base: Base) -> None:
    """Raise :class:`ModelError` for weights that cannot be read, or are of other shapes than config.json says.

    transformers renames and transposes some tensors as it loads them; a tensor of another name is left to the loading,
    and the order of a shape's numbers does not count.
    """
    stored = stored_tensors(base.path)
    model = build_empty(base.config, base.path)
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = []
    for name, tensor in stored.items():
        own = next(
            (key for key in (name, prefix + name, name.removeprefix(prefix)) if key in shapes), None
        )
        if own is not None and sorted(shapes[own]) != sorted(tensor.shape):
            wrong.append((tensor, shapes[own]))
    if not wrong:
        return
    shown = [
        f"{tensor.name} is {tensor.shape} in {tensor.file.name}, not {shape}"
        for tensor, shape in wrong[:SHOWN]
    ]
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    size = base.config.get_text_config().vocab_size
    rows = {tensor.rows for tensor, shape in wrong if shape == (size, *tensor.shape[1:])}
    is_vocabulary = len(rows) == 1 and all(
        shape == (size, *tensor.shape[1:]) for tensor, shape in wrong
    )
    raise ModelError(
        where=str(base.path / "config.json"),
        found=f"is of another model than the weights: {'; '.join(shown)}{more}",
        expected="config.json and weights of one model",
        fix=f"set vocab_size to {min(rows)} in config.json"
        if is_vocabulary
        else "download all of it again",
    )
