"""What a micro-batch takes beside weights, gradients and moments: the step itself, rehearsed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlbench.model.vlm import VLM
from vlbench.planner.memory_tracker import MemoryTracker
from vlbench.planner.meta_model import ModelDepth, SampleShape, build_row_batch

BACKWARD = "backward"
"""What exists only while gradients are computed."""
ENCODER_BACKWARD = "tower"
"""The phase in which the gradients of the tower are computed; the phase before has no name."""
MIN_DEPTH = 2  # layers and blocks of the shallowest rehearsal, or one round of injected layers
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


class DepthExtrapolator:
    """Rehearsals of one model; where it is deep, of three shallow ones.

    Layers are alike, and every one that is added adds the same to a peak: what it keeps until its
    gradients are computed. So the peaks of each phase are a plane over the two depths, which three
    models span. A connector that is not regular in the depth is rehearsed as it is.
    """

    def __init__(
        self, full_vlm: VLM, build_at_depth: Callable[[ModelDepth | None], VLM], precision: str
    ) -> None:
        """Rehearse `full`; `make` builds the model anew, with another depth."""
        self._full_depth = model_depth(full_vlm)
        self.simulated_depths = simulation_depths(full_vlm)
        models = [build_at_depth(depth) for depth in self.simulated_depths]
        if not _is_linear_in_depth(full_vlm, models, self.simulated_depths):
            self.simulated_depths = [self._full_depth]
            models = [build_at_depth(None)]
        self._simulators = [StepSimulator(model, precision) for model in models]

    def peak_memory(self, row: SampleShape, checkpointing_mode: str) -> dict[str, float]:
        """Return bytes by kind at the peak of a micro-batch of one row, recomputed by `way`."""
        taken = [one.simulate_step(row, checkpointing_mode) for one in self._simulators]
        phases = {phase: self._extrapolate_phase(taken, phase) for phase in taken[0]}
        return max(phases.values(), key=lambda phase: sum(phase.values()))

    def _extrapolate_phase(self, peaks_per_depth: list[PhasePeaks], phase: str) -> dict[str, float]:
        """Return the peak of a phase at the depth of the model."""
        first, *others = (peaks.get(phase, {}) for peaks in peaks_per_depth)
        found = {kind: float(size) for kind, size in first.items()}
        for depth, peak in zip(self.simulated_depths[1:], others, strict=True):
            times = max(
                (full - base) / (more - base)
                for full, base, more in zip(
                    self._full_depth, self.simulated_depths[0], depth, strict=True
                )
                if more != base
            )
            for kind in found.keys() | peak.keys():
                step = peak.get(kind, 0) - first.get(kind, 0)
                found[kind] = found.get(kind, 0.0) + times * step
        return {kind: max(0.0, size) for kind, size in found.items()}


def model_depth(vlm: VLM) -> ModelDepth:
    """Return how deep a model is."""
    return ModelDepth(len(vlm.language.model.layers), vlm.vision.block_index + 1)


def simulation_depths(vlm: VLM) -> list[ModelDepth]:
    """Return the depths at which a model is rehearsed."""
    full, at = model_depth(vlm), vlm.connector.inject_layers
    gap = at[1] - at[0] if len(at) > 1 else (at[0] + 1 if at else 1)
    base = ModelDepth(max(MIN_DEPTH, gap), MIN_DEPTH)
    deeper = [
        ModelDepth(base.decoder_layers + gap, base.encoder_blocks),
        ModelDepth(base.decoder_layers, base.encoder_blocks + 1),
    ]
    if (
        full.decoder_layers <= 2 * deeper[0].decoder_layers
        or full.encoder_blocks <= 2 * deeper[1].encoder_blocks
    ):
        return [full]
    return [base, *deeper]


def _is_linear_in_depth(
    full_vlm: VLM, shallow_vlms: list[VLM], shallow_depths: list[ModelDepth]
) -> bool:
    """Tell whether the connectors of shallow models lead to that of the whole one."""
    if len(shallow_vlms) == 1:
        return True
    sizes = [sum(one.numel() for one in model.connector.parameters()) for model in shallow_vlms]
    steps = (model_depth(full_vlm).decoder_layers - shallow_depths[0].decoder_layers) / (
        shallow_depths[1].decoder_layers - shallow_depths[0].decoder_layers
    )
    expected = sizes[0] + steps * (sizes[1] - sizes[0])
    own = sum(one.numel() for one in full_vlm.connector.parameters())
    return abs(expected - own) <= 0.02 * own and sizes[2] == sizes[0]
