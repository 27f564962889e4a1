"""How long until something happens: `--help`, and the first training step of the main job.

    python benchmarks/startup.py

Cold is the first run after compiled Python files were thrown away (the disk's cache stays), warm
the ones after it.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import HERE, keep

ROUNDS = 5
MODULE = [sys.executable, "-m", "vlbench"]


def help_seconds() -> float:
    """Return how long `--help` takes."""
    began = time.perf_counter()
    subprocess.run([*MODULE, "--help"], check=True, capture_output=True, cwd=HERE.parent)
    return time.perf_counter() - began


def first_step_seconds(cold: bool) -> float:
    """Return how long the main job takes until its first step is done and told."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "recipe=yivl_llava", f"run={folder}/run", "log.every=1"]
        command = [sys.executable, *(["-B"] if cold else []), "-m", "vlbench", *words]
        prefix = {"PYTHONPYCACHEPREFIX": f"{folder}/cache"} if cold else {}
        began = time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=HERE.parent,
            env={**__import__("os").environ, **prefix},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if re.match(r"align_224 1/", line):
                    break
            seconds = time.perf_counter() - began
            process.terminate()
            process.wait()
    return seconds


def main() -> None:
    """Print the table."""
    helps = [help_seconds() for _ in range(ROUNDS)]
    cold = first_step_seconds(cold=True)
    warm = [first_step_seconds(cold=False) for _ in range(3)]
    keep(
        "Start",
        [
            "| | seconds |",
            "|---|---:|",
            f"| `--help`, median of {ROUNDS} | {statistics.median(helps):.2f} |",
            f"| first training step, no compiled Python files | {cold:.1f} |",
            f"| first training step, median of 3 | {statistics.median(warm):.1f} |",
        ],
    )
    assert Path(HERE).is_dir()


if __name__ == "__main__":
    main()
