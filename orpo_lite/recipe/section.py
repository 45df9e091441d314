"""Define the base class of a recipe's sections."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of the recipe's sections. A section is immutable and refuses unknown keys.

    ``orpo-lite recipes show`` prints the docstrings of the fields.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put the documentation of each field on one line, because messages quote it."""
        for field in cls.model_fields.values():
            if field.description:
                field.description = " ".join(field.description.split())
