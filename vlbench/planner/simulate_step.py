"""What a micro-batch takes beside weights, gradients and moments: the step itself, rehearsed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vlbench.compat.fake_tensors import FakeTensorMode
from vlbench.compat.torch_internals import buffer_slots, parameter_slots
from vlbench.model.vlm import VLM
from vlbench.planner.memory_tracker import MemoryTracker
from vlbench.planner.meta_model import SampleShape, build_row_batch

BACKWARD = "backward"
"""What exists only while gradients are computed."""
ENCODER_BACKWARD = "tower"
"""The phase in which the gradients of the tower are computed; the phase before has no name."""
PhasePeaks = dict[str, dict[str, int]]
"""Bytes by kind, at the peak of each phase."""


class StepSimulator:
    """A model whose forward and backward pass run on shapes alone."""

    def __init__(self, vlm: VLM, precision: str) -> None:
        """Take over a model on `meta`, made ready for its stage; `precision` is the recipe's."""
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._memory_tracker = MemoryTracker(vlm.language.config.vocab_size)
        self._vlm, self._autocast_bf16 = vlm, precision == "bf16"
        with self._simulation_context():
            _move_to_fake_cpu(vlm)
            for parameter in vlm.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)  # those of micro-batches before
        vlm.vision.register_forward_hook(self._watch_encoder_gradient)

    def simulate_step(self, row: SampleShape, checkpointing_mode: str) -> PhasePeaks:
        """Return what a micro-batch of one row takes at its peaks, recomputed by `way`."""
        vlm, ledger = self._vlm, self._memory_tracker
        vlm.enable_activation_checkpointing(checkpointing_mode)
        with self._simulation_context():
            batch = build_row_batch(row, vlm.connector.tokens_per_image, vlm.vision.image_size)
            ledger.kind, ledger.phase = "activations", ""
            ledger.reset_counts(batch.pixels)
            # one micro-batch after the other: autocast keeps its copies until the step is done
            with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast_bf16):
                out = vlm(batch)
                parts = [out.loss_sum, *(value for value, _ in out.extra.values())]
                ledger.kind = BACKWARD
                torch.stack([part.float() for part in parts if part is not None]).sum().backward()
        return ledger.phase_peaks

    def _watch_encoder_gradient(
        self, vision_encoder: nn.Module, inputs: object, features: Tensor
    ) -> None:
        """Begin the tower's phase when the gradient of its features is there."""
        if features.requires_grad:
            features.register_hook(
                lambda gradient: setattr(self._memory_tracker, "phase", ENCODER_BACKWARD)
            )

    @contextlib.contextmanager
    def _simulation_context(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more a CPU repeats keys for them, as no GPU does
        try:
            with warnings.catch_warnings(), self._fake_mode, self._memory_tracker:
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.set_num_threads(threads)


def _move_to_fake_cpu(model: nn.Module) -> None:
    """Move a model from `meta` to a CPU without values; weights that are shared stay so.

    On `meta` autocast does nothing and attention has other code. A CPU's is always there, and keeps
    what a GPU's keeps.
    """
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (parameter_slots(module), buffer_slots(module)):
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
