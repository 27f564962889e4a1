"""The cost of a connector, counted in the whole model that it is for: the counter must give it."""

from __future__ import annotations

import torch

from vlbench.config.model_schema import ModelConfig
from vlbench.model.build_vlm import build_vlm
from vlbench.model.connector_cost import ConnectorCost, count_connector_cost


def count_model_cost(config: ModelConfig, image_size: int) -> ConnectorCost:
    """Count the cost of a connector in the model that it is for, at an image size in pixels."""
    with torch.device("meta"):
        return count_connector_cost(build_vlm(config.with_random_weights(), image_size).model)
