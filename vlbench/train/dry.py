"""A dry run: a few steps per stage, the longest first, so that what fails does so in a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch.utils.data import DataLoader

from vlbench import ranks
from vlbench.data.steps import Step
from vlbench.mistakes import Mistake
from vlbench.model.compiled import Compiled
from vlbench.schema import Recipe
from vlbench.train import report
from vlbench.train.checkpointing import settle
from vlbench.train.join import sharded
from vlbench.train.legs import Leg, check_data, steps_of
from vlbench.train.module import Training, Watcher, freeze
from vlbench.train.sizes import check_sizes
from vlbench.train.speed import peak_memory
from vlbench.train.stages import hold, prepare
from vlbench.train.trainer import explained, root_device, trainer_of

LOOKED_AT = 16  # steps of a stage among which the longest is taken
TIMED = 2  # steps after the longest, which comes first and is slower than those to come


class Measured(NamedTuple):
    """What a stage takes; numbers are of this machine."""

    stage: str
    steps: int
    """Optimizer steps of the stage."""
    tokens: int
    """Positions of its longest step."""
    batches: int
    """Micro-batches of that step."""
    loss: float
    """Loss of the last step that was tried."""
    step_seconds: float
    """Of a typical optimizer step."""
    memory: int
    """Peak in bytes, up to and with this stage."""


def dry_run(recipe: Recipe, legs: list[Leg]) -> int:
    """Do a few optimizer steps per stage and keep nothing; return the exit code."""
    seconds = 0.0
    for one in measure(recipe, legs):
        print(
            f"{one.stage}: {one.tokens} tokens in {one.batches} micro-batches, "
            f"loss {one.loss:.3f}, {one.step_seconds:.2g} s a step, "
            f"peak memory {report.size_of(one.memory)}"
        )
        seconds += one.step_seconds * one.steps
    print(f"dry run done, nothing was kept; training will take about {report.duration(seconds)}")
    return 0


def measure(recipe: Recipe, legs: list[Leg]) -> Iterator[Measured]:
    """Try every stage: its longest step, then two as they come."""
    check_data(recipe, legs)
    check_sizes(recipe, legs)
    vlm, _ = prepare(recipe, legs, None)
    report.show_weights(vlm.origins, recipe.seed)
    for leg in legs:
        if not leg.steps:
            continue
        vlm.resize(leg.stage.image_size)
        freeze(vlm, leg.stage)
        held = hold(recipe, vlm)
        steps = replace(steps_of(vlm, leg), rank=ranks.rank(), world=ranks.size())
        settle(recipe, vlm, steps, root_device(recipe))
        candidates = [steps[n] for n in range(min(LOOKED_AT, leg.steps))]
        longest = max(candidates, key=_positions)
        if not ranks.table([_positions(longest)]).sum():
            bad = [str(one) for step in candidates for one in step.bad[:1]]
            raise Mistake(
                f"stage {leg.name}: its first {len(candidates)} steps have nothing to learn from: "
                f"{bad[0] if bad else 'no sample has a picture, and the stage learns captions'}"
            )
        tried = [longest, *candidates[:TIMED]]
        clock = _Clock()
        module = Training(vlm, leg.stage, len(tried), 0, recipe.seed, [clock])
        with Compiled(vlm, recipe.trainer.compile), explained(leg):
            loader: DataLoader = DataLoader(tried, batch_size=None)  # type: ignore[arg-type]
            trainer_of(recipe, [], None).fit(module, loader)
        held.release()
        if sharded(recipe):
            vlm, _ = prepare(recipe, legs, None)  # whole again
        yield Measured(
            leg.name,
            leg.steps,
            _positions(longest),
            len(longest.batches),
            module.report.loss,
            (clock.times[-1] - clock.times[0]) / (len(tried) - 1),
            peak_memory(),
        )


class _Clock(Watcher):
    """Note when every step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after(self, training: Training, step: Step) -> None:
        """Note the time."""
        self.times.append(time.monotonic())


def _positions(step: Step) -> int:
    return sum(sum(lengths) for batch in step.batches for lengths in batch.lengths)
