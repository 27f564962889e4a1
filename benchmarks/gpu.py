"""What one GPU makes of the real sizes: step time, MFU, memory; random weights, real shapes.

    python benchmarks/gpu.py part=ceiling|chat|align|peer|lora|connectors|answers
        [size=6b] [steps=8]

Every part ends within eight minutes and puts its rows into RESULTS.md. `chat` trains all of Yi-VL
at 448 pixels, `align` encoder and connector at 224, `peer` does `chat` with the Trainer and
ever larger batches, `lora` trains adapters (size=34b), `connectors` tries each one. MFU counts
what the stage needs (no recomputation, half of attention); the hardware's own utilisation stands
beside it, and `ceiling` measures what matrix products reach. `answers` writes answers with a cache
that grows and with a compiled step, whose graph is made in the first call.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from typing import Any

import benchmark_model
import torch
from benchmark_model import PackedSteps
from measure_training import StepTimer
from PIL import Image
from result_table import write_section

from vlbench.config import recipe as recipes
from vlbench.config.recipe import with_random_weights
from vlbench.config.schema import Recipe
from vlbench.errors import EnvironmentFailure
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_step_flops
from vlbench.train.lightning_trainer import root_device
from vlbench.train.stage_plan import plan_stage_runs
from vlbench.train.stage_runner import StageRunner
from vlbench.train.throughput import peak_flops, peak_memory

WARM = 2
BATCH = 16
CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
TABLE_HEAD = [
    "| | seconds a step | tokens/s | MFU | of the hardware | peak memory | kept |",
    "|---|---:|---:|---:|---:|---:|---|",
]
PART_HEADS = {
    "ceiling": ["| | measured |", "|---|---:|"],
    "answers": ["| | seconds of the first call | tokens/s after it |", "|---|---:|---:|"],
}
WRITTEN, ROUNDS = 128, 3


def measure_matmul(device: torch.device) -> float:
    """Return the operations per second of a large matrix product in bf16, measured."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    _synchronize_device(device)
    began, rounds = time.perf_counter(), 20
    for _ in range(rounds):
        a @ a
    _synchronize_device(device)
    return rounds * 2 * side**3 / (time.perf_counter() - began)


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_random_vlm(recipe: Recipe, image_size: int, device: torch.device) -> LoadedVLM:
    """Return the model of a recipe with random weights, made where it will be trained."""
    recipe = with_random_weights(recipe)
    with device:
        return build_vlm(recipe, image_size)


def measure_stage(overrides: list[str], stage: str, steps: int) -> list[str]:
    """Train some steps of a stage, and return the cells of its row."""
    recipe = recipes.load_recipe([*overrides, "data.train=scenes"])
    device = root_device(recipe.trainer)
    stage_run = next(each for each in plan_stage_runs(recipe) if each.name == stage)
    chosen = stage_run.stage.model_copy(
        update={"global_batch_size": BATCH, "warmup_ratio": 0.0, "schedule": "constant"}
    )
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    vlm = build_random_vlm(recipe, chosen.image_size, device)
    side = chosen.image_size
    shown = torch.randn(benchmark_model.IMAGE_COUNT, 3, side, side)
    images = (1, 1) if chosen.sample_format == "caption" else benchmark_model.IMAGES
    per_image = vlm.connector.tokens_per_image
    samples = benchmark_model.make_conversations(
        BATCH * steps, images, 0, per_image, vlm.tokenizer.embedding_rows
    )
    data: Any = PackedSteps(samples, BATCH, chosen.max_tokens_per_row, shown)
    runner = StageRunner.from_recipe(recipe)
    watch = StepTimer()
    with runner.prepare_stage(vlm.model, chosen):
        way = runner.set_activation_checkpointing(vlm.model, data)
        flops = count_step_flops(vlm.model)
        try:
            runner.train_stage(vlm.model, stage, chosen, data, steps, callbacks=[watch])
        except EnvironmentFailure as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                return ["out of memory", "", "", "", "", way]
            raise
    seconds = watch.times[-1] - watch.times[WARM - 1]
    needed = (
        sum(flops.count_flops(data[number].micro_batches) for number in range(WARM, steps))
        / seconds
    )
    repeated = {"none": 1.0, "selective": 1.0, "full": 4 / 3}[way]  # a forward pass more
    peak = peak_flops(device)
    shares = [f"{needed * more / peak:.1%}" if peak else "" for more in (1.0, repeated)]
    return [
        f"{seconds / (steps - WARM):.3f}",
        f"{(watch.tokens[-1] - watch.tokens[WARM - 1]) / seconds:.0f}",
        *shares,
        f"{peak_memory() / 1e9:.1f} GB",
        way,
    ]


