"""How fast a stage trains: tokens and images per second, MFU, waiting for data, memory.

The peaks of GPUs are in gpus.yaml. lightning.fabric.utilities.throughput has a table, too, which is
wrong for half of them: it does not know "NVIDIA H200", A800 or H800, takes an L40S for an L4, and
has the rates without tensor cores for RTX 3090, RTX 4090, A40 and A6000. Its Throughput averages
over a fixed number of steps, whereas rows of metrics.csv come at uneven distances.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from vlbench.data.optimizer_step import OptimizerStep
from vlbench.model.train_flops import StepFlops
from vlbench.train.gpu_names import peak_flops
from vlbench.train.training_module import VLMTrainingModule


def peak_memory() -> int:
    """Return the peak memory in bytes: of the GPU if this process uses one, else of the process."""
    gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    if gpu_peak:
        return gpu_peak
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ThroughputMeter:
    """Measure between two rows of metrics: `start_measuring`, then `count_step` every step."""

    def __init__(self) -> None:
        """Nothing is counted before `start_measuring`."""
        self.step_flops: StepFlops | None = None
        self.device_peak_flops: float | None = None

    def start_measuring(self, training: VLMTrainingModule) -> None:
        """Start the clock; look up the peak FLOP/s of the device, and say if it is not known."""
        self.device_peak_flops = peak_flops(training.device)
        self.step_flops = training.flops
        if self.step_flops is not None and self.device_peak_flops is None:
            name = torch.cuda.get_device_name(training.device)
            print(f"MFU is not known: the table of GPUs has no '{name}'", flush=True)
        self.started_at = time.monotonic()
        self._reset_window()

    def _reset_window(self) -> None:
        self.window_start = time.monotonic()
        self.tokens = self.images = self.views = self.steps = 0
        self.data_wait_seconds = self.flops_done = 0.0

    def count_step(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        """Count an optimizer step."""
        report = training.report
        self.tokens += report.tokens
        self.images += report.images
        self.views += report.views
        self.steps += 1
        self.data_wait_seconds += training.data_wait_seconds
        if self.step_flops:
            self.flops_done += self.step_flops.count_flops(step.micro_batches)

    def read_and_reset(self) -> dict[str, Any]:
        """Return the columns of metrics.csv, and start to count again.

        `data_wait` is the share of the time in which training waited for the next batch; `memory`
        the peak in bytes by now; `mfu` is empty where the peak FLOP/s of the device is not known.
        """
        now = time.monotonic()
        seconds = max(now - self.window_start, 1e-9)
        mfu: float | str = ""
        if self.step_flops is not None and self.device_peak_flops:
            mfu = round(self.flops_done / seconds / self.device_peak_flops, 4)
        row = {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "images_per_second": round(self.images / seconds, 2),
            "views_per_second": round(self.views / seconds, 2),
            "step_seconds": round(seconds / self.steps, 4),
            "data_wait": round(min(1.0, self.data_wait_seconds / seconds), 4),
            "mfu": mfu,
            "memory": peak_memory(),
            "seconds": round(now - self.started_at, 2),
        }
        self._reset_window()
        return row


def format_throughput(row: dict[str, Any]) -> str:
    """Return the text of a row's speed; views are told where images have several."""
    is_tiled = row["views_per_second"] != row["images_per_second"]
    parts = [
        f"{row['tokens_per_second']:.0f} tokens/s",
        f"{row['images_per_second']:.1f} images/s",
        *([f"{row['views_per_second']:.1f} views/s"] if is_tiled else []),
        f"data wait {row['data_wait']:.0%}",
    ]
    parts += [f"MFU {row['mfu']:.0%}"] if row["mfu"] != "" else []
    return ", ".join([*parts, f"peak {row['memory'] / 1e9:.1f} GB"])
