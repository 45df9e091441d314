"""Find the stored tensors from which transformers loads each parameter."""

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
    """The stored tensors that a parameter is loaded from.

    Parameters that are stored together in one tensor have the same origin.
    """

    parameters: tuple[str, ...]
    """The names of the parameters in the model."""
    converter: WeightConverter | None = None
    """transformers' conversion to parameters; None if the parameter is stored unchanged."""
    stored: dict[str, list[str]] = field(default_factory=dict)
    """Pattern of the converter -> names of stored tensors, in the order of the conversion."""

    @property
    def unchanged(self) -> str | None:
        """The name of the stored tensor if it is loaded unchanged; None if it is converted."""
        return None if self.converter else next(iter(self.stored))

    def to_stored(self, values: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Convert parameter values to the stored form. Return a dict: stored name -> tensor."""
        if self.converter is None:
            return {str(self.unchanged): values[self.parameters[0]]}
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
    """Return a dict: parameter name -> the stored tensors that the parameter is loaded from.

    ``names`` are the names of all stored tensors. transformers' own loading functions find the
    parameter of each name. A stored tensor that belongs to no parameter is left out, such as a
    tensor of a vision tower or of multi-token prediction.
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
            stored_together = [parameter]
            if converter:
                first, *others = converter.target_patterns
                stored_together += [parameter.replace(first, other) for other in others]
            origin = Origin(tuple(stored_together), converter)
            origins |= dict.fromkeys(stored_together, origin)
        origins[parameter].stored.setdefault(pattern or name, []).append(name)
    return origins
