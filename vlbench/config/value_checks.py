"""Checks of single values of a recipe that a type and its limits cannot express."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, ValidationInfo

from vlbench.errors import suggest_name
from vlbench.strict_values import convert_value, is_null

MAX_ROW_TOKENS = 1 << 20
"""Eight times the usual longest contexts; `plan` takes half a minute for such a row."""
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
