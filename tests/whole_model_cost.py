"""The cost of a connector, counted in the whole model that it is for: the counter must give it."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlbench.config.model_schema import ModelConfig
from vlbench.model.build_vlm import build_vlm
from vlbench.model.connector_cost import ConnectorCost, count_connector_cost


def with_random_weights(config: ModelConfig) -> ModelConfig:
    """Return a model with random weights of vision encoders and language model."""
    random = {"weights": "random"}
    second = config.vision.second and config.vision.second.model_copy(update=random)
    vision = config.vision.model_copy(update={**random, "second": second})
    return replace(config, vision=vision, language=config.language.model_copy(update=random))


def count_model_cost(config: ModelConfig, image_size: int) -> ConnectorCost:
    """Count the cost of a connector in the model that it is for, at an image size in pixels."""
    with torch.device("meta"):
        return count_connector_cost(build_vlm(with_random_weights(config), image_size).model)
