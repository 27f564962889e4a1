"""Some steps of a stage on a GPU: seconds, MFU and memory; random weights, real shapes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import benchmark_model
import torch
from benchmark_model import PackedSteps
from gpu_rows import DEVICE, ON_GPU, RunLog, release_memory, synchronize_device
from measure_training import StepTimer

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageConfig
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.mixed_precision import autocast_context
from vlbench.model.train_flops import count_step_flops
from vlbench.train.gpu_names import peak_flops
from vlbench.train.stage_runner import StageRunner
from vlbench.train.training_module import VLMTrainingModule

BATCH = 16  # conversations in an optimizer step
STEPS, WARM = (6, 2) if ON_GPU else (3, 1)  # steps, and those of them that are not counted
LLAVA = ("recipe=yivl_llava",)
LORA_WORDS = ("stages.chat.train.language.lora.rank=64", "stages.chat.train.vision=null")


class DeviceTimer(StepTimer):
    """Note when the GPU has finished every step."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep Lightning from copying AdamW's moments to the host where memory ran out."""
        trainer.strategy.teardown = lambda: None

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Note the step."""
        synchronize_device()
        super().on_step_end(training, step)


@dataclass
class StageUnderTest:
    """A model, and the stage that it is trained in."""

    recipe: Recipe
    stage_name: str
    stage: StageConfig
    vlm: LoadedVLM


def build_stage(
    words: tuple[str, ...], size: str, stage_name: str = "chat", is_exact_in_bf16: bool = False
) -> StageUnderTest:
    """Build a recipe's model where it is trained; weights as those of files in bf16, if wanted."""
    words = (*words, "vision.weights=random", "language.weights=random", "data.train=scenes")
    recipe = recipes.load_recipe([*words, f"size={size}", "precision=bf16"])
    stage = recipe.stages[stage_name].model_copy(
        update={"global_batch_size": BATCH, "warmup_ratio": 0.0, "schedule": "constant"}
    )
    with DEVICE:
        vlm = build_vlm(recipe.model, stage.image_size)
    if is_exact_in_bf16:
        for parameter in vlm.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return StageUnderTest(recipe, stage_name, stage, vlm)


def measure_stage(
    log: RunLog,
    name: str,
    tested: StageUnderTest,
    mode: str,
    *,
    row_tokens: int = 4096,
    compiled: bool = False,
    profiled: bool = False,
) -> bool:
    """Train some steps and write a row; return whether memory sufficed.

    Args:
        log: Takes the row, and the profile.
        name: Of the row.
        tested: What is trained.
        mode: Of activation checkpointing.
        row_tokens: Positions of a packed row at most.
        compiled: Whether decoder layers and encoder blocks are compiled.
        profiled: Whether a forward and a backward pass are profiled afterwards.
    """
    release_memory()
    vlm, stage = tested.vlm.model, tested.stage
    runner = StageRunner(
        trainer_config=tested.recipe.trainer.model_copy(update={"compile": compiled}),
        precision="bf16",
        activation_checkpointing=mode,
        seed=0,
    )
    data: Any = make_steps(tested, row_tokens)
    timer, began = DeviceTimer(), time.perf_counter()
    figures: dict[str, Any] = {"kept": mode, "row_tokens": row_tokens, "compiled": compiled}
    with runner.prepare_stage(vlm, stage):
        runner.set_activation_checkpointing(vlm, data)
        fits = True
        try:
            workers = 2 if ON_GPU else 0
            runner.train_stage(
                vlm, tested.stage_name, stage, data, STEPS, callbacks=[timer], num_workers=workers
            )
            figures["first_step_seconds"] = round(timer.times[0] - began, 1)
            figures |= step_figures(tested, data, timer)
            if profiled and ON_GPU:
                write_profile(log, name, vlm, data)
        except (EnvironmentFailure, UserError) as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            fits, figures["result"] = False, "out of memory"
            error.__cause__.__traceback__ = None  # its frames hold what filled the memory
        vlm.zero_grad(set_to_none=True)
        log.write_row(name, **figures)
        release_memory()
    return fits


