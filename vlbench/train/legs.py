"""The legs of a run: each stage with its data, its number of steps and its held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.data.batch import Batch
from vlbench.data.order import Mixture
from vlbench.data.preflight import preflight
from vlbench.data.sources import held_out, mixture, stage_data
from vlbench.data.steps import Steps
from vlbench.mistakes import BadSample
from vlbench.model.vlm import VLM
from vlbench.recipe import stages_to_run
from vlbench.schema import Recipe, Stage
from vlbench.train.watchers import judge

HELD_OUT_SAMPLES = 64  # read at every held-out evaluation: enough for a trend, cheap to repeat


@dataclass
class Leg:
    """One stage as it will be run; `number` counts from 0."""

    number: int
    name: str
    stage: Stage
    data: Mixture
    steps: int


def plan(recipe: Recipe) -> list[Leg]:
    """Return the stages to run, in order, with their data and number of steps."""
    legs = []
    for number, name in enumerate(stages_to_run(recipe)):
        stage = recipe.stages[name]
        data = mixture(recipe.data, stage, name, recipe.seed)
        legs.append(Leg(number, name, stage, data, steps_in(stage, len(data))))
    return legs


def steps_in(stage: Stage, samples: int) -> int:
    """Return the optimizer steps of a stage: `steps`, or `epochs` over the samples rounded up."""
    if stage.steps is not None:
        return stage.steps
    return -(-round((stage.epochs or 1) * samples) // stage.batch)


def check_data(recipe: Recipe, legs: list[Leg]) -> list[BadSample]:
    """Look at all records before a model is built; return the bad ones, or refuse them."""
    checked: set[tuple[str, str]] = set()
    found: list[BadSample] = []
    for leg in legs:
        for source in leg.data.sources if leg.steps else []:
            identity = (source.name, str(getattr(source, "images", "")))
            if identity in checked:
                continue
            checked.add(identity)
            for note in getattr(source, "notes", ()):
                print(f"{source.name}: {note}")
            bad = preflight(source)
            judge(bad, len(bad), len(source), stage_data(recipe.data, leg.stage).on_bad)
            if bad:
                print(f"{source.name}: {len(bad)} of {len(source)} samples are bad and left out")
            found += bad
    return found


def steps_of(vlm: VLM, leg: Leg) -> Steps:
    """Return the optimizer steps of a stage: a map from step number to micro-batches."""
    return _steps(vlm, leg, leg.data, leg.stage.batch, leg.steps)


def _steps(vlm: VLM, leg: Leg, data: Mixture, batch: int, total: int) -> Steps:
    return Steps(
        mixture=data,
        template=vlm.template,
        tokenizer=vlm.tokenizer,
        transform=vlm.transform,
        tokens_per_image=vlm.connector.tokens_per_image,
        max_length=vlm.max_length,
        form=leg.stage.form,
        batch=batch,
        row_tokens=leg.stage.row_tokens,
        total=total,
    )


def held_out_batches(recipe: Recipe, vlm: VLM, leg: Leg) -> list[Batch]:
    """Return encoded samples that training never meets, [] when the data have none."""
    source = held_out(recipe.data, leg.stage, recipe.seed)
    if source is None:
        return []
    data = Mixture([(source, 1.0)], recipe.seed)
    return _steps(vlm, leg, data, min(HELD_OUT_SAMPLES, len(source)), 1)[0].batches
