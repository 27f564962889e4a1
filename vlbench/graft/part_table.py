"""What three parts are together: shapes and tokens of each stage, parameters, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vlbench.command_line.arguments import DEFAULT_GPU
from vlbench.config.key_types import ENCODER_PARTS
from vlbench.config.model_schema import ModelConfig
from vlbench.config.stage_schema import StageConfig
from vlbench.connector import registry
from vlbench.data.reference_image import largest_image
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.planner.gpu_table import GpuSpec, find_gpu, local_gpu
from vlbench.planner.memory_estimate import MemoryByComponent, total_bytes
from vlbench.planner.options import PlanOptions
from vlbench.planner.training_plan import measure_stage, stage_row_tokens, usable_memory
from vlbench.text_tables import format_table
from vlbench.train.model_names import find_model_names, name_encoders
from vlbench.train.run_report import format_bytes

StageModels = Mapping[str, LoadedVLM]
"""The model of each stage on `meta`, by the stage's name."""


def shape_lines(config: ModelConfig, models: StageModels) -> list[str]:
    """Return a table of the stages: image, patches, and what an image takes of the text.

    With tiles, or native aspect ratios, it is the image that takes most; with
    `vision.max_visual_tokens` no more than that.
    """
    limit = config.vision.max_visual_tokens
    taken = ["tokens per image"]
    if config.vision.has_views:
        taken = ["most views", "most tokens per image"]
    rows: list[tuple[str, ...]] = [
        ("stage", "image", "patches", "features", *taken, "left for text")
    ]
    for name, vlm in models.items():
        encoder, shapes = vlm.vision, vlm.model.shapes
        tokens, length = vlm.connector.tokens_per_image, config.language.max_length
        views: tuple[str, ...] = ()
        if vlm.processor.view_layout is not None:
            count, tokens = largest_image(vlm.processor.view_layout)
            tokens, views = min(tokens, limit or tokens), (str(count),)
        rows.append(
            (
                name,
                f"{encoder.image_size} px",
                f"{encoder.grid[0]} x {encoder.grid[1]} = {shapes.patches}",
                f"{shapes.vision_width} wide",
                *views,
                str(tokens),
                f"{max(0, length - tokens)} of {length}",
            )
        )
    return format_table(rows)


def parameter_lines(
    model: ModelConfig, stages: Mapping[str, StageConfig], vlm: LoadedVLM
) -> list[str]:
    """Return a table of the parts with their parameters and the stages that train them."""
    config = vlm.language.config
    language = find_model_names(model).language
    connector = registry.connector_label(model.connector_name)
    inside = vlm.connector.inject_layers
    told = {
        **_encoder_texts(name_encoders(model), vlm),
        "connector": connector + (f", in {len(inside)} decoder layers" if inside else ""),
        "language": f"{language}, {config.num_hidden_layers} layers, {config.hidden_size} wide",
    }
    rows = [("part", "what", "parameters", "trained in")]
    for part, count in count_parameters(vlm).items():
        trained_in = [name for name, stage in stages.items() if part in stage.trained_parts]
        rows.append((part, told[part], f"{count:,}", ", ".join(trained_in) or "none (frozen)"))
    return format_table(rows, "<<><")


def count_parameters(vlm: LoadedVLM) -> dict[str, int]:
    """Return the number of parameters of each part."""
    return {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in vlm.model.named_parts()
    }


def _encoder_texts(names: Sequence[str], vlm: LoadedVLM) -> dict[str, str]:
    """Return for each vision encoder what it is, and which of its blocks the connector reads."""
    texts = {}
    encoders = vlm.vision.encoders()
    for part, name, encoder in zip(ENCODER_PARTS, names, encoders, strict=False):
        numbers = ", ".join(str(block + 1) for block in encoder.output_blocks)
        blocks = f"block{'s' * (',' in numbers)} {numbers} of {len(encoder.blocks())}"
        texts[part] = f"{name}, features of {blocks}"
    return texts


@dataclass(frozen=True)
class StageNeed:
    """What a stage needs of a GPU."""

    stage: str
    checkpointing_mode: str
    row_tokens: int
    memory: MemoryByComponent
    fits: bool


def memory_lines(options: PlanOptions, gpu_note: str) -> list[str]:
    """Return a table of the memory of a GPU at the peak of each stage that learns language."""
    budget = usable_memory(options.gpu)
    stages = options.recipe.selected_stages
    larger = {name: _larger_stage(stage, stages) for name, stage in stages.items()}
    needs = [
        _stage_need(options, index, name, stage, budget)
        for index, (name, stage) in enumerate(stages.items())
        if stage.objective == "language" and not larger[name]
    ]
    rows: list[tuple[str, ...]] = [
        ("stage", "tokens per row", "checkpointing", *MEMORY_COLUMNS, "sum", "")
    ]
    for need in needs:
        weights, gradients, optimizer = (
            need.memory[part] for part in ("weights", "gradients", "optimizer")
        )
        step = total_bytes(need.memory) - weights - gradients - optimizer
        parts = (weights, gradients, optimizer, step, total_bytes(need.memory))
        cells = (f"{size / 1e9:.2f}" for size in parts)
        rows.append(
            (
                need.stage,
                str(need.row_tokens),
                need.checkpointing_mode,
                *cells,
                "fits" if need.fits else "DOES NOT FIT",
            )
        )
    title = (
        f"memory at the peak on one {options.gpu.name} ({format_bytes(options.gpu.memory_bytes)}, "
        f"{budget / 1e9:.1f} GB usable; {gpu_note}), in GB"
    )
    notes = [f"{name} needs no more than {other}" for name, other in larger.items() if other]
    return [title, *format_table(rows, "<>"), *notes]


MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "step")


def _larger_stage(stage: StageConfig, stages: Mapping[str, StageConfig]) -> str:
    """Return a stage that needs more than `stage`: all is the same but larger images; "": none.

    A full row has more patches the larger an image is, as there is less text between the images.
    """
    for name, other in stages.items():
        if other.image_size > stage.image_size and _memory_keys(other) == _memory_keys(stage):
            return name
    return ""


def _memory_keys(stage: StageConfig) -> tuple[object, ...]:
    """Return what memory depends on beside the image size."""
    adapters = {part: how.lora for part, how in stage.trained_parts.items()}
    return stage.sample_format, stage.max_tokens_per_row, stage.objective, adapters


def _stage_need(
    options: PlanOptions, index: int, name: str, stage: StageConfig, budget: float
) -> StageNeed:
    """Return the need of a stage in the recipe's checkpointing, `auto`: the first that fits."""
    found = measure_stage(options, index, name, stage)
    row_tokens = stage_row_tokens(options, name, found.memory.vlm, budget)
    given = options.recipe.activation_checkpointing
    modes: Sequence[str] = CHECKPOINTING_MODES if given == "auto" else (given,)
    for mode in modes:
        memory = found.memory.estimate_memory(options.strategy, mode, row_tokens)
        if total_bytes(memory) <= budget:
            break
    return StageNeed(name, mode, row_tokens, memory, total_bytes(memory) <= budget)


def choose_gpu(named: GpuSpec | None) -> tuple[GpuSpec, str]:
    """Return the GPU that memory is told for, and where it is from."""
    if named is not None:
        return named, "as named"
    if torch.cuda.is_available():
        return local_gpu(), "the one of this machine"
    return find_gpu(DEFAULT_GPU), "there is no GPU here; gpu=NAME for another"
