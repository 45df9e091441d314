"""Where each parameter of a model lies in the files of its base: by the names that transformers looks for there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Origin:
    """The stored tensors that one parameter is loaded from, or several parameters that are stored as one."""

    parameters: tuple[str, ...]
    """Their names in memory."""
    converter: WeightConverter | None = None
    """What transformers makes them by; None where a stored tensor is the parameter itself."""
    stored: dict[str, list[str]] = field(default_factory=dict)
    """Names in the files, by the converter's pattern, in the order that it takes them in."""

    @property
    def same(self) -> str | None:
        """The name of the stored tensor that is the parameter itself, if one is."""
        return None if self.converter else next(iter(self.stored))

    def to_stored(self, values: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Values of the parameters, as they would be stored: the converter's operations backwards."""
        if self.converter is None:
            return {next(iter(self.stored)): values[self.parameters[0]]}
        back = self.converter.reverse_transform()
        parts: dict[str, Any] = {
            pattern: [values[name]]
            for pattern, name in zip(back.source_patterns, self.parameters, strict=True)
        }
        for operation in back.operations:
            parts = operation.convert(
                parts,
                source_patterns=back.source_patterns,
                target_patterns=back.target_patterns,
                full_layer_name=self.parameters[0],
                model=model,
                config=model.config,
            )
        found = {}
        for pattern, target in zip(
            self.converter.source_patterns, back.target_patterns, strict=True
        ):
            for number, name in enumerate(self.stored.get(pattern, [])):
                part = parts[target.replace("*", str(number))]
                found[name] = part[0] if isinstance(part, list) else part
        return found


def find_origins(model: Any, names: Iterable[str]) -> dict[str, Origin]:
    """Where each parameter of a model is among stored tensors of these names, as its own loader looks for them.

    Stored tensors that the model has no parameter for, of a vision tower or of layers that predict further tokens, are
    in none of them.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    state, prefix = model.state_dict(), model.base_model_prefix
    origins: dict[str, Origin] = {}
    for name in sorted(names, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            continue
        if parameter not in origins:
            converter = by_pattern[pattern] if pattern else None
            first, *others = converter.target_patterns if converter else [""]
            together = (parameter, *(parameter.replace(first, other) for other in others))
            origins |= dict.fromkeys(together, Origin(together, converter))
        origins[parameter].stored.setdefault(pattern or name, []).append(name)
    return origins
