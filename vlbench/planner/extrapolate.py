"""Rehearsals of deep models: a few layers are enough to know what any number of them takes."""

from __future__ import annotations

from collections.abc import Callable

from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.planner.meta_model import ModelDepth, SampleShape
from vlbench.planner.simulate_step import PhasePeaks, StepSimulator

MIN_DEPTH = 2  # layers and blocks of the shallowest rehearsal, or one round of injected layers


class DepthExtrapolator:
    """Rehearsals of one model; where it is deep, of three shallow ones.

    Layers are alike, and every one that is added adds the same to a peak: what it keeps until its
    gradients are computed. So the peaks of each phase are a plane over the two depths, which three
    models span. A connector that is not regular in the depth is rehearsed as it is.
    """

    def __init__(
        self,
        full_vlm: VLM,
        build_at_depth: Callable[[ModelDepth | None], LoadedVLM],
        precision: str,
    ) -> None:
        """Rehearse `full`; `make` builds the model anew, with another depth."""
        self._full_depth = model_depth(full_vlm)
        self.simulated_depths = simulation_depths(full_vlm)
        models = [build_at_depth(depth).model for depth in self.simulated_depths]
        if not _is_linear_in_depth(full_vlm, models, self.simulated_depths):
            self.simulated_depths = [self._full_depth]
            models = [build_at_depth(None).model]
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
