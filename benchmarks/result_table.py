"""Measurements in turns, each in a process of its own, and the table they are kept in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
"""Where sections are kept, unless the command line says `results=FILE`."""


def run_script(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder, and return the JSON of its last line."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        sys.exit(f"{' '.join([script, *arguments])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.rstrip("\n").split("\n")[-1])


def measure_in_turns(
    rounds: int, sides: dict[str, tuple[str, ...]]
) -> dict[str, list[dict[str, Any]]]:
    """Measure every side once a round, so that all of them meet the same weather."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, words in sides.items():
            found[name].append(run_script(*words))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def median_figure(measured: list[dict[str, Any]], key: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(one[key] for one in measured)


def format_spread(measured: list[dict[str, Any]], key: str) -> str:
    """Return the lowest and highest of a figure over the rounds, in words."""
    values = [one[key] for one in measured]
    return f"{min(values):.0f} to {max(values):.0f}"


def describe_machine() -> str:
    """Say what it was measured on: processor or GPU, versions, commit."""
    import lightning
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    return (
        f"{device}, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}, lightning {lightning.__version__}, "
        f"commit {commit or 'unknown'}"
    )


def _processor_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n") if file.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def write_section(title: str, lines: list[str]) -> None:
    """Print a section and put it into RESULTS.md, in the place of what was measured before."""
    text = "\n".join([f"## {title}", "", describe_machine(), "", *lines, ""])
    print(text)
    given = [word.removeprefix("results=") for word in sys.argv if word.startswith("results=")]
    file = Path(given[-1]) if given else RESULTS
    before = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    head, *sections = before.split("\n## ")
    kept = [f"## {one.rstrip()}\n" for one in sections if one.split("\n")[0] != title]
    parts = [head.rstrip() + "\n", *kept, text]
    file.write_text("\n".join(parts), encoding="utf-8")
