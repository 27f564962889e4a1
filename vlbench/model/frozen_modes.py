"""The mode of parts that are not trained: nothing of them is random, and no buffer changes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from vlbench.model.vision_encoder import has_trained_parameters


def set_frozen_modes(parts: Iterable[nn.Module], language: nn.Module) -> None:
    """Set evaluation mode for what has no trained parameters; what has some is left as it is.

    Args:
        parts: Vision encoders and connector, which may have dropout and buffers of any kind. No
            checkpoint of a stage that freezes them would have changed buffers.
        language: The language model. Frozen, it stays in training mode, as checkpointing would
            silently be off in the other; but the adapters of an earlier stage drop nothing.
    """
    for part in parts:
        if not has_trained_parameters(part):
            part.eval()
    if not has_trained_parameters(language):
        for module in language.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
