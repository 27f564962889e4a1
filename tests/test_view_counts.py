"""Images and their views are counted apart: planned, loaded, timed, and in what people read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_batch_sampler import ENCODER, TRANSFORM, steps

from vlbench.check.check_command import _view_lines
from vlbench.check.sample_checks import StageCheck
from vlbench.compare.report.row_costs import cost_table
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.view_layout import ViewLayout, ViewSettings
from vlbench.train.run_report import show_truncation
from vlbench.train.step_report import StepReport
from vlbench.train.throughput import ThroughputMeter, format_throughput
from vlbench.train.view_report import show_views

VIEWS = 3  # of an image: a thumbnail and two tiles


def tiled_steps(max_visual_tokens: int | None = None) -> StepDataset:
    """Return steps whose images have three views, unless that is more than a sample may have."""
    settings = ViewSettings(ImageTiling(2), "none", max_visual_tokens=max_visual_tokens)
    layout = ViewLayout(settings, TRANSFORM.crop, ENCODER.tokens_per_image, (2, 2))
    return steps(
        encoder=replace(ENCODER, view_layout=layout),
        image_transform=replace(TRANSFORM, tiling=settings.tiling),
    )


@pytest.mark.parametrize(("made", "views"), [(steps(), 1), (tiled_steps(), VIEWS)])
def test_a_step_counts_images_and_views_before_and_after_it_is_loaded(made, views):
    images = sum(len(made.mixture[position].images) for position in range(12, 24))
    rows, loaded = made.plan_step(1).rows, made[1]
    assert sum(row.image_count for row in rows) == images > 0
    assert sum(row.view_count for row in rows) == views * images
    assert (loaded.counts.images, loaded.counts.views) == (images, views * images)
    loaded.micro_batches = [batch.without_tensors() for batch in loaded.micro_batches]
    assert (loaded.counts.images, loaded.counts.views) == (images, views * images)


@pytest.mark.parametrize(
    ("views", "said"), [(8, "0.8 images/s, data"), (40, "0.8 images/s, 4.0 views/s,")]
)
def test_speed_is_told_of_images_and_of_views_where_they_differ(views, said, monkeypatch):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("vlbench.train.throughput.time.monotonic", lambda: now.time)
    report = StepReport(1, tokens=500, images=8, views=views)
    device = torch.device("cpu")
    training: Any = SimpleNamespace(report=report, data_wait_seconds=0.0, device=device, flops=None)
    meter = ThroughputMeter()
    meter.start_measuring(training)
    now.time = 10.0
    meter.count_step(training, SimpleNamespace(micro_batches=[]))
    row = meter.read_and_reset()
    assert (row["images_per_second"], row["views_per_second"]) == (0.8, views / 10)
    assert said in format_throughput(row)


def test_the_cost_table_has_views_where_a_row_is_tiled():
    def labels(*budgets: dict[str, int]) -> list[str]:
        rows: Any = [
            SimpleNamespace(budget=budget, runs=[], mean_result=lambda key: None)
            for budget in budgets
        ]
        return [label for label, _ in cost_table(rows)]

    plain, tiled = {"images": 7, "views": 7}, {"images": 7, "views": 21}
    assert labels(plain, plain) == ["images seen in training"]
    assert labels(plain, tiled) == ["images seen in training", "views of these images"]
    assert labels({"samples": 4}) == ["samples seen in training"]  # an older run


def test_reduced_samples_are_told_in_the_same_words_everywhere(capsys):
    made = tiled_steps(max_visual_tokens=15)  # a sample of two images has 24
    show_views(made)
    begun = capsys.readouterr().out
    check = StageCheck("chat", "world", made.encoder)
    for position in range(40):
        assert list(check.check_sample(made.mixture[position])) == []
    checked = "\n".join(_view_lines(check))
    seen = {"samples": 40, "reduced_samples": check.reduced_samples}
    show_truncation("chat", {}, seen)
    ended = capsys.readouterr().err
    sentence = f"{check.reduced_samples} of 40 samples have fewer tiles than they could, for "
    assert 0 < check.reduced_samples < 40
    for said in (begun, checked, ended):
        assert f"{sentence}vision.max_visual_tokens" in said
