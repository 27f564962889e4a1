"""`trainer.compile=auto`: blocks are compiled where that pays, which a run decides once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vlbench.compat.torch_internals import missing_gpu_compiler
from vlbench.config.model_schema import ModelConfig
from vlbench.config.recipe import load_recipe_file
from vlbench.config.schema import TrainerConfig
from vlbench.data.reference_image import REFERENCE_SIZE
from vlbench.model.build_vlm import read_view_settings
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.train_flops import head_width
from vlbench.train.gpu_names import peak_flops
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import format_duration
from vlbench.train.shape_checks import meta_encoder_and_config, tokens_per_image_by_stage
from vlbench.train.stage_plan import StageRun

MIN_COMPILED_SECONDS = 900.0
"""Compiling takes one or two minutes of a run and spares about a tenth of the rest."""
ASSUMED_MFU = 0.4
ASSUMED_PEAK_FLOPS = 3e14  # of a GPU that gpus.yaml does not have
ASSUMED_TEXT_TOKENS = {"caption": 40, "chat": 250}
"""Text tokens of a sample where there are no data; the system prompt of 100 is included."""


class CompileChoice(NamedTuple):
    """Whether a run compiles its blocks, and why."""

    compiles: bool
    reason: str
    """In a few words, "" where there was nothing to decide."""


def choose_compile(
    trainer: TrainerConfig, run: str | None, config: ModelConfig, stage_runs: Sequence[StageRun]
) -> CompileChoice:
    """Return whether to compile; a run that is resumed goes on as it began.

    `auto` is true on a GPU for a run of more than `MIN_COMPILED_SECONDS`, by a rough estimate.
    """
    if trainer.compile != "auto":
        return CompileChoice(trainer.compile, "")
    recorded = _recorded_choice(run)
    if recorded is not None:
        return CompileChoice(recorded, "as the run began")
    if trainer.accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
        return CompileChoice(False, "")
    if missing := missing_gpu_compiler():
        return CompileChoice(False, missing)
    peak = peak_flops(torch.device("cuda")) or ASSUMED_PEAK_FLOPS
    seconds = estimate_flops(config, stage_runs) / (peak * ASSUMED_MFU * trainer.world_size)
    length = format_duration(seconds)
    return CompileChoice(seconds > MIN_COMPILED_SECONDS, f"about {length} of training")


def estimate_flops(config: ModelConfig, stage_runs: Sequence[StageRun]) -> float:
    """Return roughly the operations of a training: 6 for a weight of a decoder layer and position.

    That is the rule of Kaplan et al. 2020 (arXiv:2001.08361); samples have one image, with tiles
    that of `data.reference_image`, and `ASSUMED_TEXT_TOKENS`.
    """
    _, language_config = meta_encoder_and_config(config)
    positions = sum(
        stage_run.total_steps
        * stage_run.stage.global_batch_size
        * (
            image_tokens * _assumed_views(config, stage_run.stage.image_size)
            + ASSUMED_TEXT_TOKENS[stage_run.stage.sample_format]
        )
        for stage_run, image_tokens in zip(
            stage_runs, tokens_per_image_by_stage(config, list(stage_runs)), strict=True
        )
    )
    return 6.0 * _decoder_weights(language_config) * positions


def _assumed_views(config: ModelConfig, side: int) -> int:
    """Return how many views of `side` pixels an image has."""
    settings = read_view_settings(config.vision)
    tiling = settings.tiling if settings else None
    if tiling is None:
        return 1
    return len(tiling.list_views(tiling.choose_grid(*REFERENCE_SIZE, side)))


def _decoder_weights(config: DecoderConfig) -> int:
    width, heads = config.hidden_size, config.num_attention_heads
    attention = 2 * width * head_width(config) * (heads + (config.num_key_value_heads or heads))
    return int(config.num_hidden_layers * (attention + 3 * width * config.intermediate_size))


def _recorded_choice(run: str | None) -> bool | None:
    """Return what a run that is there has settled, None for a new one."""
    file = RunFolder(Path(run)).recipe_file if run else None
    if file is None or not file.is_file():
        return None
    recorded = load_recipe_file(file).trainer.compile
    return None if recorded == "auto" else recorded
