"""The legs of a run: each stage with its data, its number of steps and its held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.data.batch import Batch
from vlbench.data.order import Mixture
from vlbench.data.preflight import Found, look_through, none_usable, shows_pictures
from vlbench.data.sample import Source
from vlbench.data.shards import Shards
from vlbench.data.sources import Opened, held_out, mixture, sources, stage_data
from vlbench.data.steps import Steps
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.vlm import VLM
from vlbench.recipe import stages_to_run
from vlbench.schema import PARTS, Recipe, Stage
from vlbench.train.report import say
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
    val: Source | None = None
    """The held-out samples of `data.val`, None if there is none."""

    @property
    def sources(self) -> list[Source]:
        """Everything that is read from files: what is learned from, and held-out samples."""
        return [*self.data.sources, *([self.val] if self.val else [])]


def plan(recipe: Recipe, without_data: bool = False) -> list[Leg]:
    """Return the stages to run, in order, with their data and number of steps.

    All files of data are opened. `without_data` leaves out stages that have no data, which are a
    Mistake otherwise. Raises a Mistake for a stage that trains nothing, too.
    """
    legs = []
    opened: Opened = {}
    for number, name in enumerate(stages_to_run(recipe)):
        stage = recipe.stages[name]
        check_parts(name, stage)
        own = stage_data(recipe.data, stage)
        if without_data and own.train is None and not own.mix:
            continue
        data = mixture(recipe.data, stage, name, recipe.seed, opened)
        val = held_out(recipe.data, stage, recipe.seed, opened) if own.val else None
        legs.append(Leg(number, name, stage, data, steps_in(stage, len(data)), val))
    if not without_data:
        asked(recipe, opened)
    return legs


def check_parts(name: str, stage: Stage) -> None:
    """Refuse a stage of one step or more that trains no part."""
    runs = stage.steps if stage.steps is not None else stage.epochs
    if runs and not stage.parts:
        raise Mistake(
            f"stages.{name}.train names no part, so nothing would be trained: give one of "
            f"{', '.join(PARTS)} a learning rate, as stages.{name}.train.connector.lr=1e-4, or "
            "leave the stage out"
        )


def asked(recipe: Recipe, opened: Opened | None = None) -> list[Source]:
    """Return the sources that the questions at the end come from: those of the last stage.

    They are those of `data.val`, and otherwise what it trains on, also when it is not run.
    """
    name, stage = list(recipe.stages.items())[-1]
    held = held_out(recipe.data, stage, recipe.seed, opened)
    if held is not None:
        return [held]
    return [one for one, _ in sources(recipe.data, stage, name, recipe.seed, opened)]


def steps_in(stage: Stage, samples: int) -> int:
    """Return the optimizer steps of a stage: `steps`, or `epochs` over the samples rounded up."""
    if stage.steps is not None:
        return stage.steps
    return -(-round((stage.epochs or 1) * samples) // stage.batch)


def check_data(recipe: Recipe, legs: list[Leg]) -> list[BadSample]:
    """Look at all records before a model is built; return the bad ones, or refuse them.

    Keys that no reader uses are named. Raises a Mistake, too, for a stage of captions without a
    picture.
    """
    looked: dict[tuple[str, str], Found] = {}
    for leg in legs:
        read = leg.sources if leg.steps else [leg.val] if leg.val else []
        for source in read:
            identity = (source.name, str(getattr(source, "images", "")))
            new = identity not in looked
            found = looked.setdefault(identity, look_through(source) if new else Found([]))
            judge_source(recipe, leg, source, found.bad, found.count)
            if new:
                check_usable(leg, source, found.bad)
                _tell(source, found)
            if source is leg.val and leg.stage.form == "caption":
                _tell_no_captions(leg, leg.val, found.bad)
        if leg.steps:
            check_captions(leg, [bad for found in looked.values() for bad in found.bad])
    bad = [bad for found in looked.values() for bad in found.bad]
    if legs and legs[-1].name == list(recipe.stages)[-1]:
        _tell_unasked(legs[-1], bad)
    return bad


def judge_source(
    recipe: Recipe, leg: Leg, source: Source, bad: list[BadSample], count: int
) -> None:
    """Raise a Mistake when `count` bad samples are too many for a source of a stage; see `judge`.

    `bad` holds the first of them.
    """
    try:
        judge(bad, count, len(source), stage_data(recipe.data, leg.stage).on_bad)
    except Mistake as mistake:
        if source is not leg.val:
            raise
        raise Mistake(f"data.val {source.name}: {mistake}") from mistake


def check_usable(leg: Leg, source: Source, bad: list[BadSample]) -> None:
    """Refuse shards of which no sample could be used, of those that were looked at.

    All samples of shards are too many to be read before training.
    """
    none = none_usable(source, bad) if isinstance(source, Shards) else None
    if none:
        which = "data.val" if source is leg.val else "data"
        others = f" (and {none[0] - 1} more)" if none[0] > 1 else ""
        raise Mistake(
            f"{which} {source.name}: {none[1]}{others}. None of {none[0]} samples that were looked "
            f"at of {len(source)} can be used"
        )


def _tell_unasked(last: Leg, bad: list[BadSample]) -> None:
    """Say it if no question can be asked at the end, which takes a sample with a picture."""
    of = [last.val] if last.val else last.data.sources
    if not any(shows_pictures(source, of_source(source, bad)) for source in of):
        names = ", ".join(source.name for source in of)
        print(f"{names}: no sample has a picture, so no question will be asked at the end")


def _tell_no_captions(leg: Leg, val: Source, bad: list[BadSample]) -> None:
    """Say it if a stage of captions has no picture among its held-out samples."""
    if not shows_pictures(val, bad):
        print(
            f"stage {leg.name}: data.val {val.name} has no picture, and the stage learns captions: "
            "nothing is held out"
        )


def of_source(source: Source, bad: list[BadSample]) -> list[BadSample]:
    """Return the bad samples of one source."""
    return [one for one in bad if one.source == source.name]


def _tell(source: Source, found: Found) -> None:
    """Print what of a source is left out."""
    for note in getattr(source, "notes", ()):
        print(f"{source.name}: {note}")
    if found.bad:
        count = f"{found.count} of {len(source)} samples are bad and left out"
        print(f"{source.name}: {count}, the first: {found.bad[0]}")
    if found.told():
        print(f"{source.name}: keys that are not read: {found.told()}")


def check_captions(leg: Leg, bad: list[BadSample]) -> None:
    """Refuse a stage of captions whose data, the `bad` samples left out, have no picture."""
    if leg.stage.form != "caption":
        return
    for source in leg.data.sources:
        if shows_pictures(source, of_source(source, bad)):
            return
    raise Mistake(
        f"stage {leg.name} learns captions of pictures (form=caption), and the data have no "
        f"picture: {leg.data.name}. Leave the stage out (only=...), or give it data of its own "
        f"with stages.{leg.name}.data"
    )


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
    source = leg.val or held_out(recipe.data, leg.stage, recipe.seed)
    if source is None:
        return []
    data = Mixture([(source, 1.0)], recipe.seed)
    step = _steps(vlm, leg, data, min(HELD_OUT_SAMPLES, len(source)), 1)[0]
    if step.bad:
        say(f"held-out {source.name}: {len(step.bad)} bad samples left out, first {step.bad[0]}")
    return step.batches
