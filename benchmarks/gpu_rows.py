"""Figures of a run on a GPU: printed and kept at once, so that a run cut short has them."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


class RunLog:
    """Rows of a run with a budget of seconds, which counts from `began_at` (`time.monotonic`)."""

    def __init__(self, folder: Path, began_at: float, budget_seconds: float) -> None:
        """Append rows to `folder`/h200.jsonl."""
        self.folder, self.file = folder, folder / "h200.jsonl"
        self.began_at, self.budget_seconds = began_at, budget_seconds
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        """What is left of the budget."""
        return self.budget_seconds - (time.monotonic() - self.began_at)

    def write_row(self, name: str, **figures: Any) -> None:
        """Print a row and append it to the file."""
        row = {"row": name, "at": round(time.monotonic() - self.began_at, 1), **figures}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def table_lines(self) -> list[str]:
        """Return all rows as a table: a name, and its figures in words."""
        lines = ["| | |", "|---|---|"]
        for row in self.rows:
            figures = {key: value for key, value in row.items() if key not in ("row", "at")}
            told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures.items())
            lines.append(f"| {row['row']} | {told.replace('|', '/').replace(chr(10), ' ')} |")
        return lines


def synchronize_device() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)


def release_memory() -> None:
    """Give back what nothing holds, and measure peaks from here on."""
    gc.collect()
    if ON_GPU:
        synchronize_device()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def median_seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """Return the median seconds of a call, by events of the GPU where there is one."""
    for _ in range(3):
        call()
    if not ON_GPU:
        return statistics.median(_clock_seconds(call) for _ in range(3))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    synchronize_device()
    return statistics.median(
        1e-3 * start.elapsed_time(end) for start, end in zip(marks, marks[1:], strict=False)
    )


def _clock_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
