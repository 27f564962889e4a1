"""How fast a stage trains: tokens and images per second, MFU, waiting for data, memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from vlbench.data.steps import Step
from vlbench.files import read_text
from vlbench.model.flops import StepFlops
from vlbench.train.module import Training

GPUS = Path(__file__).with_name("gpus.yaml")


def peak_flops(device: torch.device) -> float | None:
    """Return the operations per second that a device can do in 16 bits; None if nobody knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = yaml.safe_load(read_text(GPUS))
    return next((1e12 * gpu["tflops"] for part, gpu in table.items() if part in name), None)


def peak_memory() -> int:
    """Return the peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Speed:
    """Measure between two lines of the log: `begin`, then `after` every step."""

    def __init__(self) -> None:
        """Nothing is counted before `begin`."""
        self.flops: StepFlops | None = None
        self.peak: float | None = None

    def begin(self, training: Training) -> None:
        """Start the clock, and find out what a step should take on this device."""
        self.peak = peak_flops(training.device)
        self.flops = training.flops
        self.began = time.monotonic()
        self._restart()

    def _restart(self) -> None:
        self.window = time.monotonic()
        self.tokens = self.images = self.steps = 0
        self.waited = self.done = 0.0

    def after(self, training: Training, step: Step) -> None:
        """Count a step."""
        report = training.report
        self.tokens += report.tokens
        self.images += report.images
        self.steps += 1
        self.waited += training.waited
        if self.flops:
            self.done += self.flops.of(step.batches)

    def told(self) -> dict[str, Any]:
        """Return the columns of metrics.csv, and begin to count anew.

        `data_wait` is the share of the time in which nothing was trained because the next step was
        not there; `memory` the peak in bytes by now; `mfu` empty where the device is not known.
        """
        now = time.monotonic()
        passed = max(now - self.window, 1e-9)
        known = self.flops is not None and self.peak
        row = {
            "tokens_per_second": round(self.tokens / passed, 1),
            "images_per_second": round(self.images / passed, 2),
            "step_seconds": round(passed / self.steps, 4),
            "data_wait": round(min(1.0, self.waited / passed), 4),
            "mfu": round(self.done / passed / self.peak, 4) if known and self.peak else "",
            "memory": peak_memory(),
            "seconds": round(now - self.began, 2),
        }
        self._restart()
        return row


def rates(row: dict[str, Any]) -> str:
    """Say how fast it goes, from the columns of a row."""
    parts = [
        f"{row['tokens_per_second']:.0f} tokens/s",
        f"{row['images_per_second']:.1f} images/s",
        f"data wait {row['data_wait']:.0%}",
    ]
    parts += [f"MFU {row['mfu']:.0%}"] if row["mfu"] != "" else []
    return ", ".join([*parts, f"peak {row['memory'] / 1e9:.1f} GB"])
