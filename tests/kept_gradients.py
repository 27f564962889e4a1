"""The gradients of a stage's last step, which training drops at its end."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor


class KeptGradients(pl.Callback):
    """Keeps the gradients of the module's model, by the names of its parameters."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep them: callbacks are called before the module."""
        parameters = pl_module.vlm.named_parameters()  # type: ignore[operator, union-attr]
        self.gradients = {name: p.grad for name, p in parameters if p.grad is not None}
