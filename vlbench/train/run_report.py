"""What `fit` prints: the plan of a run, its results, what to do next, and errors of a stage."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlbench.compat.torch_internals import COMPILER_NEEDS
from vlbench.config.model_schema import ModelConfig
from vlbench.config.recipe import load_recipe_file
from vlbench.config.schema import TrainerConfig
from vlbench.config.stage_schema import StageConfig, StageData
from vlbench.connector import registry
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.tokenizer import Tokenizer
from vlbench.distributed import collectives
from vlbench.errors import EnvironmentFailure, UserError, escape_to_one_line, one_line
from vlbench.model.vlm import VLM
from vlbench.model.weights.template_detection import brings_other_template
from vlbench.model.weights.weight_origin import WeightOrigin
from vlbench.processor import Processor
from vlbench.text_files import read_json_lines
from vlbench.text_tables import format_table
from vlbench.train.model_names import MINIATURE_HINT, find_model_names, has_foreign_data
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_results_file import read_results
from vlbench.train.view_report import describe_reduced

HARDLY_LEARNED_LOSS = 2.0  # nats a token: the right one has a probability of 0.135


def print_status(line: str) -> None:
    """Print a line that is no result, once for all processes."""
    if collectives.is_rank_zero():
        print(line, file=sys.stderr, flush=True)


def stage_label(name: str, image_size: int) -> str:
    """Return the name of a stage; with the pixels, where its name says others."""
    named_size = re.search(r"_(\d{2,})$", name)
    if named_size is None or int(named_size[1]) == image_size:
        return name
    return f"{name} (here {image_size} pixels)"


def show_run_start(
    title: str,
    trainer: TrainerConfig,
    model: ModelConfig,
    stages: Sequence[StageData],
    steps_by_stage: Mapping[str, int],
) -> None:
    """Print a title, the model, and the stages with their optimizer steps."""
    print(title)
    strategy = trainer.strategy
    if strategy != "auto" and trainer.world_size == 1:
        print(f"trainer.strategy={strategy} changes nothing in one process: trainer.devices is 1")
    names = find_model_names(model)
    if model.init:
        print(f"begins with init={model.init}")
    elif names.has_miniature_language:
        print("size tiny: embedded miniatures, no network, no GPU. Real ones: size=6b, size=34b")
    connector = registry.connector_label(model.connector_name)
    print(f"vision {names.vision} -> connector {connector} -> language {names.language}")
    if has_foreign_data(model, stages):
        print(
            "these data are not the rendered scenes, and this language model has read of coloured "
            "shapes alone: it can learn some images by heart, and tell nothing of new ones. "
            + MINIATURE_HINT
        )
    for one in stages:
        name, stage = one.stage_name, one.stage
        parts = ", ".join(
            f"{part} lr {config.lr:g}" for part, config in stage.trained_parts.items()
        )
        print(
            f"  {stage_label(name, stage.image_size)}: {steps_by_stage[name]} steps of "
            f"{stage.global_batch_size} samples at {stage.image_size} pixels "
            f"({stage.sample_format}); trains {parts}"
        )


def show_weight_origins(origins: Mapping[str, WeightOrigin], seed: int) -> None:
    """Print the source of every part's first weights, with their checksum."""
    for part, origin in origins.items():
        source = re.sub(r"^random(?=,|$)", f"random (seed {seed})", origin.source)
        print(f"{part} {replace(origin, source=source)}")


def show_inputs(processor: Processor) -> None:
    """Print what becomes of an image, and with which chat template a conversation is written."""
    print(f"an image is {processor.transform.describe()}")
    print(describe_template(processor.template, processor.tokenizer))


