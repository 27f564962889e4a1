"""A dry run: one step per stage with its longest batch, so that what fails does so in a minute."""

from __future__ import annotations

import time
from typing import Any

from torch.utils.data import DataLoader

from vlbench.data.steps import Step
from vlbench.evaluate.results import peak_memory
from vlbench.schema import Recipe
from vlbench.train import report
from vlbench.train.legs import Leg, check_data, steps_of
from vlbench.train.module import Training, freeze
from vlbench.train.sizes import check_sizes
from vlbench.train.stages import explained, prepare, trainer_of

LOOKED_AT = 16  # steps of a stage among which the longest is taken


def dry_run(recipe: Recipe, legs: list[Leg]) -> int:
    """Do one optimizer step per stage and keep nothing; return the exit code."""
    check_data(recipe, legs)
    check_sizes(recipe, legs)
    vlm, _ = prepare(recipe, legs, None)
    for leg in legs:
        if not leg.steps:
            continue
        vlm.resize(leg.stage.image_size)
        freeze(vlm, leg.stage)
        steps = steps_of(vlm, leg)
        candidates = [steps[n] for n in range(min(LOOKED_AT, leg.steps))]
        longest = max(candidates, key=_positions)
        began = time.monotonic()
        module = Training(vlm, leg.stage, 1, 0, recipe.seed)
        one_step: Any = [longest]
        with explained(leg):
            trainer_of(recipe, [], None).fit(module, DataLoader(one_step, batch_size=None))
        print(
            f"{leg.name}: {_positions(longest)} tokens in {len(longest.batches)} micro-batches, "
            f"loss {module.report.loss:.3f}, {time.monotonic() - began:.1f} s, "
            f"peak memory {report.size_of(peak_memory())}"
        )
    print("dry run done; nothing was kept")
    return 0


def _positions(step: Step) -> int:
    return sum(sum(lengths) for batch in step.batches for lengths in batch.lengths)
