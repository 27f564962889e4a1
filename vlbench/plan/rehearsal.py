"""What a micro-batch takes beside weights, gradients and moments: the step itself, rehearsed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlbench.model.vlm import VLM
from vlbench.plan.ledger import Ledger
from vlbench.plan.outline import Sample, batch_of

BACKWARD = "backward"
"""What exists only while gradients are computed."""
TOWER = "tower"
"""The phase in which the gradients of the tower are computed; the phase before has no name."""
Peaks = dict[str, dict[str, int]]
"""Bytes by kind, at the peak of each phase."""


class Rehearsal:
    """A model whose forward and backward pass run on shapes alone."""

    def __init__(self, vlm: VLM, precision: str) -> None:
        """Take over a model on `meta`, made ready for its stage; `precision` is the recipe's."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._ledger = Ledger(vlm.language.config.vocab_size)
        self._vlm, self._half = vlm, precision == "bf16"
        with self._acting():
            _move(vlm)
            for parameter in vlm.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)  # those of micro-batches before
        vlm.vision.register_forward_hook(self._await_tower)

    def take(self, row: Sample, way: str) -> Peaks:
        """Return what a micro-batch of one row takes at its peaks, recomputed by `way`."""
        vlm, ledger = self._vlm, self._ledger
        vlm.recompute(way)
        with self._acting():
            batch = batch_of(row, vlm.connector.tokens_per_image, vlm.vision.image_size)
            ledger.kind, ledger.phase = "activations", ""
            ledger.begin(batch.pixels)
            # one micro-batch after the other: autocast keeps its copies until the step is done
            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                out = vlm(batch)
                parts = [out.loss_sum, *(value for value, _ in out.extra.values())]
                ledger.kind = BACKWARD
                torch.stack([part.float() for part in parts if part is not None]).sum().backward()
        return ledger.peaks

    def _await_tower(self, tower: nn.Module, given: object, features: Tensor) -> None:
        """Begin the tower's phase when the gradient of its features is there."""
        if features.requires_grad:
            features.register_hook(lambda gradient: setattr(self._ledger, "phase", TOWER))

    @contextlib.contextmanager
    def _acting(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more a CPU repeats keys for them, as no GPU does
        try:
            with warnings.catch_warnings(), self._fake, self._ledger:
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.set_num_threads(threads)


def _move(model: nn.Module) -> None:
    """Move a model from `meta` to a CPU without values; weights that are shared stay so.

    On `meta` autocast does nothing and attention has other code. A CPU's is always there, and keeps
    what a GPU's keeps.
    """
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, one in held.items():
                if one is None:
                    continue
                if id(one) not in moved:
                    made = torch.empty(one.shape, dtype=one.dtype)
                    trained = one.requires_grad
                    moved[id(one)] = (
                        nn.Parameter(made, trained) if isinstance(one, nn.Parameter) else made
                    )
                held[name] = moved[id(one)]  # type: ignore[assignment]