def measure_trainer(overrides: list[str], steps: int) -> list[list[str]]:
    """Train the chat stage with Hugging Face's Trainer, a batch size a row."""
    import transformers_trainer as trainer

    recipe = recipes.load_recipe([*overrides, "connector.norm=false", "data.train=scenes"])
    device = root_device(recipe.trainer)
    stage = recipe.stages["chat"]
    side = stage.image_size
    shown = torch.randn(benchmark_model.IMAGE_COUNT, 3, side, side)
    rows = []
    for micro in (1, 2, 4, 8):
        vlm = build_random_vlm(recipe, side, device).to(torch.float32)
        per_image, count = vlm.connector.tokens_per_image, vlm.tokenizer.embedding_rows
        samples = benchmark_model.make_conversations(
            BATCH * steps, benchmark_model.IMAGES, 0, per_image, count
        )
        model = trainer.export_to_transformers(vlm).to(device)
        del vlm
        gc.collect()
        try:
            watch = trainer.train(
                model, samples, shown, BATCH, micro, 2e-5, False, True, device.type == "cuda"
            )
        except torch.OutOfMemoryError:
            rows.append([f"Trainer, batches of {micro}", "out of memory", "", "", "", "", "full"])
            break
        seconds = watch.times[-1] - watch.times[WARM - 1]
        rate = (watch.tokens[-1] - watch.tokens[WARM - 1]) / seconds
        cells = [f"{seconds / (steps - WARM):.3f}", f"{rate:.0f}", "", ""]
        rows.append(
            [f"Trainer, batches of {micro}", *cells, f"{peak_memory() / 1e9:.1f} GB", "full"]
        )
    return rows


def measure_answers(overrides: list[str]) -> list[list[str]]:
    """Answer questions about images in both ways, a number of conversations a row."""
    recipe = recipes.load_recipe(overrides)
    device = root_device(recipe.trainer)
    vlm = build_random_vlm(recipe, recipe.stages["chat"].image_size, device).eval()
    if device.type == "cuda":
        vlm = vlm.to(torch.bfloat16)
    image = Image.effect_noise((vlm.vision.image_size, vlm.vision.image_size), 64).convert("RGB")
    shown = {"type": "image", "image": image}
    rows = []
    for count in (1, BATCH):
        texts = [f"{'What is there? ' * (1 + n)}" for n in range(count)]
        asked = [[{"role": "user", "content": [shown, {"type": "text", "text": t}]}] for t in texts]
        batch = vlm.prepare(asked)
        for name, compiled in (("growing cache", False), ("compiled step", True)):
            took, written = [], 0
            for _ in range(ROUNDS + 1):
                began = time.perf_counter()
                new = vlm.generate(batch, max_new_tokens=WRITTEN, compiled=compiled)
                took.append(time.perf_counter() - began)
                written = sum(map(len, new))
            first, again = took[0], statistics.median(took[1:])
            rows.append([f"{name}, {count} at once", f"{first:.1f}", f"{written / again:.0f}"])
    return rows


def measure_part(part: str, size: str, steps: int) -> list[list[str]]:
    """Return the rows of a part's table."""
    words = [f"size={size}", "activation_checkpointing=auto"]
    llava = ["recipe=yivl_llava", *words]
    lora = ["stages.chat.train.language.lora.rank=64", "stages.chat.train.vision=null"]
    if part == "ceiling":
        device = root_device(recipes.load_recipe(["recipe=yivl_llava"]).trainer)
        return [["bf16 matrix product", f"{measure_matmul(device) / 1e12:.1f} TFLOP/s"]]
    if part == "peer":
        return measure_trainer(llava, steps)
    if part == "answers":
        return measure_answers(llava)
    known: dict[str, dict[str, tuple[list[str], str]]] = {
        "chat": {f"chat, {size}, all parameters": (llava, "chat")},
        "align": {f"align_224, {size}": (llava, "align_224")},
        "lora": {f"chat, {size}, LoRA": ([*llava, *lora], "chat")},
        "connectors": {
            f"chat, {size}, {recipe}": ([f"recipe={recipe}", *words], "chat")
            for recipe in CONNECTORS
        },
    }
    if part not in known:
        sys.exit(f"part is '{part}'; allowed are ceiling, peer, answers, {', '.join(known)}")
    return [[name, *measure_stage(*what, steps)] for name, what in known[part].items()]


def main() -> None:
    """Run one part."""
    given = dict(word.split("=") for word in sys.argv[1:])
    part, size = given["part"], given.get("size", "6b")
    rows = measure_part(part, size, int(given.get("steps", 8)))
    head = PART_HEADS.get(part, TABLE_HEAD)
    where = "GPU" if torch.cuda.is_available() else "CPU"
    write_section(f"{where}: {part}, {size}", [*head, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    main()
