"""The memory of a micro-batch beside weights, gradients and optimizer state, by simulation.

The real forward and backward pass run on fake tensors. Of a deep model shallow copies are
simulated, and the peaks are extrapolated to its depth.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vlbench.compat.fake_tensors import ShapeMode
from vlbench.compat.torch_internals import buffer_slots, parameter_slots
from vlbench.connector.levels import Levels, as_levels
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.mixed_precision import autocast_context
from vlbench.model.vlm import VLM
from vlbench.planner.memory_tracker import MemoryTracker
from vlbench.planner.meta_model import ModelDepth, SampleShape, build_row_batch
from vlbench.train.auto_checkpointing import total_loss

BACKWARD = "backward"
"""Memory that exists only during the backward pass."""
ENCODER_BACKWARD = "vision encoder"
"""The phase in which the gradients of the vision encoder are computed; the one before is ""."""
MIN_DEPTH = 2  # decoder layers and encoder blocks of the shallowest copy, or one injection interval
PhasePeaks = dict[str, dict[str, int]]
"""Bytes by kind, at the peak of each phase."""


class StepSimulator:
    """A model whose forward and backward pass run on shapes alone."""

    def __init__(self, vlm: VLM, precision: str) -> None:
        """Move a `meta` model that is prepared for its stage to fake tensors."""
        self._fake_mode = ShapeMode(allow_non_fake_inputs=True)
        self._memory_tracker = MemoryTracker(vlm.language.config.vocab_size)
        self._vlm, self._autocast_bf16 = vlm, precision == "bf16"
        with self._simulation_context():
            move_to_fake_cpu(vlm)
            for parameter in vlm.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)  # of earlier micro-batches
        vlm.vision.register_forward_hook(self._watch_encoder_gradient)

    def simulate_step(self, row: SampleShape, checkpointing_mode: str) -> PhasePeaks:
        """Return the peaks of a micro-batch of one row."""
        vlm, tracker = self._vlm, self._memory_tracker
        vlm.enable_activation_checkpointing(checkpointing_mode)
        with self._simulation_context():
            batch = build_row_batch(row, vlm.connector, vlm.vision.pixel_shape)
            tracker.kind, tracker.phase = "activations", ""
            tracker.reset_counts(batch.pixels)
            with autocast_context("cpu", self._autocast_bf16):
                loss = total_loss(vlm(batch))
                tracker.kind = BACKWARD
                torch.autograd.backward(loss)
        return tracker.phase_peaks

    def _watch_encoder_gradient(
        self, vision_encoder: nn.Module, inputs: object, features: Levels
    ) -> None:
        """Begin the vision encoder's phase when a gradient of its features is computed."""
        for level in as_levels(features):
            if level.requires_grad:
                level.register_hook(
                    lambda gradient: setattr(self._memory_tracker, "phase", ENCODER_BACKWARD)
                )

    @contextlib.contextmanager
    def _simulation_context(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # with more, CPU attention copies keys per thread, unlike a GPU
        try:
            with warnings.catch_warnings(), self._fake_mode, self._memory_tracker:
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.set_num_threads(threads)


def move_to_fake_cpu(model: nn.Module) -> None:
    """Move a model from `meta` to fake CPU tensors; shared weights stay shared.

    On `meta` autocast does nothing and attention takes another path. The CPU path exists on every
    machine and saves for the backward pass what a GPU's saves.
    """
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (parameter_slots(module), buffer_slots(module)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    moved[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad)
                        if isinstance(tensor, nn.Parameter)
                        else empty
                    )
                tensors[name] = moved[id(tensor)]


class DepthExtrapolator:
    """Peak memory of a model, extrapolated from shallow copies where it is deep.

    Layers are alike, and each adds the same to a peak: what it saves for the backward pass. So the
    peak of a phase is a linear function of the depth of each part, which the shallowest copy and
    one more for each deep part determine. A model whose connector does not grow linearly with
    depth is simulated in full.
    """

    def __init__(
        self,
        full_vlm: VLM,
        build_at_depth: Callable[[ModelDepth | None], LoadedVLM],
        precision: str,
    ) -> None:
        """Build the simulators; `build_at_depth` builds the model with another depth."""
        self._full_depth = model_depth(full_vlm)
        self.simulated_depths = simulation_depths(full_vlm)
        models = [build_at_depth(depth).model for depth in self.simulated_depths]
        if not self._is_linear_in_depth(full_vlm, models):
            self.simulated_depths = [self._full_depth]
            models = [build_at_depth(None).model]
        self._simulators = [StepSimulator(model, precision) for model in models]

    def peak_memory(self, row: SampleShape, checkpointing_mode: str) -> dict[str, float]:
        """Return bytes by kind at the peak of a micro-batch of one row."""
        peaks_per_depth = [
            simulator.simulate_step(row, checkpointing_mode) for simulator in self._simulators
        ]
        phases = {
            phase: self._extrapolate_phase(peaks_per_depth, phase) for phase in peaks_per_depth[0]
        }
        return max(phases.values(), key=lambda phase: sum(phase.values()))

    def _extrapolate_phase(self, peaks_per_depth: list[PhasePeaks], phase: str) -> dict[str, float]:
        """Return the peak of a phase at the full depth."""
        peaks = [peaks.get(phase, {}) for peaks in peaks_per_depth]
        kinds = {kind for peak in peaks for kind in peak}
        return {
            kind: max(0.0, self._extrapolate([peak.get(kind, 0) for peak in peaks]))
            for kind in kinds
        }

    def _extrapolate(self, values: list[int]) -> float:
        """Return at the full depth what has `values` at the simulated ones."""
        base = self.simulated_depths[0]
        extrapolated = float(values[0])
        for depth, value in zip(self.simulated_depths[1:], values[1:], strict=True):
            steps = sum(
                (full - shallow) / (deeper - shallow)
                for full, shallow, deeper in zip(self._full_depth, base, depth, strict=True)
                if deeper != shallow
            )
            extrapolated += steps * (value - values[0])
        return extrapolated

    def _is_linear_in_depth(self, full_vlm: VLM, models: list[VLM]) -> bool:
        """Return whether the connector's size at full depth follows from the shallow copies."""
        full_size = _connector_size(full_vlm)
        expected = self._extrapolate([_connector_size(model) for model in models])
        return abs(expected - full_size) <= 0.02 * full_size


def model_depth(vlm: VLM) -> ModelDepth:
    """Return the depth of a model."""
    blocks = (encoder.used_block_count for encoder in vlm.vision.encoders())
    return ModelDepth(len(vlm.language.model.layers), *blocks)


def simulation_depths(vlm: VLM) -> list[ModelDepth]:
    """Return the depths at which a model is simulated: the shallowest, and one for each deep part.

    A part that is not deep is whole in all of them. Of an encoder there are as many blocks at
    least as the connector reads.
    """
    full = model_depth(vlm)
    shallowest, interval = _injection_interval(vlm)
    read = (len(set(encoder.output_blocks)) for encoder in vlm.vision.encoders())
    least = [max(MIN_DEPTH, count) for count in (shallowest, *read)]
    steps = [interval, 1, 1]
    deep = [part for part, shallow in enumerate(least) if full[part] > 2 * (shallow + steps[part])]
    base = [least[part] if part in deep else blocks for part, blocks in enumerate(full)]
    deeper = (
        [blocks + steps[part] * (part == grown) for part, blocks in enumerate(base)]
        for grown in deep
    )
    return [ModelDepth(*depth) for depth in (base, *deeper)]


def _injection_interval(vlm: VLM) -> tuple[int, int]:
    """Return the decoder layers of the shallowest copy, and how many are added to it.

    Where a connector injects at equal distances to the end, one more injection comes with each
    interval; otherwise, as where it injects in the first layers alone, all are in the copy.
    """
    layers, count = vlm.connector.inject_layers, len(vlm.language.model.layers)
    if not layers:
        return 1, 1
    interval = layers[1] - layers[0] if len(layers) > 1 else layers[0] + 1
    if layers[-1] + interval >= count and set(layers) == set(range(layers[0], count, interval)):
        return interval, interval
    return layers[-1] + 1, 1


def _connector_size(vlm: VLM) -> int:
    return sum(parameter.numel() for parameter in vlm.connector.parameters())
