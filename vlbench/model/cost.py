"""What a connector costs at a size, counted on shapes alone: no weight takes memory."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlbench.model.compose import compose
from vlbench.schema import Recipe

TEXT = 64  # tokens of text beside the picture: a question


class Cost(NamedTuple):
    """The cost of one picture and a question of TEXT tokens."""

    parameters: int
    """Of the connector."""
    tokens: int
    """Places that the picture takes in the text."""
    latents: int
    """Visual tokens that decoder layers attend to; 0 when the places hold all there is."""
    flops: int
    """Floating-point operations of connector and language model up to the first answer token."""


def cost(recipe: Recipe) -> Cost:
    """Count the cost of the recipe's connector at the image size of its last stage."""
    side = list(recipe.stages.values())[-1].image_size
    recipe = dataclasses.replace(
        recipe,
        vision=dataclasses.replace(recipe.vision, weights="random"),
        language=dataclasses.replace(recipe.language, weights="random"),
    )
    with torch.device("meta"):
        vlm = compose(recipe, side).requires_grad_(False)
        shapes, connector = vlm.shapes, vlm.connector
        features = torch.empty(1, shapes.patches + connector.class_token, shapes.vision_width)
        length = connector.tokens_per_image + TEXT
        embeds = torch.empty(1, length, shapes.lm_width)
        positions = torch.empty(1, length, dtype=torch.long)
    sees = torch.zeros(1, length, dtype=torch.long)  # real: the text is sorted by what it sees
    counter: Any = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        visual = connector(features)
        hidden = vlm.read(embeds, visual, sees, position_ids=positions, use_cache=False)
        vlm.language.lm_head(hidden.last_hidden_state[:, -1])
    return Cost(
        parameters=sum(parameter.numel() for parameter in connector.parameters()),
        tokens=connector.tokens_per_image,
        latents=visual.shape[1] if connector.inject_at else 0,
        flops=counter.get_total_flops(),
    )
