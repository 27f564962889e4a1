"""The benchmarks run: both sides of a comparison, and the script for a GPU on the miniatures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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


@pytest.mark.slow
def test_the_script_for_gpus_works_on_the_miniatures(tmp_path):
    words = ("size=tiny", "lora_size=tiny", f"out={tmp_path}", f"results={tmp_path / 'results.md'}")
    said = run("h200.py", *words, "parts=kernels,chat_full,peer", "budget_s=110")
    rows = [json.loads(line) for line in (tmp_path / "h200.jsonl").read_text().splitlines()]
    by_name = {row["row"]: row for row in rows}
    assert not any("failed" in row for row in rows), rows
    assert by_name["chat, tiny"]["tokens_per_second"] > 0
    assert "left_out" in by_name["peer"], "what takes longer than is left is not begun"
    assert (tmp_path / "results.md").read_text().startswith("# Results") and "| copy |" in said


@pytest.mark.slow
def test_every_part_of_the_script_for_gpus_works_on_the_miniatures(tmp_path):
    words = ("size=tiny", "lora_size=tiny", f"out={tmp_path}", f"results={tmp_path / 'results.md'}")
    parts = "chat_selective,chat_compiled,release,connectors,answers,align,lora,peer,program"
    run("h200.py", *words, f"parts={parts}", "budget_s=3000")
    rows = [json.loads(line) for line in (tmp_path / "h200.jsonl").read_text().splitlines()]
    assert not any("failed" in row or "left_out" in row for row in rows), rows
    assert all(row.get("exit_code", 0) == 0 for row in rows), rows


def test_a_part_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_rows
    import h200

    def fail() -> None:
        raise ValueError("the reason")

    log = gpu_rows.RunLog(tmp_path, time.monotonic(), 60)
    h200.run_part(log, "first", h200.Part(fail, 1))
    h200.run_part(log, "second", h200.Part(lambda: log.write_row("done"), 1))
    assert "the reason" in log.rows[0]["failed"] and log.rows[1]["row"] == "done"


def test_what_an_image_with_torch_lacks_follows_from_what_packages_ask_for(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import fetch_wheels

    present = fetch_wheels.read_package_list(FOLDER / "torch_image_packages.txt")
    wanted = fetch_wheels.missing_packages(fetch_wheels.project_requirements(), present, "3.12")
    assert {"open-clip-torch", "omegaconf", "webdataset", "pydantic", "braceexpand"} <= set(wanted)
    assert not set(wanted) & {"torch", "numpy", "transformers", "colorama"}
    alone = fetch_wheels.missing_packages(["omegaconf>=2"], {"pyyaml"}, "3.12")
    assert set(alone) == {"omegaconf"}
