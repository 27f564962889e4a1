"""What a stage has to do: its samples and their lengths, steps, operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from vlbench.config.schema import Recipe, StageConfig
from vlbench.data.data_sources import open_stage_mixture, stage_data
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError
from vlbench.model.train_flops import StepFlops, count_step_flops, temporarily_frozen
from vlbench.model.vlm import VLM
from vlbench.planner.meta_model import SampleShape
from vlbench.train.stage_plan import count_stage_steps

MEASURED_SAMPLES = 256  # samples whose mean length stands for all
YI_VL_SAMPLE_COUNTS = {"align_224": 100_000_000, "align_448": 25_000_000, "chat": 1_000_000}
"""Of Yi-VL's stages, from its announcement (2024-01-22): the last two are about so many."""
ASSUMED_TEXT_TOKENS = {"caption": 40, "chat": 250}
"""Tokens beside the places where no data say it: assumed, the system prompt of 100 included."""
ASSUMED_SUPERVISED_SHARE = {"caption": 1.0, "chat": 0.5}
"""The share of them that is learned, assumed."""


@dataclass(frozen=True)
class StageWorkload:
    """What a stage has to do, over all ranks."""

    stage_name: str
    mean_sample: SampleShape
    sample_count: int
    """That are learned from, repeated ones counted again."""
    steps: int
    flops_per_sample: float
    """Operations of a sample, without recomputation."""
    recompute_flops: dict[str, float]
    """Operations of a sample that a way of recomputing repeats."""

    def total_flops(self, checkpointing_mode: str) -> float:
        """Return the operations of the stage."""
        return self.sample_count * (
            self.flops_per_sample + self.recompute_flops[checkpointing_mode]
        )

    def count_micro_batches(
        self, global_batch_size: int, world_size: int, max_tokens_per_row: int
    ) -> int:
        """Return the micro-batches of a rank in a step of `batch` samples over `world` ranks."""
        own = -(-global_batch_size // world_size)
        return -(-own // max(1, int(max_tokens_per_row // self.mean_sample.token_count)))


def stage_workload(
    recipe: Recipe, stage_name: str, vlm: VLM, sample_count: int | None, text_tokens: float | None
) -> tuple[StageWorkload, bool]:
    """Return the work of a stage, and whether its lengths are assumed.

    `vlm` is ready for the stage, on `meta`. `pairs` and `text`, where they are given, stand for the
    number of samples and the tokens of text beside the pictures.
    """
    stage = recipe.stages[stage_name]
    found = stage_data(recipe.data, stage)
    there = found.train is not None or found.mix is not None
    data = (
        open_stage_mixture(recipe.data, stage, stage_name, recipe.seed)
        if there and not (sample_count and text_tokens)
        else None
    )
    if sample_count is None:
        sample_count = len(data) if data is not None else YI_VL_SAMPLE_COUNTS.get(stage_name)
    if sample_count is None and stage.steps is None:
        raise UserError(f"samples=NUMBER is needed: nobody says how many stage {stage_name} has")
    steps = count_stage_steps(stage, sample_count or 0)
    if data is not None and text_tokens is None:
        sample = _mean_sample(_measure_samples(vlm, stage, data), stage_name)
    else:
        sample = assumed_sample(vlm, stage, text_tokens)
    flops = count_step_flops(vlm)
    work = StageWorkload(
        stage_name=stage_name,
        mean_sample=sample,
        sample_count=steps * stage.global_batch_size,
        steps=steps,
        flops_per_sample=sample_flops(flops, sample),
        recompute_flops=_recompute_flops(vlm, sample),
    )
    return work, data is None or text_tokens is not None


def assumed_sample(vlm: VLM, stage: StageConfig, text_tokens: float | None = None) -> SampleShape:
    """Return a sample of one picture with as much text as is assumed, or `text` tokens."""
    tokens = ASSUMED_TEXT_TOKENS[stage.sample_format] if text_tokens is None else text_tokens
    length = vlm.connector.tokens_per_image + tokens
    return SampleShape(
        min(length, vlm.max_length), 1, tokens * ASSUMED_SUPERVISED_SHARE[stage.sample_format]
    )


def _measure_samples(
    vlm: VLM, stage: StageConfig, mixture_samples: SourceMixture
) -> Iterator[SampleShape]:
    """Give the shapes of the first samples of a stream; no picture is opened."""
    encoder = SampleEncoder(
        vlm.tokenizer,
        vlm.template,
        vlm.connector.tokens_per_image,
        vlm.max_length,
        stage.sample_format,
    )
    for position in range(min(MEASURED_SAMPLES, len(mixture_samples))):
        try:
            encoded = encoder.encode(mixture_samples[position])
        except BadSample:
            continue
        yield SampleShape(
            len(encoded.input_ids), len(encoded.sample.images), encoded.supervised_token_count
        )


def _mean_sample(samples: Iterator[SampleShape], stage_name: str) -> SampleShape:
    found = list(samples)
    if not found:
        raise UserError(
            f"stage {stage_name}: none of the first {MEASURED_SAMPLES} samples can be learned from"
        )
    return SampleShape(*(mean(column) for column in zip(*found, strict=True)))


def sample_flops(flops: StepFlops, sample: SampleShape) -> float:
    """Return the operations of a sample, forward and backward."""
    pairs = sample.token_count * (sample.token_count + 1) / 2
    return (
        flops.per_position * sample.token_count
        + flops.per_attended_pair * pairs
        + flops.per_supervised_position * sample.supervised_tokens
        + flops.per_image * sample.image_count
    )


def _recompute_flops(vlm: VLM, sample: SampleShape) -> dict[str, float]:
    """Return what each way repeats: the forward pass of what `recompute` and gradients reach.

    `selective` keeps the products of decoder layers; a tower and a connector know all or nothing.
    """
    tower_trains = any(one.requires_grad for one in vlm.vision.parameters())
    with temporarily_frozen(vlm):
        forward = count_step_flops(vlm)
    seen = (
        forward.per_image - (0 if tower_trains else forward.per_image_encoding)
    ) * sample.image_count
    layers = (
        forward.per_position * sample.token_count
        + forward.per_attended_pair * sample.token_count**2 / 2
    )
    return {"none": 0.0, "selective": seen, "full": seen + layers}