def describe_template(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    """Return the line that says with which chat template a conversation is written.

    A template by name goes before the one that a tokenizer brings, and then that is said.
    """
    name = template.name
    told = f"language.template={name}"
    if name == "auto":
        told += ", the one that the tokenizer brings"
    try:
        if brings_other_template(name, tokenizer):
            told += "; the tokenizer brings another one, which language.template=auto takes"
    except UserError as error:
        told += f", as {error}"
    stop = escape_to_one_line(template.stop)
    return f"a conversation is written with {told}; answers end at '{stop}'"


def show_stage(
    stage_name: str, stage: StageConfig, total_steps: int, steps_done: int, vlm: VLM
) -> None:
    """Print for every part its parameters, and whether and at which rate they are trained."""
    start = f", from step {steps_done}" if steps_done else ""
    print(f"\nstage {stage_label(stage_name, stage.image_size)}: {total_steps} steps{start}")
    rows = []
    for part, module in vlm.named_parts():
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        mode = f"trained {trained:,}, lr {stage.trained_parts[part].lr:g}" if trained else "frozen"
        rows.append((f"  {part}", f"{total:,}", f"parameters, {mode}"))
    print("\n".join(format_table(rows, "<><")))


def show_truncation(stage_name: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Print how many samples of a stage were cut at `language.max_length`, if any were.

    So it does for those whose tiles were reduced to `vision.max_visual_tokens`.

    `before` and `after` are the counts of the run before and after the stage.
    """
    cut, lost, samples = (
        after.get(name, 0) - before.get(name, 0)
        for name in ("truncated_samples", "lost_supervised_tokens", "samples")
    )
    if cut:
        print_status(
            f"stage {stage_name}: {cut:,} of {samples:,} samples were cut at language.max_length, "
            f"which took {lost:,} supervised tokens"
        )
    reduced = after.get("reduced_samples", 0) - before.get("reduced_samples", 0)
    if reduced:
        print_status(f"stage {stage_name}: {describe_reduced(reduced, samples)}")


def show_disk_usage(vlm: VLM, parts: list[str], kept_checkpoints: int, folder: Path) -> None:
    """Print how much disk space the checkpoints of a stage will take."""
    modules = [getattr(vlm, part) for part in parts]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weight_bytes = sum(p.numel() * _stored_element_bytes(p) for p in parameters)
    moment_bytes = sum(8 * p.numel() for p in parameters if p.requires_grad)  # two, in float32
    print(
        f"  checkpoints: {format_bytes(weight_bytes + moment_bytes)} each, up to "
        f"{kept_checkpoints + 1} kept, in {folder}"
    )


def _stored_element_bytes(weight: Tensor) -> int:
    """Return the bytes of one number in a checkpoint: float32, unless the weight is quantized."""
    return 4 if weight.is_floating_point() else weight.element_size()


def format_bytes(byte_count: float) -> str:
    """Return a number of bytes with a unit, as 1.5 GB."""
    power = min(3, int(math.log(max(byte_count, 1), 1000)))
    return f"{byte_count / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}"


def format_duration(seconds: float) -> str:
    """Return a time with a unit, as 5 minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def show_interrupted(run: RunFolder, stop_reason: str) -> int:
    """Print why the run stopped and how to resume it; return the exit code."""
    kept = "saved" if run.latest_position else "before the first step"
    print_status(
        f"\nstopped by {stop_reason}, {kept}. To go on: repeat the command with "
        + shlex.quote(f"run={run.folder}")
    )
    return 130


def show_results(run: RunFolder) -> int:
    """Print the results of a finished run and what to try next; return the exit code."""
    results = read_results(run.results_file)
    skipped = results.get("skipped_questions")
    left_out = f" ({skipped} more cannot be asked)" if skipped else ""
    asked = f"{results.get('questions')} questions{left_out}, {results.get('asked_of')}"
    print(f"\nresults of {run.folder} ({asked})")
    rows = (
        ("accuracy", "exact match"),
        ("unseen_accuracy", "on attribute pairs never met in training"),
        ("blank_accuracy", "with the image's mean colour instead of the image"),
        ("shuffled_accuracy", "with the images exchanged"),
    )
    known = [
        (f"  {key}", f"{results[key]:.3f}", meaning)
        for key, meaning in rows
        if results.get(key) is not None
    ]
    print("\n".join(format_table(known)))
    families = [
        (
            f"  {name}",
            f"{score['accuracy']:.3f}",
            "{:.3f} to {:.3f}".format(*score["interval"]),
            f"without the image {score['blank_accuracy']:.3f}",
        )
        for name, score in results.get("families", {}).items()
    ]
    print("\n".join(format_table(families)), end="\n" if families else "")
    for key in ("accuracy_by_type", "accuracy_by_language"):
        if results.get(key):
            parts = ", ".join(f"{name} {value:.3f}" for name, value in results[key].items())
            print(f"  {key}: {parts}")
    if results.get("loss") is not None:
        print(f"  {_describe_loss(run, results['loss'])}")
    seconds, peak_bytes = (results.get(key) or 0 for key in ("seconds", "peak_memory_bytes"))
    print(f"  {seconds:.0f} s, peak memory {format_bytes(peak_bytes)}")
    if run.quarantine_file.is_file():
        lines = read_json_lines(run.quarantine_file)
        named = "; ".join(f"{line.get('id')}: {line.get('reason')}" for line in lines[:5])
        print(f"  {len(lines)} bad samples left out ({named}), all in {run.quarantine_file}")
    print("next:")
    print("\n".join(f"  {line}" for line in _next_commands(run.folder)))
    return 0


def _next_commands(folder: Path) -> list[str]:
    """Return what can be tried next with what the run folder holds."""
    picture, logs = folder / "examples.png", folder / "tensorboard"
    chat_command, serve_command = (
        shlex.join(["python", "-m", "vlbench", verb, f"model={folder}"])
        for verb in ("chat", "serve")
    )
    has_model = any((folder / "checkpoints").glob("*/position.json"))
    lines = [f"open {shlex.quote(str(picture))}"] if picture.is_file() else []
    if has_model:
        lines += [
            f"{chat_command}  # /image FILE shows it an image",
            f"{serve_command}  # the same in a browser, and for OpenAI's clients",
        ]
    if logs.is_dir():
        lines.append(f"tensorboard --logdir {shlex.quote(str(folder))}")
    return [*lines, "python -m vlbench show recipe=yivl_llava size=6b"]


def _describe_loss(run: RunFolder, loss: float) -> str:
    """Return a line on the loss of the last step, and what it means."""
    line = f"loss {loss:.3f} at the last step"
    is_learned = loss < HARDLY_LEARNED_LOSS
    recipe = load_recipe_file(run.recipe_file) if run.recipe_file.is_file() else None
    if recipe and has_foreign_data(recipe.model, recipe.selected_data):
        learned = "; of new images it can tell nothing" if is_learned else ": hardly learned"
        return f"{line}{learned}; this miniature speaks of coloured shapes. {MINIATURE_HINT}"
    return line if is_learned else f"{line}: hardly learned; more steps are needed"


def out_of_memory_error(stage_name: str, stage: StageConfig) -> EnvironmentFailure:
    """Return the error for memory that ran out in a stage."""
    return EnvironmentFailure(
        f"out of memory in stage {stage_name}: lower stages.{stage_name}.max_tokens_per_row "
        f"(now {stage.max_tokens_per_row}), set activation_checkpointing=full, or train fewer "
        f"parts; stages.{stage_name}.global_batch_size does not matter. Start again with the "
        "change in a new run; init=RUN begins with what this one has learned"
    )


def worker_died_error(stage_name: str, error: Exception) -> EnvironmentFailure:
    """Return the error for a data worker that died in a stage."""
    return EnvironmentFailure(
        f"stage {stage_name}: {one_line(error, max_lines=2).rstrip('. ')}. Mostly memory, or "
        "shared memory (/dev/shm), has run out: lower data.workers. Checkpoints are whole; to go "
        "on, repeat the command with the run= of this run"
    )


def compile_error(stage_name: str, error: Exception) -> UserError:
    """Return the error for blocks that could not be compiled in a stage."""
    return UserError(
        f"trainer.compile: the blocks could not be compiled in stage {stage_name} "
        f"({one_line(error, max_lines=2)}). {COMPILER_NEEDS}; trainer.compile=false does without"
    )
