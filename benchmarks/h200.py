"""One GPU and the real sizes, in one process: what is worth most first, within a budget of time.

    python benchmarks/h200.py [budget_s=420] [size=6b] [lora_size=34b] [out=FOLDER]
        [parts=kernels,chat_full,...] [results=FILE]

Weights are random and shapes real. Every row is printed and appended to h200.jsonl at once; a part
that fails is a row with its error, and one whose expected time exceeds what is left of the budget
is left out. The budget counts from the start, imports included. At the end the rows become a
section of RESULTS.md. MFU counts what the stage needs: no recomputation, half of attention.
"""

from __future__ import annotations

import os
import sys
import time

BEGAN_AT = time.monotonic()
if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # as vlbench's verbs do

import logging  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from gpu_answers import measure_answers  # noqa: E402
from gpu_kernels import measure_kernels  # noqa: E402
from gpu_peer import measure_peer  # noqa: E402
from gpu_rows import ON_GPU, RunLog, release_memory  # noqa: E402
from gpu_training import (  # noqa: E402
    ChatVariants,
    measure_align,
    measure_connectors,
    measure_lora,
)
from result_table import write_section  # noqa: E402

REPOSITORY = Path(__file__).parents[1]
ALLOWED_KEYS = ("budget_s", "size", "lora_size", "out", "parts", "results")


class Part(NamedTuple):
    """A part of the run."""

    measure: Callable[[], object]
    expected_seconds: float
    """On an H200 at size=6b, estimated until it was measured."""


def run_gpu_tests(log: RunLog) -> None:
    """Run the tests that need a GPU."""
    files = sorted((REPOSITORY / "tests").glob("test_*.py"))
    files = [file for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]
    words = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", *map(str, files)]
    run_command(log, "pytest -m gpu", ["pytest", *words])


def run_program(log: RunLog) -> None:
    """Run `fit` on the miniatures: three stages, checkpoints, held-out questions."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["recipe=yivl_llava", "precision=bf16", "activation_checkpointing=auto"]
        words += ["log.questions=16", "log.tensorboard=false", f"run={folder}/tiny"]
        words += [f"stages.{name}.steps=20" for name in ("align_224", "align_448", "chat")]
        run_command(log, "fit, tiny, 3 stages of 20 steps", ["vlbench", "fit", *words])


def run_command(log: RunLog, name: str, module_and_words: list[str]) -> None:
    """Run a module in a process of its own; write its exit code and the end of what it said."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *module_and_words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=max(20, log.seconds_left),
    )
    seconds = round(time.monotonic() - began, 1)
    (log.folder / f"{module_and_words[0]}.txt").write_text(done.stdout + done.stderr)
    log.write_row(
        name,
        exit_code=done.returncode,
        seconds=seconds,
        said=done.stdout[-300:],
        **({"errors": done.stderr[-300:]} if done.returncode else {}),
    )


def list_parts(log: RunLog, size: str, lora_size: str) -> dict[str, Part]:
    """Return the parts by name, the most valuable first."""
    chat, connectors_seconds = ChatVariants(size), 75

    def chat_compiled() -> None:
        if not chat.measure(log, "none", compiled=True):
            chat.measure(log, "none", compiled=True, row_tokens=3072)

    return {
        "kernels": Part(lambda: measure_kernels(log), 10),
        "chat_full": Part(lambda: chat.measure(log, "full", profiled=True), 40),
        "chat_compiled": Part(chat_compiled, 50),
        "chat_selective": Part(lambda: chat.measure(log, "selective"), 20),
        "chat_long_rows": Part(
            lambda: chat.measure(log, "full", compiled=True, row_tokens=16384), 40
        ),
        "release": Part(chat.release, 0),
        "tests": Part(lambda: run_gpu_tests(log), 60),
        "program": Part(lambda: run_program(log), 60),
        "connectors": Part(
            lambda: measure_connectors(log, size, connectors_seconds), connectors_seconds
        ),
        "answers": Part(lambda: measure_answers(log, size), 60),
        "align": Part(lambda: measure_align(log, size), 30),
        "lora": Part(lambda: measure_lora(log, lora_size), 50),
        "peer": Part(lambda: measure_peer(log, size), 120),
    }


def run_part(log: RunLog, name: str, part: Part) -> None:
    """Run a part; its error is a row, and no reason to stop."""
    if log.seconds_left < part.expected_seconds:
        left, wanted = round(log.seconds_left), part.expected_seconds
        log.write_row(name, left_out=f"{left} s are left, {wanted} are expected")
        return
    try:
        part.measure()
    except Exception as error:
        last_calls = "".join(traceback.format_exception(error))[-900:]
        log.write_row(name, failed=f"{type(error).__name__}: {error}"[:300], where=last_calls)
        error.__traceback__ = None
    release_memory()


def main() -> None:
    """Run what fits, and write the table."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    unknown = [key for key in given if key not in ALLOWED_KEYS]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; allowed are {', '.join(ALLOWED_KEYS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    size, lora_size = given.get("size", "6b"), given.get("lora_size", "34b")
    log = RunLog(Path(given.get("out", ".")), BEGAN_AT, float(given.get("budget_s", 420)))
    parts = list_parts(log, size, lora_size)
    names = given["parts"].split(",") if "parts" in given else list(parts)
    missing = [name for name in names if name not in parts]
    if missing:
        sys.exit(f"unknown parts: {', '.join(missing)}; allowed are {', '.join(parts)}")
    log.write_row("start", imports_seconds=round(time.monotonic() - BEGAN_AT, 1))
    for name in names:
        run_part(log, name, parts[name])
    where = "One GPU" if ON_GPU else "The script for a GPU, on a CPU"
    write_section(f"{where}: {size}", log.table_lines())


if __name__ == "__main__":
    main()
