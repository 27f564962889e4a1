"""What every mapping of a recipe is: a strict model whose keys have a meaning and limits."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from vlbench.strict_values import StrictModel

EXCLUSIVE_KEYS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""


def key(meaning: str, default: Any = ..., **limits: Any) -> Any:
    """Declare a key: its meaning, its default (none: it must be given) and pydantic's limits."""
    return Field(default, description=meaning, **limits)


class RecipeSection(StrictModel):
    """A mapping of a recipe, in which only one of two exclusive keys has a value."""

    @model_validator(mode="after")
    def _check_exclusive_keys(self) -> Self:
        given = {name.rstrip("_") for name, value in self if value is not None}
        for pair in EXCLUSIVE_KEYS:
            if given.issuperset(pair):
                raise ValueError(f"takes {pair[0]} or {pair[1]}, not both")
        return self
