"""How long until something happens: `--help`, and the first training step of the main job.

    python benchmarks/startup.py

Cold is a run whose files are no longer in memory, as after a reboot; warm the ones after it.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from result_table import HERE, write_section

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
        words = ["fit", "recipe=yivl_llava", f"run={folder}/run", "log.every_n_steps=1"]
        if cold:
            drop_file_cache()
        began = time.perf_counter()
        with subprocess.Popen(
            [*MODULE, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=HERE.parent,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if re.match(r"align_224 1/", line):
                    break
            seconds = time.perf_counter() - began
            process.terminate()
            process.wait()
    return seconds


def drop_file_cache() -> None:
    """Ask the system to drop every file of the environment and of vlbench from its memory."""
    for root in (Path(sysconfig.get_paths()["purelib"]), HERE.parent / "vlbench"):
        for path in root.rglob("*"):
            if path.is_file():
                handle = os.open(path, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)


def main() -> None:
    """Print the table."""
    helps = [help_seconds() for _ in range(ROUNDS)]
    cold = first_step_seconds(cold=True)
    warm = [first_step_seconds(cold=False) for _ in range(3)]
    write_section(
        "Start",
        [
            "| | seconds |",
            "|---|---:|",
            f"| `--help`, median of {ROUNDS} | {statistics.median(helps):.2f} |",
            f"| first training step, no file in memory | {cold:.1f} |",
            f"| first training step, median of 3 | {statistics.median(warm):.1f} |",
        ],
    )


if __name__ == "__main__":
    main()
