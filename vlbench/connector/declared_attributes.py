"""What a connector says of itself, checked when it is built, and what it returns, checked as used.

A dozen lines of one's own may say anything: a tuple without its comma, a division that gives a
float, a method without `return`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from vlbench.errors import UserError

if TYPE_CHECKING:
    from vlbench.connector.base import Connector, Shapes


def check_attributes(connector: Connector, shapes: Shapes, name: str) -> None:
    """Raise a ValueError unless the attributes of a new connector can be what they say.

    Blocks in `vision_layers` are compared with those of the encoder where they are read.
    """
    _check_whole_number(name, "tokens_per_image", connector.tokens_per_image, 1)
    _check_whole_number(name, "question_length", connector.question_length, 0)
    for attribute in ("inject_layers", "vision_layers"):
        _check_numbers(name, attribute, getattr(connector, attribute))
    wrong = [one for one in connector.inject_layers if not 0 <= one < shapes.lm_layers]
    if wrong:
        raise ValueError(
            f"connector {name}: inject_layers names layer {wrong[0]}, and the language model has "
            f"{shapes.lm_layers}: 0 to {shapes.lm_layers - 1} are allowed"
        )
    if not connector.replaces_image_tokens:
        embedding = getattr(connector, "image_embedding", None)
        if not isinstance(embedding, Tensor) or embedding.shape != (shapes.lm_width,):
            given = list(embedding.shape) if isinstance(embedding, Tensor) else repr(embedding)
            raise ValueError(
                f"connector {name}: replaces_image_tokens is False, so image positions hold "
                f"image_embedding, a parameter [lm_width] = [{shapes.lm_width}]; given is {given}"
            )
    if connector.class_token and not shapes.has_class_token:
        raise ValueError(
            f"connector {name} reads the class token, and this vision encoder has none: name "
            "another vision encoder or another connector"
        )
    _check_question(connector, name)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's are, too


def _check_whole_number(name: str, attribute: str, value: object, least: int) -> None:
    if not _is_whole(value) or value < least:
        none = ", 0 for none" if not least else f" of at least {least}"
        raise ValueError(
            f"connector {name}: {attribute} is {value!r}; wanted is a whole number{none}"
        )


def _check_numbers(name: str, attribute: str, value: object) -> None:
    if not isinstance(value, Sequence) or not all(map(_is_whole, value)):
        raise ValueError(
            f"connector {name}: {attribute} is {value!r}; wanted are whole numbers in a tuple, "
            "as (3,) for one"
        )


def _check_question(connector: Connector, name: str) -> None:
    """Raise a ValueError unless a connector declares what its forward takes beside features."""
    length = connector.question_length
    given = (None,) * (2 if length else 1)
    for method in ("forward", "patch_attention"):
        try:
            inspect.signature(getattr(connector, method)).bind(*given)
        except TypeError as error:
            takes = "features and question" if length else "features alone"
            remedy = "" if length else "; for question set question_length, the tokens it may have"
            raise ValueError(
                f"connector {name}: question_length is {length}, so {method} is given "
                f"{takes}, and {error}{remedy}"
            ) from None


def check_levels(connector: Connector, visual: Any) -> None:
    """Raise a UserError unless what `forward` gave is a tensor, or a tuple of tensors."""
    levels = visual if isinstance(visual, tuple) and visual else (visual,)
    for level in levels:
        if not isinstance(level, Tensor):
            inside = " in a tuple" if level is not visual else ""
            raise UserError(
                f"connector {type(connector).__name__}: forward gave {type(level).__name__}"
                f"{inside}; promised is a tensor [images, tokens, width], or a tuple of them"
            )


def check_losses(connector: Connector, given: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what `losses` or `objective` gave; a UserError unless it is {name: (sum, count)}."""
    problem = "" if isinstance(given, dict) else type(given).__name__
    for name, value in given.items() if isinstance(given, dict) else ():
        is_pair = isinstance(value, tuple | list) and len(value) == 2
        if not is_pair:
            problem = f"{type(value).__name__} for {name!r}"
        elif not isinstance(value[0], Tensor) or value[0].numel() != 1:
            what = list(value[0].shape) if isinstance(value[0], Tensor) else type(value[0]).__name__
            problem = f"{what} as the sum of {name!r}"
        elif not isinstance(value[1], Real) and getattr(value[1], "shape", None) != ():
            problem = f"{type(value[1]).__name__} as the count of {name!r}"
    if problem:
        raise UserError(
            f"connector {type(connector).__name__}: its losses are {problem}; promised is "
            "{name: (sum, count)}: the sum over samples, a tensor of one number with a gradient, "
            "and how many it is a sum of"
        )
    return given  # type: ignore[no-any-return]


def check_injected(connector: Connector, layer: int, hidden: Tensor, given: Any) -> None:
    """Raise a UserError unless what `inject` gave can take the place of the layer's input."""
    if isinstance(given, Tensor) and given.shape == hidden.shape:
        return
    what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
    raise UserError(
        f"connector {type(connector).__name__}: inject gave {what} for layer {layer}; promised is "
        f"{list(hidden.shape)}, the shape of hidden"
    )
