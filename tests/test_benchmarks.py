"""The benchmarks run: both sides of a comparison, and the script for GPUs on the miniatures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_both_sides_learn_the_same_from_the_same_tokens():
    words = ("part=chat", "steps=3")
    ours, theirs = (
        json.loads(run("measure_training.py", side, micro, *words).splitlines()[-1])
        for side, micro in (("ours", "micro=2048"), ("theirs", "micro=8"))
    )
    assert ours["tokens"] == theirs["tokens"]
    # the peer has one id more, for images, which takes a thousandth of the probability
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-3)


@pytest.mark.parametrize(
    "part", ["ceiling", "chat", pytest.param("answers", marks=pytest.mark.slow)]
)
def test_the_script_for_gpus_works_on_the_miniatures(part, tmp_path):
    file = tmp_path / "results.md"
    said = run("gpu.py", f"part={part}", "size=tiny", "steps=3", f"results={file}")
    assert "| | " in said and file.read_text().startswith("# Results")
    assert "out of memory" not in said
