"""What a connector reads of one image, without values: its cost is counted on it."""

from __future__ import annotations

from typing import Any

import torch

from vlbench.connector.base import Connector, Shapes
from vlbench.connector.levels import Levels
from vlbench.connector.question import Question

QUESTION_TOKENS = 64  # tokens of text beside the image: a question


def blank_features(
    connector: Connector,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "meta",
    views: int = 1,
) -> Levels:
    """Return zeros as the features of the views of one image that `connector` reads."""
    length = shapes.patches + connector.class_token
    levels = tuple(
        torch.zeros(views, length, shapes.vision_width, dtype=dtype, device=device)
        for _ in connector.vision_layers or (None,)
    )
    return levels if connector.vision_layers else levels[0]


def blank_inputs(
    connector: Connector,
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "meta",
    views: int = 1,
) -> tuple[Any, ...]:
    """Return the arguments of `connector`'s forward for one image, and what is asked about it.

    Args:
        connector: The connector.
        shapes: Those that it was built for.
        dtype: Of the features.
        device: Where they are.
        views: Of the image, if it is tiled.
    """
    features = blank_features(connector, shapes, dtype, device, views)
    if not connector.question_length:
        return (features,)
    length = min(QUESTION_TOKENS, connector.question_length)
    embeddings = torch.zeros(views, length, shapes.lm_width, dtype=dtype, device=device)
    return features, Question(embeddings, torch.full((views,), length, device=device))
