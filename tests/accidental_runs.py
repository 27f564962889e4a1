"""A quick run, what it leaves behind, and what can happen to it in the middle of a step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from vlbench.train import progress_logging
from vlbench.train.run_folder import RunFolder

QUICK = [
    "only=align_224",
    "stages.align_224.steps=4",
    "stages.align_224.global_batch_size=2",
    "log.questions=1",
    "log.examples=0",
    "log.tensorboard=false",
    "log.every_n_steps=1",
]
FIT = ["fit", "recipe=yivl_llava", *QUICK]


def files_of(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder; "" of those that a thread may still fill."""
    return {
        str(file.relative_to(folder)): ""
        if ".writing-" in str(file)
        else sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    position = RunFolder(run).latest_position
    assert position is not None
    return load_file(run / "checkpoints" / position.folder_name / "model.safetensors")


def print_into(descriptor: int, *streams: str) -> None:
    """Let streams of this process write into a pipe or a terminal."""
    for name in streams:
        number = {"stdout": 1, "stderr": 2}[name]
        os.dup2(descriptor, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))


def call_at_step(number: int, call: Callable[[], object]) -> Callable[[], None]:
    """Return what patches training so that `call` is made within optimizer step `number`."""

    def prepare() -> None:
        real = progress_logging.ProgressCallback.on_step_end
        steps: list[int] = []

        def on_step_end(self, training, step) -> None:
            steps.append(1)
            if len(steps) == number:
                call()
            real(self, training, step)

        progress_logging.ProgressCallback.on_step_end = on_step_end  # type: ignore[method-assign]

    return prepare


def write_data(folder: Path) -> None:
    """Write a data set of one sample."""
    Image.new("RGB", (30, 30), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    record = {"id": "1", "image": "red.png", "conversations": turns}
    (folder / "data.json").write_text(json.dumps([record]))
