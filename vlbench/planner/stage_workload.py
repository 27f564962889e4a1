"""The work of a stage: its samples and their lengths, optimizer steps, FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import NamedTuple

from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.data.data_sources import open_stage_mixture
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
    has_data = stage_data.config.train is not None or stage_data.config.mix is not None
    is_read = has_data and not (sample_count and text_tokens)
    data = open_stage_mixture(stage_data) if is_read else None
    if sample_count is None:
        sample_count = len(data) if data is not None else YI_VL_SAMPLE_COUNTS.get(stage_name)
    if sample_count is None and stage.steps is None:
        raise UserError(
            f"samples=NUMBER is needed: the number of samples of stage {stage_name} is not known"
        )
    steps = count_stage_steps(stage, sample_count or 0)
    if data is not None and text_tokens is None:
        sample = _mean_sample(_measure_samples(processor, stage, data), stage_name)
    else:
        sample = assumed_sample(processor, stage, text_tokens)
    return StageSamples(sample, steps, data is None or text_tokens is not None)


def stage_workload(
    stage_name: str, stage: StageConfig, vlm: VLM, samples: StageSamples
) -> StageWorkload:
    """Return the work of a stage; `vlm` is on `meta`, prepared for the stage."""
    return StageWorkload(
        stage_name=stage_name,
        mean_sample=samples.mean_sample,
        sample_count=samples.steps * stage.global_batch_size,
        steps=samples.steps,
        flops_per_sample=sample_flops(count_step_flops(vlm), samples.mean_sample),
        recompute_flops=_recompute_flops(vlm, samples.mean_sample),
    )


def assumed_sample(
    processor: Processor, stage: StageConfig, text_tokens: float | None = None
) -> SampleShape:
    """Return a sample of one image with the assumed number of text tokens, or `text_tokens`."""
    tokens = ASSUMED_TEXT_TOKENS[stage.sample_format] if text_tokens is None else text_tokens
    length = processor.tokens_per_image + tokens
    return SampleShape(
        min(length, processor.max_length), 1, tokens * ASSUMED_SUPERVISED_SHARE[stage.sample_format]
    )


def _measure_samples(
    processor: Processor, stage: StageConfig, mixture_samples: SourceMixture
) -> Iterator[SampleShape]:
    """Yield the sizes of the first samples of a mixture; no image is opened."""
    encoder = processor.sample_encoder(stage.sample_format)
    for position in range(min(MEASURED_SAMPLES, len(mixture_samples))):
        try:
            encoded = encoder.encode(mixture_samples[position])
        except BadSample:
            continue
        yield SampleShape(
            len(encoded.input_ids), len(encoded.sample.images), encoded.supervised_token_count
        )


def _mean_sample(samples: Iterator[SampleShape], stage_name: str) -> SampleShape:
    shapes = list(samples)
    if not shapes:
        raise UserError(
            f"stage {stage_name}: none of the first {MEASURED_SAMPLES} samples can be learned from"
        )
    return SampleShape(*(mean(column) for column in zip(*shapes, strict=True)))


def sample_flops(flops: StepFlops, sample: SampleShape) -> float:
    """Return the FLOPs of a sample, forward and backward."""
    pairs = sample.token_count * (sample.token_count + 1) / 2
    return (
        flops.per_position * sample.token_count
        + flops.per_attended_pair * pairs
        + flops.per_supervised_position * sample.supervised_tokens
        + flops.per_image * sample.image_count
    )


def _recompute_flops(vlm: VLM, sample: SampleShape) -> dict[str, float]:
    """Return the FLOPs that each mode repeats: the forward pass of blocks that have gradients.

    `selective` saves the matrix products of decoder layers; vision encoder and connector are
    recomputed in full or not at all.
    """
    trains_vision = vlm.is_vision_trained()
    with temporarily_frozen(vlm):
        forward = count_step_flops(vlm)
    per_image = forward.per_image - (0 if trains_vision else forward.per_image_encoding)
    vision = per_image * sample.image_count
    decoder = (
        forward.per_position * sample.token_count
        + forward.per_attended_pair * sample.token_count**2 / 2
    )
    return {"none": 0.0, "selective": vision, "full": vision + decoder}
