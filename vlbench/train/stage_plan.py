"""The stages of a run, each with its data, its number of steps and its held-out samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from vlbench.config.data_schema import DataConfig
from vlbench.config.key_types import PART_NAMES
from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.chosen_samples import base_source, source_identity
from vlbench.data.data_sources import (
    SourceCache,
    open_held_out,
    open_stage_mixture,
    open_stage_sources,
)
from vlbench.data.packing import PackedBatch
from vlbench.data.preflight import PreflightReport, has_images, inspect_source, probe_shards
from vlbench.data.sample import SampleSource
from vlbench.data.shards import WebDatasetShards
from vlbench.data.shuffle import SourceMixture, SourceTail
from vlbench.distributed import collectives
from vlbench.errors import BadSample, UserError
from vlbench.processor import Processor
from vlbench.train.quarantine import check_bad_samples
from vlbench.train.row_length import DEFAULT_ROW_TOKENS
from vlbench.train.run_report import print_status

EXAM_SAMPLES = 1000  # of data.val that are kept for the questions at the end, if it has as many
HELD_OUT_SAMPLES = 64  # of every held-out loss: enough for a trend, cheap to repeat


@dataclass(kw_only=True)
class StageRun:
    """One stage as it will be run."""

    stage_index: int
    """Its number among the stages that are run, from 0."""
    name: str
    stage: StageConfig
    data_config: DataConfig
    """Where its data come from: the stage's own keys, or those of the recipe."""
    data: SourceMixture
    total_steps: int
    held_out: SampleSource | None = None
    """Samples that training never meets: of `data.val`, or rendered; None if there are none."""
    settled_row_tokens: int = DEFAULT_ROW_TOKENS
    """Tokens of a packed row where the recipe says `auto`."""
    is_recipe_end: bool = False
    """True for the last stage of the recipe, whose data the questions at the end are about."""

    @property
    def row_tokens(self) -> int:
        """Most tokens of a packed row."""
        given = self.stage.max_tokens_per_row
        return self.settled_row_tokens if given == "auto" else given

    @property
    def val_source(self) -> SampleSource | None:
        """The held-out samples that are read from files, those of `data.val`."""
        return self.held_out if self.data_config.val else None

    @property
    def all_sources(self) -> list[SampleSource]:
        """Everything that is read from files: training data, and held-out samples."""
        return [*self.data.sources, *([self.val_source] if self.val_source else [])]


def plan_stage_runs(
    stages: Iterable[StageData], last_data: StageData, skip_without_data: bool = False
) -> list[StageRun]:
    """Return the stages to run, in order, with their data and number of steps.

    All files of data are opened, those of the recipe's last stage too: the questions at the end are
    about `last_data`, also if that stage is not run. `skip_without_data` leaves out stages that
    have no data, which are a UserError otherwise. Raises a UserError for a stage that trains
    nothing, too.
    """
    stage_runs, errors = [], []
    open_sources: SourceCache = {}
    for index, stage_data in enumerate(stages):
        name, stage = stage_data.stage_name, stage_data.stage
        check_trained_parts(name, stage)
        if skip_without_data and not stage_data.config.is_given:
            continue
        try:
            data = open_stage_mixture(stage_data, open_sources)
        except UserError as error:  # told with those of the other stages
            errors += error.lines
            continue
        stage_runs.append(
            StageRun(
                stage_index=index,
                name=name,
                stage=stage,
                data_config=stage_data.config,
                data=data,
                total_steps=count_stage_steps(stage, len(data)),
                held_out=open_held_out(stage_data, open_sources),
                is_recipe_end=name == last_data.stage_name,
            )
        )
    if errors:
        raise UserError(*dict.fromkeys(errors))
    if not skip_without_data and open_held_out(last_data, open_sources) is None:
        open_stage_sources(last_data, open_sources)
    return stage_runs


def check_trained_parts(name: str, stage: StageConfig) -> None:
    """Refuse a stage of one step or more that trains no part."""
    length = stage.steps if stage.steps is not None else stage.epochs
    if length and not stage.trained_parts:
        raise UserError(
            f"stages.{name}.train names no part, so nothing would be trained: give one of "
            f"{', '.join(PART_NAMES)} a learning rate, as "
            f"stages.{name}.train.connector.lr=1e-4, or leave the stage out"
        )


