"""The memory of a micro-batch beside weights, gradients and optimizer state, by simulation.

The real forward and backward pass run on fake tensors. Of a deep model three shallow copies are
simulated, and the peaks are extrapolated to its depth.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from vlbench.compat.fake_tensors import FakeTensorMode
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
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
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
    """Peak memory of a model, extrapolated from three shallow copies where it is deep.

    Layers are alike, and each adds the same to a peak: what it saves for the backward pass. So the
    peak of a phase is a linear function of the two depths, which three models determine. A model
    whose connector does not grow linearly with depth is simulated in full.
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
        if not _is_linear_in_depth(full_vlm, models, self.simulated_depths):
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
        base_peak, *deeper_peaks = (peaks.get(phase, {}) for peaks in peaks_per_depth)
        extrapolated = {kind: float(size) for kind, size in base_peak.items()}
        for depth, peak in zip(self.simulated_depths[1:], deeper_peaks, strict=True):
            factor = max(
                (full - base) / (deeper - base)
                for full, base, deeper in zip(
                    self._full_depth, self.simulated_depths[0], depth, strict=True
                )
                if deeper != base
            )
            for kind in extrapolated.keys() | peak.keys():
                growth = peak.get(kind, 0) - base_peak.get(kind, 0)
                extrapolated[kind] = extrapolated.get(kind, 0.0) + factor * growth
        return {kind: max(0.0, size) for kind, size in extrapolated.items()}


def model_depth(vlm: VLM) -> ModelDepth:
    """Return the depth of a model."""
    return ModelDepth(len(vlm.language.model.layers), vlm.vision.used_block_count)


def simulation_depths(vlm: VLM) -> list[ModelDepth]:
    """Return the depths at which a model is simulated: its own alone, or three shallow ones.

    The encoder is whole where the connector names blocks, which a shallow one would not have: then
    there are two.
    """
    full = model_depth(vlm)
    shallowest, interval = _injection_interval(vlm)
    base = ModelDepth(max(MIN_DEPTH, shallowest), MIN_DEPTH)
    if vlm.connector.vision_layers:
        whole = len(vlm.vision.blocks())
        deep = base.decoder_layers + interval
        if full.decoder_layers <= 2 * deep:
            return [ModelDepth(full.decoder_layers, whole)]
        return [ModelDepth(base.decoder_layers, whole), ModelDepth(deep, whole)]
    deeper = [
        ModelDepth(base.decoder_layers + interval, base.encoder_blocks),
        ModelDepth(base.decoder_layers, base.encoder_blocks + 1),
    ]
    if (
        full.decoder_layers <= 2 * deeper[0].decoder_layers
        or full.encoder_blocks <= 2 * deeper[1].encoder_blocks
    ):
        return [full]
    return [base, *deeper]


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


def _is_linear_in_depth(
    full_vlm: VLM, shallow_vlms: list[VLM], shallow_depths: list[ModelDepth]
) -> bool:
    """Return whether the connector's size at full depth follows from the shallow copies."""
    if len(shallow_vlms) == 1:
        return True
    sizes = [_connector_size(model) for model in shallow_vlms]
    steps = (model_depth(full_vlm).decoder_layers - shallow_depths[0].decoder_layers) / (
        shallow_depths[1].decoder_layers - shallow_depths[0].decoder_layers
    )
    expected = sizes[0] + steps * (sizes[1] - sizes[0])
    full_size = _connector_size(full_vlm)
    return abs(expected - full_size) <= 0.02 * full_size and {*sizes[2:]} <= {sizes[0]}


def _connector_size(vlm: VLM) -> int:
    return sum(parameter.numel() for parameter in vlm.connector.parameters())
