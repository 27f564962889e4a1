"""What a key of a recipe may hold: types with limits, and the checks of every mapping of keys."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vlbench.encoder_names import check_encoder_name
from vlbench.errors import suggest_name
from vlbench.strict_values import STRICT, convert_value, is_null, read_value

PartName = Literal["vision", "second_vision", "connector", "language"]
SampleFormat = Literal["caption", "chat"]
OnBadSample = Literal["auto", "quarantine", "stop"]
TilingRule = Literal["llava_next", "internvl"]
ImageAspect = Literal["square", "native"]
ViewTags = Literal["none", "newline", "numbered"]
PART_NAMES: tuple[str, ...] = get_args(PartName)
"""In the order of their tensors in files; a model of one vision encoder has no `second_vision`."""
ENCODER_PARTS = PART_NAMES[:2]
EXCLUSIVE_KEYS = (("epochs", "steps"), ("train", "mix"), ("only", "from"))
"""Pairs of keys of one mapping of which one at most has a value."""
MAX_IMAGE_SIZE = 4096  # pixels of a vision encoder's side; those in use have 224 to 1024
MAX_TILES = 64  # of an image; 6 to 12 are usual
GRID_PATTERN = re.compile("([1-9][0-9]?)x([1-9][0-9]?)")
MAX_COUNT = 1_000_000_000  # steps, samples, tokens: three orders above what anybody trains with
MAX_BATCH_SIZE = 1_000_000  # CLIP models are trained with up to 164,000
MAX_ROW_TOKENS = 1 << 20  # eight times the usual longest contexts; `plan` takes half a minute
MAX_DEVICES = 100_000
STAGE_NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def check_stage_name(name: str, info: ValidationInfo) -> str:
    """Return the name of a stage that the recipe has; a recipe's file may have any."""
    names = (info.context or {}).get("stage_names") or [name]
    if name not in names:
        close = suggest_name(name, names)
        raise ValueError(f"must be a stage, {', '.join(names)}, given '{name}'.{close}")
    if not STAGE_NAME_PATTERN.fullmatch(name):
        raise ValueError(f"must be letters, digits and _, given '{name}'")
    return name


def check_grid_text(text: str) -> str:
    """Return rows and columns of tiles, written as 2x3."""
    if not GRID_PATTERN.fullmatch(text):
        raise ValueError(f"must be ROWSxCOLUMNS, as in 2x3, given '{text}'")
    return text


def drop_frozen_parts(parts: Any) -> Any:
    """Return the parts of `train` without those that are null: they are frozen."""
    return {p: v for p, v in parts.items() if not is_null(v)} if isinstance(parts, dict) else parts


def check_row_tokens(value: Any) -> Any:
    """Return `auto` or a number of tokens within limits."""
    if value == "auto":
        return str(value)
    try:
        return convert_value(value, Annotated[int, Field(ge=16, le=MAX_ROW_TOKENS)])
    except ValueError as error:
        raise ValueError(f"{error}; auto is allowed, too") from None


Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
RowTokens = Annotated[int | Literal["auto"], BeforeValidator(check_row_tokens)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""Text that may be a path, in which a leading `~` is the home folder."""
StageName = Annotated[str, AfterValidator(check_stage_name)]
StageNames = Annotated[tuple[StageName, ...], Field(min_length=1)]
EncoderName = Annotated[PathText, AfterValidator(check_encoder_name)]
GridText = Annotated[str, AfterValidator(check_grid_text)]
BetaNumber = Annotated[float, Field(ge=0, le=0.999999)]


def key(meaning: str, default: Any = ..., **limits: Any) -> Any:
    """Declare a key: its meaning, its default (none: it must be given) and pydantic's limits."""
    return Field(default, description=meaning, **limits)


class RecipeSection(BaseModel):
    """A frozen mapping of declared keys: no other key, no value of another type.

    Of two exclusive keys only one has a value.
    """

    model_config = STRICT

    @field_validator("*", mode="before")
    @classmethod
    def _read_value(cls, value: object, info: ValidationInfo) -> object:
        return read_value(value, cls.model_fields[str(info.field_name)].annotation)

    @model_validator(mode="after")
    def _check_exclusive_keys(self) -> Self:
        given = {name.rstrip("_") for name, value in self if value is not None}
        for pair in EXCLUSIVE_KEYS:
            if given.issuperset(pair):
                raise ValueError(f"takes {pair[0]} or {pair[1]}, not both")
        return self
