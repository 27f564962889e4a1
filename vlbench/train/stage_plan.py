"""The legs of a run: each stage with its data, its number of steps and its held-out samples."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.config.recipe import stages_to_run
from vlbench.config.schema import PART_NAMES, Recipe, StageConfig
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.data_sources import (
    SourceCache,
    open_held_out,
    open_stage_mixture,
    open_stage_sources,
    stage_data,
)
from vlbench.data.packing import PackedBatch
from vlbench.data.preflight import PreflightReport, has_images, inspect_source, no_usable_sample
from vlbench.data.sample_encoding import SampleSource
from vlbench.data.shards import WebDatasetShards
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.callbacks import check_bad_samples
from vlbench.train.run_report import print_status

HELD_OUT_SAMPLES = 64  # read at every held-out evaluation: enough for a trend, cheap to repeat


@dataclass
class StageRun:
    """One stage as it will be run; `number` counts from 0."""

    stage_index: int
    name: str
    stage: StageConfig
    data: SourceMixture
    total_steps: int
    val_source: SampleSource | None = None
    """The held-out samples of `data.val`, None if there is none."""

    @property
    def all_sources(self) -> list[SampleSource]:
        """Everything that is read from files: what is learned from, and held-out samples."""
        return [*self.data.sources, *([self.val_source] if self.val_source else [])]


def plan_stage_runs(recipe: Recipe, skip_without_data: bool = False) -> list[StageRun]:
    """Return the stages to run, in order, with their data and number of steps.

    All files of data are opened. `without_data` leaves out stages that have no data, which are a
    Mistake otherwise. Raises a Mistake for a stage that trains nothing, too.
    """
    legs = []
    opened: SourceCache = {}
    for number, name in enumerate(stages_to_run(recipe)):
        stage = recipe.stages[name]
        check_trained_parts(name, stage)
        own = stage_data(recipe.data, stage)
        if skip_without_data and own.train is None and not own.mix:
            continue
        data = open_stage_mixture(recipe.data, stage, name, recipe.seed, opened)
        val = open_held_out(recipe.data, stage, recipe.seed, opened) if own.val else None
        legs.append(StageRun(number, name, stage, data, count_stage_steps(stage, len(data)), val))
    if not skip_without_data:
        question_sources(recipe, opened)
    return legs


def check_trained_parts(name: str, stage: StageConfig) -> None:
    """Refuse a stage of one step or more that trains no part."""
    runs = stage.steps if stage.steps is not None else stage.epochs
    if runs and not stage.trained_parts:
        raise UserError(
            f"stages.{name}.train names no part, so nothing would be trained: give one of "
            f"{', '.join(PART_NAMES)} a learning rate, as "
            f"stages.{name}.train.connector.lr=1e-4, or "
            "leave the stage out"
        )


def question_sources(recipe: Recipe, open_sources: SourceCache | None = None) -> list[SampleSource]:
    """Return the sources that the questions at the end come from: those of the last stage.

    They are those of `data.val`, and otherwise what it trains on, also when it is not run.
    """
    name, stage = list(recipe.stages.items())[-1]
    held = open_held_out(recipe.data, stage, recipe.seed, open_sources)
    if held is not None:
        return [held]
    return [
        one for one, _ in open_stage_sources(recipe.data, stage, name, recipe.seed, open_sources)
    ]


def count_stage_steps(stage: StageConfig, sample_count: int) -> int:
    """Return the optimizer steps of a stage: `steps`, or `epochs` over the samples rounded up."""
    if stage.steps is not None:
        return stage.steps
    return -(-round((stage.epochs or 1) * sample_count) // stage.global_batch_size)


def check_data(recipe: Recipe, stage_runs: list[StageRun]) -> list[BadSample]:
    """Look at all records before a model is built; return the bad ones, or refuse them.

    Keys that no reader uses are named. Raises a Mistake, too, for a stage of captions without a
    picture.
    """
    looked: dict[tuple[str, str], PreflightReport] = {}
    for leg in stage_runs:
        read = leg.all_sources if leg.total_steps else [leg.val_source] if leg.val_source else []
        for source in read:
            identity = (source.name, str(getattr(source, "image_folder", "")))
            new = identity not in looked
            found = looked.setdefault(
                identity, inspect_source(source) if new else PreflightReport([])
            )
            check_source_bad_samples(recipe, leg, source, found.bad_samples, found.bad_sample_count)
            if new:
                check_usable_shards(leg, source, found.bad_samples)
                _report_left_out(source, found)
            if source is leg.val_source and leg.stage.sample_format == "caption":
                _report_no_captions(leg, leg.val_source, found.bad_samples)
        if leg.total_steps:
            check_caption_images(
                leg, [bad for found in looked.values() for bad in found.bad_samples]
            )
    bad = [bad for found in looked.values() for bad in found.bad_samples]
    if stage_runs and stage_runs[-1].name == list(recipe.stages)[-1]:
        _report_no_questions(stage_runs[-1], bad)
    return bad


def check_source_bad_samples(
    recipe: Recipe,
    stage_run: StageRun,
    source: SampleSource,
    bad_samples: list[BadSample],
    bad_count: int,
) -> None:
    """Raise a Mistake when `count` bad samples are too many for a source of a stage; see `judge`.

    `bad` holds the first of them.
    """
    try:
        check_bad_samples(
            bad_samples,
            bad_count,
            len(source),
            stage_data(recipe.data, stage_run.stage).on_bad_sample,
        )
    except UserError as mistake:
        if source is not stage_run.val_source:
            raise
        raise UserError(f"data.val {source.name}: {mistake}") from mistake


def check_usable_shards(
    stage_run: StageRun, source: SampleSource, bad_samples: list[BadSample]
) -> None:
    """Refuse shards of which no sample could be used, of those that were looked at.

    All samples of shards are too many to be read before training.
    """
    none = no_usable_sample(source, bad_samples) if isinstance(source, WebDatasetShards) else None
    if none:
        which = "data.val" if source is stage_run.val_source else "data"
        others = f" (and {none[0] - 1} more)" if none[0] > 1 else ""
        raise UserError(
            f"{which} {source.name}: {none[1]}{others}. None of {none[0]} samples that were looked "
            f"at of {len(source)} can be used"
        )


def _report_no_questions(last_stage_run: StageRun, bad_samples: list[BadSample]) -> None:
    """Say it if no question can be asked at the end, which takes a sample with a picture."""
    of = [last_stage_run.val_source] if last_stage_run.val_source else last_stage_run.data.sources
    if not any(has_images(source, bad_samples_of_source(source, bad_samples)) for source in of):
        names = ", ".join(source.name for source in of)
        print(f"{names}: no sample has a picture, so no question will be asked at the end")


def _report_no_captions(
    stage_run: StageRun, val_source: SampleSource, bad_samples: list[BadSample]
) -> None:
    """Say it if a stage of captions has no picture among its held-out samples."""
    if not has_images(val_source, bad_samples):
        print(
            f"stage {stage_run.name}: data.val {val_source.name} has no picture, and the stage "
            "learns captions: "
            "nothing is held out"
        )


def bad_samples_of_source(source: SampleSource, bad_samples: list[BadSample]) -> list[BadSample]:
    """Return the bad samples of one source."""
    return [one for one in bad_samples if one.source_name == source.name]


def _report_left_out(source: SampleSource, found: PreflightReport) -> None:
    """Print what of a source is left out."""
    for note in getattr(source, "notes", ()):
        print(f"{source.name}: {note}")
    if found.bad_samples:
        count = f"{found.bad_sample_count} of {len(source)} samples are bad and left out"
        print(f"{source.name}: {count}, the first: {found.bad_samples[0]}")
    if found.describe_unread_keys():
        print(f"{source.name}: keys that are not read: {found.describe_unread_keys()}")


def check_caption_images(stage_run: StageRun, bad_samples: list[BadSample]) -> None:
    """Refuse a stage of captions whose data, the `bad` samples left out, have no picture."""
    if stage_run.stage.sample_format != "caption":
        return
    for source in stage_run.data.sources:
        if has_images(source, bad_samples_of_source(source, bad_samples)):
            return
    raise UserError(
        f"stage {stage_run.name} learns captions of pictures (sample_format=caption), and the "
        "data have no "
        f"picture: {stage_run.data.name}. Leave the stage out (only=...), or give it data of "
        "its own "
        f"with stages.{stage_run.name}.data"
    )


def build_stage_steps(vlm: LoadedVLM, stage_run: StageRun) -> StepDataset:
    """Return the optimizer steps of a stage: a map from step number to micro-batches."""
    return _build_steps(
        vlm, stage_run, stage_run.data, stage_run.stage.global_batch_size, stage_run.total_steps
    )


def _build_steps(
    vlm: LoadedVLM,
    stage_run: StageRun,
    data: SourceMixture,
    global_batch_size: int,
    total_steps: int,
) -> StepDataset:
    return StepDataset(
        mixture=data,
        chat_template=vlm.processor.template,
        tokenizer=vlm.tokenizer,
        image_transform=vlm.processor.transform,
        tokens_per_image=vlm.processor.tokens_per_image,
        max_length=vlm.processor.max_length,
        sample_format=stage_run.stage.sample_format,
        global_batch_size=global_batch_size,
        max_tokens_per_row=stage_run.stage.max_tokens_per_row,
        total_steps=total_steps,
    )


def held_out_batches(recipe: Recipe, vlm: LoadedVLM, stage_run: StageRun) -> list[PackedBatch]:
    """Return encoded samples that training never meets, [] when the data have none."""
    source = stage_run.val_source or open_held_out(recipe.data, stage_run.stage, recipe.seed)
    if source is None:
        return []
    data = SourceMixture([(source, 1.0)], recipe.seed)
    step = _build_steps(vlm, stage_run, data, min(HELD_OUT_SAMPLES, len(source)), 1)[0]
    if step.bad_samples:
        print_status(
            f"held-out {source.name}: {len(step.bad_samples)} bad samples left out, first "
            f"{step.bad_samples[0]}"
        )
    return step.micro_batches
