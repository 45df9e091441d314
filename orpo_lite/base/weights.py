"""Compare the shapes of a base's weights with config.json. Only headers of files are read."""

from orpo_lite.base.blocks import stored_tensors
from orpo_lite.base.config import build_empty
from orpo_lite.base.find import Base
from orpo_lite.errors import ModelError

SHOWN = 3


def check_weights(base: Base) -> None:
    """Raise :class:`ModelError` if weights cannot be read or their shapes do not fit config.json.

    Tensors with unknown names are not checked, and the order of a shape's dimensions is ignored.
    The reason is that transformers renames and transposes some tensors when it loads them.
    """
    stored = stored_tensors(base.path)
    model = build_empty(base.config, base.path)
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = []
    for name, tensor in stored.items():
        names = (name, prefix + name, name.removeprefix(prefix))
        expected = next((shapes[key] for key in names if key in shapes), None)
        if expected is not None and sorted(expected) != sorted(tensor.shape):
            wrong.append((tensor, expected))
    if not wrong:
        return
    shown = [
        f"{tensor.name} is {tensor.shape} in {tensor.file.name}, not {shape}"
        for tensor, shape in wrong[:SHOWN]
    ]
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    size = base.config.get_text_config().vocab_size
    only_rows_differ = all(shape == (size, *tensor.shape[1:]) for tensor, shape in wrong)
    rows = {tensor.rows for tensor, _ in wrong}
    is_vocabulary = only_rows_differ and len(rows) == 1
    raise ModelError(
        where=str(base.path / "config.json"),
        found=f"does not fit the weights: {'; '.join(shown)}{more}",
        expected="config.json and weights of the same model",
        fix=f"set vocab_size to {min(rows)} in config.json"
        if is_vocabulary
        else "download all files of the model again",
    )
