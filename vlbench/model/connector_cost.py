"""What a connector costs at a size, counted on shapes alone: no weight takes memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlbench.compat.transformers_internals import passed_through_mask
from vlbench.config.recipe import with_random_weights
from vlbench.config.schema import Recipe
from vlbench.model.build_vlm import build_vlm
from vlbench.model.train_flops import head_width, real_device, temporarily_frozen
from vlbench.model.vlm import VLM

QUESTION_TOKENS = 64  # tokens of text beside the picture: a question


class ConnectorCost(NamedTuple):
    """The cost of one picture and a question of TEXT tokens."""

    parameters: int
    """Of the connector."""
    tokens: int
    """Places that the picture takes in the text."""
    latents: int
    """Visual tokens that decoder layers attend to; 0 when the places hold all there is."""
    flops: int
    """Floating-point operations of connector and language model up to the first answer token."""
    cache: int
    """Bytes of the cache of keys and values that the picture takes in 16 bits, latents included."""


def count_recipe_cost(recipe: Recipe) -> ConnectorCost:
    """Count the cost of the recipe's connector at the image size of its last stage."""
    side = list(recipe.stages.values())[-1].image_size
    with torch.device("meta"):
        return count_connector_cost(build_vlm(with_random_weights(recipe), side))


def count_connector_cost(vlm: VLM) -> ConnectorCost:
    """Count the cost of a model's connector at its image size; on `meta` nothing is computed."""
    shapes, connector, config = vlm.shapes, vlm.connector, vlm.language.config
    kind = vlm.language.get_input_embeddings().weight.dtype
    length = connector.tokens_per_image + QUESTION_TOKENS
    with vlm.device:
        features = torch.zeros(
            1, shapes.patches + connector.class_token, shapes.vision_width, dtype=vlm.vision.dtype
        )
        embeds = torch.zeros(1, length, shapes.lm_width, dtype=kind)
        positions = torch.arange(length)[None]
    # real numbers: the text is sorted by what it sees
    sees = torch.zeros(1, length, dtype=torch.long, device=real_device(vlm.device))
    counter: Any = FlopCounterMode(display=False)
    with temporarily_frozen(vlm), torch.no_grad(), counter:
        visual = connector(features)
        hidden = vlm.run_decoder(
            embeds,
            visual,
            sees,
            position_ids=positions,
            attention_mask=passed_through_mask(vlm.device),
            lengths=[[length]],
            use_cache=False,
        )
        vlm.language.lm_head(hidden.last_hidden_state[:, -1])
    per_token = 2 * config.num_key_value_heads * head_width(config) * config.num_hidden_layers
    latents = visual.shape[1] if connector.inject_layers else 0
    return ConnectorCost(
        parameters=sum(parameter.numel() for parameter in connector.parameters()),
        tokens=connector.tokens_per_image,
        latents=latents,
        flops=counter.get_total_flops(),
        cache=2 * (per_token * connector.tokens_per_image + latents * visual.shape[2]),
    )
