"""The work of a stage: its samples and their lengths, optimizer steps, FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.data.data_sources import open_stage_mixture
from vlbench.data.image_tiling import count_views
from vlbench.data.reference_image import REFERENCE_NAME, tile_reference
from vlbench.data.sample_encoding import EncodedSample
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError
from vlbench.model.train_flops import StepFlops, count_step_flops, temporarily_frozen
from vlbench.model.vlm import VLM
from vlbench.planner.meta_model import SampleShape
from vlbench.processor import Processor
from vlbench.train.compile_choice import ASSUMED_TEXT_TOKENS
from vlbench.train.stage_plan import count_stage_steps

MEASURED_SAMPLES = 256  # the mean length is taken over as many samples
YI_VL_SAMPLE_COUNTS = {"align_224": 100_000_000, "align_448": 25_000_000, "chat": 1_000_000}
"""Samples of Yi-VL's stages, from its announcement (2024-01-22); the last two are approximate."""
ASSUMED_SUPERVISED_SHARE = {"caption": 1.0, "chat": 0.5}
"""The assumed share of text tokens that is supervised."""


@dataclass(frozen=True)
class StageWorkload:
    """The work of a stage, over all ranks."""

    stage_name: str
    mean_sample: SampleShape
    images_by_views: Counter[int]
    """How many of the images that were looked at, or are assumed, have how many views."""
    sample_count: int
    """Samples seen in training; repeated ones count again."""
    steps: int
    flops_per_sample: float
    """FLOPs of a sample, forward and backward, without recomputation."""
    recompute_flops: dict[str, float]
    """FLOPs of a sample that each checkpointing mode repeats."""

    def total_flops(self, checkpointing_mode: str) -> float:
        """Return the FLOPs of the stage."""
        return self.sample_count * (
            self.flops_per_sample + self.recompute_flops[checkpointing_mode]
        )

    def count_micro_batches(
        self, global_batch_size: int, world_size: int, max_tokens_per_row: int
    ) -> int:
        """Return the micro-batches of a rank in one optimizer step, rows full of mean samples."""
        samples_per_rank = -(-global_batch_size // world_size)
        return -(
            -samples_per_rank // max(1, int(max_tokens_per_row // self.mean_sample.token_count))
        )


class StageSamples(NamedTuple):
    """What a stage is trained on."""

    mean_sample: SampleShape
    steps: int
    are_assumed: bool
    """Whether the lengths are assumed."""
    images_by_views: Counter[int]
    """How many of the images that were looked at have how many views."""


def stage_samples(
    stage_data: StageData,
    processor: Processor,
    sample_count: int | None,
    text_tokens: float | None,
) -> StageSamples:
    """Return the steps of a stage and its mean sample.

    `processor` is that of the stage. `sample_count` and `text_tokens` (per sample) take the place
    of what the data say; None leaves it to the data.
    """
    stage, stage_name = stage_data.stage, stage_data.stage_name
    is_read = stage_data.config.is_given and not (sample_count and text_tokens)
    data = open_stage_mixture(stage_data) if is_read else None
    if sample_count is None:
        sample_count = len(data) if data is not None else YI_VL_SAMPLE_COUNTS.get(stage_name)
    if sample_count is None and stage.steps is None:
        raise UserError(
            f"samples=NUMBER is needed: the number of samples of stage {stage_name} is not known"
        )
    steps = count_stage_steps(stage, sample_count or 0)
    if data is not None and text_tokens is None:
        measured = list(_measure_samples(processor, stage, data))
        sample = _mean_sample(measured, stage_name)
        counts = [count for one in measured for count in map(count_views, one.sample.images)]
    else:
        sample = assumed_sample(processor, stage, text_tokens)
        counts = [round(sample.view_count)]
    return StageSamples(sample, steps, data is None or text_tokens is not None, Counter(counts))


def stage_workload(
    stage_name: str, stage: StageConfig, vlm: VLM, samples: StageSamples
) -> StageWorkload:
    """Return the work of a stage; `vlm` is on `meta`, prepared for the stage."""
    return StageWorkload(
        stage_name=stage_name,
        mean_sample=samples.mean_sample,
        images_by_views=samples.images_by_views,
        sample_count=samples.steps * stage.global_batch_size,
        steps=samples.steps,
        flops_per_sample=sample_flops(
            count_step_flops(vlm, samples.mean_sample.views_per_image), samples.mean_sample
        ),
        recompute_flops=_recompute_flops(vlm, samples.mean_sample),
    )


def assumed_sample(
    processor: Processor, stage: StageConfig, text_tokens: float | None = None
) -> SampleShape:
    """Return a sample of one image with the assumed number of text tokens, or `text_tokens`.

    If images are tiled, it is the one of `data.reference_image`.
    """
    tokens = ASSUMED_TEXT_TOKENS[stage.sample_format] if text_tokens is None else text_tokens
    views, positions = 1, processor.tokens_per_image
    if processor.view_layout is not None:
        tiled = tile_reference(processor.view_layout)
        views, positions = len(tiled.images[0].views), len(tiled.visual_index)
        if positions >= processor.max_length:
            fewer = "vision.tiling.tiles or vision.max_visual_tokens"
            raise UserError(
                f"{REFERENCE_NAME} takes {positions} tokens of the text in {views} views, and "
                f"language.max_length={processor.max_length} leaves no room for them: lower "
                f"{'image_size' if processor.transform.native else fewer}, or give data to plan for"
            )
    return SampleShape(
        min(positions + tokens, processor.max_length),
        1,
        views,
        positions,
        tokens * ASSUMED_SUPERVISED_SHARE[stage.sample_format],
    )


def _measure_samples(
    processor: Processor, stage: StageConfig, mixture_samples: SourceMixture
) -> Iterator[EncodedSample]:
    """Yield the first samples of a mixture; of an image no more than the header is read."""
    encoder = processor.sample_encoder(stage.sample_format)
    for position in range(min(MEASURED_SAMPLES, len(mixture_samples))):
        try:
            yield encoder.encode(mixture_samples[position])
        except BadSample:
            continue


def _mean_sample(samples: list[EncodedSample], stage_name: str) -> SampleShape:
    if not samples:
        raise UserError(
            f"stage {stage_name}: none of the first {MEASURED_SAMPLES} samples can be learned from"
        )
    return SampleShape(
        mean(len(one.input_ids) for one in samples),
        mean(len(one.sample.images) for one in samples),
        mean(one.view_count for one in samples),
        mean(one.image_position_count for one in samples),
        mean(one.supervised_token_count for one in samples),
    )


def sample_flops(flops: StepFlops, sample: SampleShape) -> float:
    """Return the FLOPs of a sample, forward and backward."""
    pairs = sample.token_count * (sample.token_count + 1) / 2
    return (
        flops.per_position * sample.token_count
        + flops.per_attended_pair * pairs
        + flops.per_supervised_position * sample.supervised_tokens
        + flops.per_view * sample.view_count
    )


def _recompute_flops(vlm: VLM, sample: SampleShape) -> dict[str, float]:
    """Return the FLOPs that each mode repeats: the forward pass of blocks that have gradients.

    `selective` saves the matrix products of decoder layers; vision encoder and connector are
    recomputed in full or not at all.
    """
    trains_vision = vlm.is_vision_trained()
    with temporarily_frozen(vlm):
        forward = count_step_flops(vlm, sample.views_per_image)
    per_view = forward.per_view - (0 if trains_vision else forward.per_view_encoding)
    vision = per_view * sample.view_count
    decoder = (
        forward.per_position * sample.token_count
        + forward.per_attended_pair * sample.token_count**2 / 2
    )
    return {"none": 0.0, "selective": vision, "full": vision + decoder}
