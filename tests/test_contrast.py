"""Pairs are compared with those of the global batch, however it is packed and shared out."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from several import QUIET, TWO, Job, do, in_two
from small import SMALL, batch_of, sample, small_vlm
from test_vlm import assert_same
from torch import Tensor
from torch.utils.data import DataLoader

from vlbench import plugins
from vlbench import recipe as recipes
from vlbench.data.batch import Batch
from vlbench.data.steps import Step
from vlbench.model import blip2
from vlbench.model.vlm import VLM
from vlbench.schema import Train
from vlbench.train.module import StepReport, Training, freeze

PAIRS = 32
PACKINGS = {
    "4 x 8": [list(range(first, first + 8)) for first in range(0, PAIRS, 8)],
    "32 x 1": [[number] for number in range(PAIRS)],
    "unlike, in another order": [
        [31],
        list(range(30, 14, -1)),
        [0, 5, 3],
        [1, 2, 4, *range(6, 15)],
    ],
}


def prepared(vision: bool = False) -> VLM:
    """Return the small model in BLIP-2's first stage, in float64; its tower learns if `vision`."""
    qformer = plugins.connector("qformer")
    vlm = small_vlm(qformer, {**SMALL["qformer"], "text": "embedded", "itc_width": 8})
    torch.manual_seed(5)
    freeze(vlm, stage_of(vision))
    vlm.connector.text.temp.data.fill_(0.3)  # small random weights: draws differ all the same
    return vlm.double()


def stage_of(vision: bool):
    """Return the stage, without clipping; rates that change nothing."""
    stage = recipes.load(["recipe=yivl_blip2"]).stages["blip2"]
    stage.train["connector"] = Train(lr=1e-9)
    if vision:
        stage.train["vision"] = Train(lr=1e-9)
    return stage


def step(vlm: VLM, packing: Sequence[Sequence[int]]) -> Step:
    """Return one step over 32 pairs, in rows of the given numbers of samples."""
    rows = [[sample(number, words=number % 7) for number in row] for row in packing]
    return Step(0, [batch_of(vlm, [row]).to("cpu", torch.float64) for row in rows])


def learned(packing: Sequence[Sequence[int]], vision: bool) -> tuple[StepReport, dict[str, Tensor]]:
    """Return what a training step tells and its gradients."""
    vlm = prepared(vision)
    training = Training(vlm, stage_of(vision), 1, 0, seed=3)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, barebones=True)
    trainer.fit(training, DataLoader([step(vlm, packing)], batch_size=None))
    grads = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
    return training.report, grads


@pytest.fixture(scope="module", params=[False, True], ids=["frozen tower", "trained tower"])
def whole(request) -> tuple[bool, StepReport, dict[str, Tensor]]:
    """The step of one micro-batch with all pairs, as the reference takes it."""
    return request.param, *learned([list(range(PAIRS))], request.param)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_is_the_same_however_it_is_packed(packing, whole):
    vision, report, grads = whole
    found, other = learned(PACKINGS[packing], vision)
    assert found.extra == pytest.approx(report.extra, rel=1e-9)
    assert report.extra["itc"] > 3 and found.loss == pytest.approx(report.loss, rel=1e-9)
    assert (
        "connector.text.temp" in grads
        and any(name.startswith("vision.") for name in grads) == vision
    )
    assert_same((report.loss, grads), (found.loss, other), 1e-9)