def count_stage_steps(stage: StageConfig, sample_count: int) -> int:
    """Return the optimizer steps of a stage: `steps`, or `epochs` over the samples rounded up.

    A share of an epoch has at least one sample; no epoch and no step is a stage that is not run.
    """
    if stage.steps is not None:
        return stage.steps
    epochs = stage.epochs or 0
    trained = max(round(epochs * sample_count), epochs > 0)
    return -(-trained // stage.global_batch_size)


def check_data(stage_runs: Sequence[StageRun]) -> list[BadSample]:
    """Inspect records before a model is built; return the bad ones, or refuse them.

    Where a source has more than can be inspected in seconds, that is told (`choose_inspected`).
    Keys that no reader uses are named. Raises a UserError, too, for a stage of captions without an
    image.
    """
    reports: dict[tuple[Any, ...], PreflightReport] = {}
    for stage_run in stage_runs:
        val_source = stage_run.val_source
        sources = stage_run.all_sources if stage_run.total_steps else [val_source]
        for source in filter(None, sources):
            identity = source_identity(source)
            is_new = identity not in reports
            if is_new:
                reports[identity] = inspect_source(source)
                _report_inspected(source, reports[identity])
            report = reports[identity]
            check_source_bad_samples(stage_run, source, report)
            if is_new:
                check_usable_shards(stage_run, source, report.bad_samples)
                _report_left_out(source, report)
            if stage_run.stage.sample_format == "caption":
                _report_captions(stage_run, source, report)
        if stage_run.total_steps:
            check_caption_images(stage_run, _all_bad_samples(reports.values()))
    bad_samples = _all_bad_samples(reports.values())
    if stage_runs and stage_runs[-1].is_recipe_end:
        _report_no_questions(stage_runs[-1], bad_samples)
    return bad_samples


def _all_bad_samples(reports: Iterable[PreflightReport]) -> list[BadSample]:
    return [bad for report in reports for bad in report.bad_samples]


def _report_inspected(source: SampleSource, report: PreflightReport) -> None:
    """Print it if some samples are not inspected."""
    if not report.is_complete:
        print(
            f"{source.name}: {report.inspected_samples:,} of {report.sample_count:,} samples were "
            "inspected, from all over; a bad one of the others is left out, or stops training, "
            "when it is met (data.on_bad_sample). The verb check reads all"
        )


def check_source_bad_samples(
    stage_run: StageRun, source: SampleSource, report: PreflightReport
) -> None:
    """Raise a UserError when the bad samples of a source are too many for a stage.

    `check_bad_samples` says how many are too many.
    """
    try:
        check_bad_samples(
            report.bad_samples,
            report.bad_sample_count,
            report.inspected_samples,
            stage_run.data_config.on_bad_sample,
            report.inspected_words,
        )
    except UserError as error:
        if source is not stage_run.val_source:
            raise
        raise UserError(f"data.val {source.name}: {error}") from error


def check_usable_shards(
    stage_run: StageRun, source: SampleSource, bad_samples: list[BadSample]
) -> None:
    """Refuse shards if none of the samples that were looked at can be used.

    Shards hold too many samples to read all of them before training.
    """
    if not isinstance(base_source(source), WebDatasetShards):
        return
    unusable = probe_shards(source, bad_samples)
    if unusable:
        count, first = unusable
        key = "data.val" if source is stage_run.val_source else "data"
        others = f" (and {count - 1} more)" if count > 1 else ""
        raise UserError(
            f"{key} {source.name}: {first}{others}. None of {count} samples that were looked "
            f"at of {len(source)} can be used"
        )


def _report_no_questions(last_stage_run: StageRun, bad_samples: list[BadSample]) -> None:
    """Print it if no question can be asked at the end, which takes a sample with an image."""
    sources = list(last_stage_run.data.sources)
    if last_stage_run.val_source:
        sources = [last_stage_run.val_source]
    if not any(
        has_images(source, bad_samples_of_source(source, bad_samples)) for source in sources
    ):
        names = ", ".join(source.name for source in sources)
        print(f"{names}: no sample has an image, so no question will be asked at the end")


def _report_captions(stage_run: StageRun, source: SampleSource, report: PreflightReport) -> None:
    """Print what a stage of captions leaves out, and it if no held-out sample has an image."""
    told = report.beyond_captions.describe(report.inspected_words)
    if told:
        print(f"stage {stage_run.name}: {source.name}: {told}")
    if source is stage_run.val_source and not has_images(source, report.bad_samples):
        print(
            f"stage {stage_run.name}: data.val {source.name} has no image, and the stage "
            "learns captions: nothing is held out"
        )


def bad_samples_of_source(source: SampleSource, bad_samples: list[BadSample]) -> list[BadSample]:
    """Return the bad samples of one source."""
    return [sample for sample in bad_samples if sample.source_name == source.name]


def _report_left_out(source: SampleSource, report: PreflightReport) -> None:
    """Print what of a source is left out."""
    for note in getattr(base_source(source), "notes", ()):
        print(f"{source.name}: {note}")
    if report.bad_samples:
        count = f"{report.bad_sample_count} of {report.inspected_words} are bad and left out"
        print(f"{source.name}: {count}, the first: {report.bad_samples[0]}")
    if report.describe_unread_keys():
        print(f"{source.name}: keys that are not read: {report.describe_unread_keys()}")


def check_caption_images(stage_run: StageRun, bad_samples: list[BadSample]) -> None:
    """Refuse a stage of captions whose data have no image, bad samples left out."""
    if stage_run.stage.sample_format != "caption":
        return
    for source in stage_run.data.sources:
        if has_images(source, bad_samples_of_source(source, bad_samples)):
            return
    refuse_missing_images(stage_run)


def refuse_missing_images(stage_run: StageRun) -> NoReturn:
    """Raise the UserError for a stage of captions whose data have no image."""
    raise UserError(
        f"stage {stage_run.name} learns captions of images (sample_format=caption), and the "
        f"data have no image: {stage_run.data.name}. Leave the stage out (only=...), or give "
        f"it data of its own with stages.{stage_run.name}.data"
    )


def build_stage_steps(processor: Processor, stage_run: StageRun) -> StepDataset:
    """Return the optimizer steps of a stage for this process, by their number."""
    return replace(
        _build_steps(
            processor,
            stage_run,
            stage_run.data,
            stage_run.stage.global_batch_size,
            stage_run.total_steps,
        ),
        rank=collectives.rank(),
        world_size=collectives.world_size(),
    )


def first_loss_sample(sample_count: int) -> int:
    """Return the number (from 0) of the first sample of `data.val` that held-out losses are of.

    The questions at the end are about the first ones: what a loss chooses, as the best checkpoint
    or a learning rate, is not chosen on the exam. Of few samples it is the second half.
    """
    return min(EXAM_SAMPLES, sample_count // 2)


def held_out_batches(processor: Processor, stage_run: StageRun, seed: int) -> list[PackedBatch]:
    """Return encoded samples that training never meets, [] when the data have none."""
    source = stage_run.held_out
    if source is None:
        return []
    is_rendered = stage_run.val_source is None  # scenes: questions at the end are others anyway
    data = (
        SourceMixture([(source, 1.0)], seed)
        if is_rendered
        else SourceTail(source, first_loss_sample(len(source)), seed)
    )
    step = _build_steps(processor, stage_run, data, min(HELD_OUT_SAMPLES, len(data)), 1)[0]
    if step.bad_samples:
        print_status(
            f"held-out {source.name}: {len(step.bad_samples)} bad samples left out, first "
            f"{step.bad_samples[0]}"
        )
    return step.micro_batches


def _build_steps(
    processor: Processor,
    stage_run: StageRun,
    data: SourceMixture,
    global_batch_size: int,
    total_steps: int,
) -> StepDataset:
    return StepDataset(
        mixture=data,
        encoder=processor.sample_encoder(stage_run.stage.sample_format),
        image_transform=processor.transform,
        global_batch_size=global_batch_size,
        max_tokens_per_row=stage_run.row_tokens,
        total_steps=total_steps,
    )
