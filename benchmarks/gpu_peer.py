"""The chat stage on a GPU beside Hugging Face's Trainer: the same shapes and samples."""

from __future__ import annotations

import statistics

import torch
from gpu_rows import DEVICE, ON_GPU, RunLog, release_memory
from gpu_training import BATCH, LLAVA, STEPS, WARM, build_stage, make_steps, measure_stage


def measure_peer(log: RunLog, size: str) -> None:
    """Train with vlbench, then with the Trainer and ever larger batches, until memory ends."""
    import transformers_trainer

    words = (*LLAVA, "connector.norm=false")  # transformers' projector has none
    tested = build_stage(words, size)
    measure_stage(log, f"chat, {size}, beside the Trainer", tested, "full")
    data = make_steps(tested, 4096)
    vlm = tested.vlm.to("meta")  # two models do not fit on a GPU
    del tested
    release_memory()
    model = transformers_trainer.build_random_llava(vlm, DEVICE)
    for micro in (2, 4, 8):
        model.zero_grad(set_to_none=True)
        release_memory()
        try:
            watch = transformers_trainer.train(
                model, data.samples, data.image_pixels, BATCH, micro, 2e-5, False, True, ON_GPU
            )
        except torch.OutOfMemoryError:
            log.write_row(f"Trainer, {size}, batches of {micro}", result="out of memory")
            return
        numbers = range(WARM, STEPS)
        seconds = [watch.times[n] - watch.times[n - 1] for n in numbers]
        tokens = [watch.tokens[n] - watch.tokens[n - 1] for n in numbers]
        rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 1) if ON_GPU else None
        log.write_row(
            f"Trainer, {size}, batches of {micro}",
            step_seconds=round(statistics.median(seconds), 3),
            tokens_per_second=round(statistics.median(rates)),
            peak_gb=peak,
        )
        if log.seconds_left < 3 * sum(watch.times[n] - watch.times[n - 1] for n in range(1, STEPS)):
            return
