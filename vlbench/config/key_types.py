"""What a key of a recipe may hold, and the checks of every mapping of keys."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vlbench.strict_values import STRICT, read_value

PartName = Literal["vision", "second_vision", "connector", "language"]
PART_NAMES: tuple[str, ...] = get_args(PartName)
"""In the order of their tensors in files; a model of one vision encoder has no `second_vision`."""
ENCODER_PARTS = PART_NAMES[:2]
EXCLUSIVE_KEYS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""
MAX_IMAGE_SIZE = 4096  # pixels of a vision encoder's side; those in use have 224 to 1024
MAX_COUNT = 1_000_000_000  # steps, samples, tokens: three orders above what anybody trains with

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
ImageSize = Annotated[int, Field(ge=8, le=MAX_IMAGE_SIZE)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""Text that may be a path, in which a leading `~` is the home folder."""


def key(meaning: str, default: Any = ..., **limits: Any) -> Any:
    """Declare a key: its meaning, its default (none: it must be given) and pydantic's limits."""
    return Field(default, description=meaning, **limits)


class RecipeSection(BaseModel):
    """A frozen mapping of declared keys: no other key, no value of another type."""

    model_config = STRICT

    @field_validator("*", mode="before")
    @classmethod
    def _read_value(cls, value: object, info: ValidationInfo) -> object:
        return read_value(value, cls.model_fields[str(info.field_name)].annotation)

    def find_conflicts(self) -> Iterable[str]:
        """Yield what is wrong between values that are right one by one."""
        return ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        given = {name.rstrip("_") for name, value in self if value is not None}
        exclusive = [pair for pair in EXCLUSIVE_KEYS if given.issuperset(pair)]
        rivals = (f"takes {one} or {other}, not both" for one, other in exclusive)
        for conflict in chain(rivals, self.find_conflicts()):
            raise ValueError(conflict)
        return self