def make_steps(tested: StageUnderTest, row_tokens: int) -> PackedSteps:
    """Return steps of conversations, with images of random pixels, for the stage's format."""
    vlm, stage = tested.vlm, tested.stage
    images = (1, 1) if stage.sample_format == "caption" else benchmark_model.IMAGES
    samples = benchmark_model.make_conversations(
        BATCH * STEPS, images, 0, vlm.connector.tokens_per_image, vlm.tokenizer.embedding_rows
    )
    side = stage.image_size
    pixels = torch.randn(benchmark_model.IMAGE_COUNT, 3, side, side)
    return PackedSteps(samples, BATCH, row_tokens, pixels)


def step_figures(tested: StageUnderTest, data: PackedSteps, timer: DeviceTimer) -> dict[str, Any]:
    """Return medians over the counted steps, and the peak of memory."""
    flops, peak = count_step_flops(tested.vlm.model), peak_flops(DEVICE)
    numbers = range(WARM, STEPS)
    seconds = [timer.times[n] - timer.times[n - 1] for n in numbers]
    tokens = [timer.tokens[n] - timer.tokens[n - 1] for n in numbers]
    rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
    figures: dict[str, Any] = {
        "step_seconds": round(statistics.median(seconds), 3),
        "spread": [round(min(seconds), 3), round(max(seconds), 3)],
        "tokens_per_second": round(statistics.median(rates)),
    }
    if peak:
        needed = [flops.count_flops(data[number].micro_batches) for number in numbers]
        shares = [work / taken / peak for work, taken in zip(needed, seconds, strict=True)]
        figures["mfu"] = round(statistics.median(shares), 4)
    if ON_GPU:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        figures["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 1)
    figures["losses"] = [round(loss, 3) for loss in timer.losses]
    return figures


def write_profile(log: RunLog, name: str, vlm: Any, data: PackedSteps) -> None:
    """Write which kernels a forward and a backward pass of one micro-batch spend their time in."""
    from torch.profiler import ProfilerActivity, profile

    batch = data[0].micro_batches[0].to(DEVICE)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        with autocast_context(DEVICE.type, bf16=True):
            loss = vlm(batch).loss_sum
        loss.backward()
        synchronize_device()
    table = trace.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60
    )
    file = log.folder / f"profile-{name.replace(' ', '-').replace(',', '')}.txt"
    file.write_text(table, encoding="utf-8")


class ChatVariants:
    """The chat stage with every parameter trained, in several ways, on one model."""

    def __init__(self, size: str) -> None:
        """Build the model when it is first needed."""
        self.size = size
        self._tested: StageUnderTest | None = None

    def measure(self, log: RunLog, mode: str, **options: Any) -> bool:
        """Measure a variant; return whether memory sufficed."""
        self._tested = self._tested or build_stage(LLAVA, self.size)
        return measure_stage(log, f"chat, {self.size}", self._tested, mode, **options)

    def release(self) -> None:
        """Let the model go."""
        self._tested = None
        release_memory()


def measure_connectors(log: RunLog, size: str, expected_seconds: float) -> None:
    """Train the chat stage with every other connector, while the budget lasts."""
    for name in ("yivl_qformer", "yivl_flamingo", "yivl_eva"):
        if log.seconds_left < expected_seconds / 3:
            log.write_row(f"chat, {size}, {name}", left_out="no time")
            continue
        tested = build_stage((f"recipe={name}",), size)
        measure_stage(log, f"chat, {size}, {name}", tested, "full")
        del tested
        release_memory()


def measure_align(log: RunLog, size: str) -> None:
    """Train encoder and connector, the language model frozen."""
    tested = build_stage(LLAVA, size, "align_448", is_exact_in_bf16=True)
    measure_stage(log, f"align_448, {size}", tested, "none", row_tokens=8192)


def measure_lora(log: RunLog, size: str) -> None:
    """Train adapters of rank 64 and the connector."""
    tested = build_stage((*LLAVA, *LORA_WORDS), size, is_exact_in_bf16=True)
    measure_stage(log, f"chat, {size}, LoRA 64", tested, "full", row_tokens=8192)
