"""The training module's arithmetic."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.data.scene_world import scene
from vlbench.train.module import learning_rate_factor


def test_the_rate_rises_to_its_peak_then_falls_to_nothing() -> None:
    factors = [learning_rate_factor(n, 100, 0.03, "cosine") for n in range(101)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[3] == 1.0
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[100] == pytest.approx(0.0)
    assert factors[51] == pytest.approx(0.5, abs=0.01)


def test_a_constant_schedule_stays_at_its_peak_after_the_warm_up() -> None:
    factors = [learning_rate_factor(n, 10, 0.2, "constant") for n in range(10)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, 10, 0.0, "cosine") == 1.0


def test_a_connectors_own_loss_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch) -> None:
    """The gradient of a step is that of the global batch, however its samples are packed."""
    monkeypatch.chdir(tmp_path)
    records = []
    for number, pictures in enumerate(([1, 2, 3], [4], [], [5])):
        for one in pictures:
            scene("module", 0, one).open().save(f"{one}.png")
        tags = "<image>\n" * len(pictures)
        turns = [{"from": "human", "value": f"{tags}What?"}, {"from": "gpt", "value": "One."}]
        images = [f"{one}.png" for one in pictures]
        records.append({"id": f"r{number}", "image": images, "conversations": turns})
    Path("data.json").write_text(json.dumps(records))
    norms = []
    for rows in (16, 100_000):
        words = ["recipe=yivl_eva", "only=chat", "stages.chat.steps=1", f"run=rows{rows}"]
        words += ["stages.chat.batch=4", f"stages.chat.row_tokens={rows}", "log.questions=2"]
        words += ["data.train=data.json", "data.images=."]
        assert main(["fit", *words, "log.every=1", "log.examples=0", "log.tensorboard=false"]) == 0
        with (tmp_path / f"rows{rows}" / "metrics.csv").open() as file:
            norms.append([float(row["grad_norm"]) for row in csv.DictReader(file)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
