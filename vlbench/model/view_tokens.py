"""Visual tokens of tiled images at their image positions, and the learned newline between rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlbench.connector.base import Connector
from vlbench.data.view_layout import ViewLayout, ViewSettings
from vlbench.encoder_names import NATIVE_ENCODER
from vlbench.errors import UserError
from vlbench.model.vision_encoder import VisionEncoder

NEWLINE_NAME = "image_newline"
"""A parameter that the model adds to its connector, so that it is trained, saved and sharded as a
part of it; the name is LLaVA-NeXT's."""


def connector_layout(
    connector: Connector, settings: ViewSettings | None, side: int, exif: bool = False
) -> ViewLayout | None:
    """Return the views of images with a connector; None where `settings` are: images have one.

    `side` is that of a view in pixels; with `exif` images are turned as their orientation says.
    Raises a UserError for images in their own aspect ratios and a connector of one grid.
    """
    if settings is None:
        return None
    if settings.tiling is None:
        _check_any_grid(connector)
    return ViewLayout(settings, side, connector.tokens_per_image, connector.token_grid, exif)


def check_native_aspect(
    vision: VisionEncoder, connector: Connector, settings: ViewSettings | None
) -> None:
    """Raise a UserError for images in their own aspect ratios where these two cannot take them."""
    if settings is None or settings.tiling is not None:
        return
    if not vision.takes_any_grid:
        raise UserError(
            "vision.aspect is native, and this vision encoder takes squares alone; a NaFlexViT of "
            f"timm takes pictures of any shape: say vision.name={NATIVE_ENCODER}, or "
            "vision.aspect=square"
        )
    _check_any_grid(connector)


def _check_any_grid(connector: Connector) -> None:
    if not connector.any_grid:
        raise UserError(
            f"vision.aspect is native, and connector {type(connector).__name__} needs the same "
            "rows and columns of patches of every image; linear, llava_mlp, dense and deepstack "
            "make each token of one patch (any_grid): name one of them, or say vision.aspect=square"
        )


def add_newline(connector: Connector, width: int) -> None:
    """Give a connector the embedding `[width]` that stands behind each row of visual tokens."""
    newline = nn.Parameter(torch.randn(width) / width**0.5)  # as in LLaVA-NeXT
    connector.register_parameter(NEWLINE_NAME, newline)


def newline_of(connector: Connector) -> Tensor:
    """Return the embedding `[lm_width]` that `add_newline` gave a connector."""
    newline: Tensor = getattr(connector, NEWLINE_NAME)
    return newline


def arrange_tokens(tokens: Tensor, visual_index: Tensor, newline: Tensor | None) -> Tensor:
    """Return what stands at the image positions, `[image positions, lm_width]`.

    Args:
        tokens: The visual tokens of all views, `[views x tokens, lm_width]`.
        visual_index: Which of them each position has, `[image positions]`.
        newline: What a position with NEWLINE_INDEX has; None: there is none.
    """
    # each token is taken once, and else with a gradient of 0: sums have one order on any device
    return mark_newlines(tokens[visual_index.clamp(min=0)], visual_index, newline)


def mark_newlines(values: Tensor, visual_index: Tensor, newline: Tensor | None) -> Tensor:
    """Return `values` `[image positions, lm_width]` with the newline where it belongs."""
    if newline is None:
        return values
    return torch.where(visual_index[:, None] < 0, newline.to(values.dtype), values)
