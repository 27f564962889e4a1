"""Rehearsals of deep models: a few layers are enough to know what any number of them takes."""

from __future__ import annotations

from collections.abc import Callable

from vlbench.model.vlm import VLM
from vlbench.plan.outline import Depth, Sample
from vlbench.plan.rehearsal import Peaks, Rehearsal

SHALLOW = 2  # layers and blocks of the shallowest rehearsal, or one round of injected layers


class Rehearsals:
    """Rehearsals of one model; where it is deep, of three shallow ones.

    Layers are alike, and every one that is added adds the same to a peak: what it keeps until its
    gradients are computed. So the peaks of each phase are a plane over the two depths, which three
    models span. A connector that is not regular in the depth is rehearsed as it is.
    """

    def __init__(self, full: VLM, make: Callable[[Depth | None], VLM], precision: str) -> None:
        """Rehearse `full`; `make` builds the model anew, with another depth."""
        self._depth = depth_of(full)
        self.depths = depths(full)
        models = [make(depth) for depth in self.depths]
        if not _regular(full, models, self.depths):
            self.depths = [self._depth]
            models = [make(None)]
        self._rehearsals = [Rehearsal(model, precision) for model in models]

    def take(self, row: Sample, way: str) -> dict[str, float]:
        """Return bytes by kind at the peak of a micro-batch of one row, recomputed by `way`."""
        taken = [one.take(row, way) for one in self._rehearsals]
        phases = {phase: self._at_depth(taken, phase) for phase in taken[0]}
        return max(phases.values(), key=lambda phase: sum(phase.values()))

    def _at_depth(self, taken: list[Peaks], phase: str) -> dict[str, float]:
        """Return the peak of a phase at the depth of the model."""
        first, *others = (peaks.get(phase, {}) for peaks in taken)
        found = {kind: float(size) for kind, size in first.items()}
        for depth, peak in zip(self.depths[1:], others, strict=True):
            times = max(
                (full - base) / (more - base)
                for full, base, more in zip(self._depth, self.depths[0], depth, strict=True)
                if more != base
            )
            for kind in found.keys() | peak.keys():
                step = peak.get(kind, 0) - first.get(kind, 0)
                found[kind] = found.get(kind, 0.0) + times * step
        return {kind: max(0.0, size) for kind, size in found.items()}


def depth_of(vlm: VLM) -> Depth:
    """Return how deep a model is."""
    return Depth(len(vlm.language.model.layers), vlm.vision.index + 1)


def depths(vlm: VLM) -> list[Depth]:
    """Return the depths at which a model is rehearsed."""
    full, at = depth_of(vlm), vlm.connector.inject_at
    gap = at[1] - at[0] if len(at) > 1 else (at[0] + 1 if at else 1)
    base = Depth(max(SHALLOW, gap), SHALLOW)
    deeper = [Depth(base.decoder + gap, base.tower), Depth(base.decoder, base.tower + 1)]
    if full.decoder <= 2 * deeper[0].decoder or full.tower <= 2 * deeper[1].tower:
        return [full]
    return [base, *deeper]


def _regular(full: VLM, models: list[VLM], chosen: list[Depth]) -> bool:
    """Tell whether the connectors of shallow models lead to that of the whole one."""
    if len(models) == 1:
        return True
    sizes = [sum(one.numel() for one in model.connector.parameters()) for model in models]
    steps = (depth_of(full).decoder - chosen[0].decoder) / (chosen[1].decoder - chosen[0].decoder)
    expected = sizes[0] + steps * (sizes[1] - sizes[0])
    own = sum(one.numel() for one in full.connector.parameters())
    return abs(expected - own) <= 0.02 * own and sizes[2] == sizes[0]
