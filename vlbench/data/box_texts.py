"""Boxes of pictures as text, which a language model reads and writes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlbench.data.annotation_mapping import BoxText
from vlbench.data.mapping_texts import find_value
from vlbench.errors import BadSample, describe_json_type

BOX_DECIMALS = 2  # as LLaVA-1.5's data have


def box_text(values: Mapping[str, Any], box: BoxText) -> str:
    """Return a box as `[x1, y1, x2, y2]`, shares of the sides; BadSample for what is no box.

    LLaVA's boxes are shares of the picture padded to a square, as its training shows it:
    https://github.com/haotian-liu/LLaVA/issues/606.
    """
    corners = _numbers(values, box.corners)
    if len(corners) != 4:
        raise BadSample("", f"{box.corners[0]!r} has {len(corners)} numbers; a box has 4")
    left, top, right, bottom = corners
    if box.xywh is not None:
        right, bottom = left + right, top + bottom
    width, height = _numbers(values, box.size)
    if width <= 0 or height <= 0:
        raise BadSample("", f"the picture's size is {width:g} x {height:g} by {box.size}")
    x_offset = y_offset = 0.0
    if box.frame == "square":
        side = max(width, height)
        x_offset, y_offset = (side - width) // 2, (side - height) // 2
        width = height = side
    shares = (
        (left + x_offset) / width,
        (top + y_offset) / height,
        (right + x_offset) / width,
        (bottom + y_offset) / height,
    )
    return str([round(min(1.0, max(0.0, share)), BOX_DECIMALS) for share in shares])


def _numbers(values: Mapping[str, Any], paths: tuple[str, ...]) -> list[float]:
    """Return the numbers at several paths, or those of the list at one."""
    found = [find_value(values, path) for path in paths]
    found = found[0] if len(paths) == 1 and isinstance(found[0], list) else found
    for number in found:
        if not isinstance(number, int | float) or isinstance(number, bool):
            kind = describe_json_type(number)
            raise BadSample("", f"{', '.join(paths)}: is {kind}; expected a number")
    return [float(number) for number in found]
