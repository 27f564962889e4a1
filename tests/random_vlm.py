"""The small random model of `vlbench.contract_checks`, with the golden tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlbench.connector.base import Connector
from vlbench.contract_checks.small_model import (
    SMALL_OPTIONS,
    NoiseImage,
    build_small_vlm,
    make_batch,
    make_sample,
    open_gates,
)
from vlbench.model.loaded_vlm import LoadedVLM

__all__ = ["SMALL", "NoiseImage", "make_batch", "make_sample", "open_gates", "small_vlm"]

CHECKPOINT = Path(__file__).parent / "goldens" / "yi_vl" / "checkpoint"
SMALL = SMALL_OPTIONS


def small_vlm(connector: type[Connector], options: dict[str, Any] | None = None) -> LoadedVLM:
    """Build the model with `connector`, always the same."""
    return build_small_vlm(connector, options, CHECKPOINT)
