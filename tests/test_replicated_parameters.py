"""Scalars of a connector, which FSDP2 refuses, and what is smaller than the number of processes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor
from two_process_commands import QUIET, TWO, FitCommand, run_fit_command, run_in_two_processes

from vlbench.model.weights.tensor_files import read_tensors

CONNECTOR = """import torch
from torch import nn
from vlbench.connector import Connector


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.open = nn.Parameter(torch.tensor(0.5))

    def forward(self, tokens):
        return tokens * self.open.tanh()


class Gated(Connector):
    def __init__(self, shapes):
        super().__init__()
        self.tokens_per_image = shapes.patches
        width = shapes.lm_width
        self.proj = nn.Linear(shapes.vision_width, width)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.zeros(1))
        pairs = [nn.ModuleList([nn.Linear(width, width), Gate()]) for _ in range(2)]
        self.layers = nn.ModuleList(pairs)

    def forward(self, features):
        tokens = self.proj(features) * self.scale + self.shift
        for linear, gate in self.layers:
            tokens = tokens + gate(linear(tokens))
        return tokens
"""
WAYS = {
    "alone": (),
    "ddp": (TWO, "trainer.strategy=ddp"),
    "fsdp2": (TWO, "trainer.strategy=fsdp2"),
}
STEPS, STOP = 6, 3
CHANGES = [("fsdp2", "fsdp2"), ("fsdp2", "alone"), ("alone", "fsdp2"), ("alone", "alone")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Work in a folder with the connector, which other processes find there as well."""
    path = tmp_path_factory.mktemp("gated")
    (path / "connectors").mkdir()
    (path / "connectors/gated.py").write_text(CONNECTOR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


def job(run: str, way: str, stop: int, double: bool = False) -> FitCommand:
    """Return a run of which every step is clipped."""
    chat = (
        "steps=6",
        "global_batch_size=4",
        "image_size=56",
        "grad_clip=0.05",
        "train.vision=null",
    )
    return FitCommand(
        (
            "recipe=yivl_llava",
            "connector.name=gated",
            "only=chat",
            *(f"stages.chat.{one}" for one in chat),
            "data.workers=0",
            *QUIET,
            f"run={run}",
            *WAYS[way],
        ),
        stop,
        double,
    )


def saved(run: Path) -> dict[str, Tensor]:
    """Return what the newest checkpoint holds of the connector, its optimizer included."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return {
        name: value
        for file in (newest / "model.safetensors", newest / "optimizer/model.safetensors")
        for name, value in read_tensors(file)
        if "connector." in name
    }


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def trained(folder):
    """Run in float64 by every way, and in float32 stopped by one way and ended by another."""
    begin = [(job("-".join(one), one[0], STOP), one[0]) for one in CHANGES]
    end = [(job("-".join(one), one[1], STEPS), one[1]) for one in CHANGES]
    whole = [(job(way, way, STEPS, double=True), way) for way in WAYS]
    assert {run_fit_command(one) for one, way in whole + begin if way == "alone"} == {130}
    both = [one for one, way in whole + begin + end if way != "alone"]
    assert run_in_two_processes(both) == [(130, 130)] * len(both)
    assert {run_fit_command(one) for one, way in end if way == "alone"} == {130}
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_scalars_learn_as_in_one_process(way, trained):
    for name in ("loss", "grad_norm"):
        alone, together = column(trained / "alone", name), column(trained / way, name)
        assert len(alone) == STEPS and together == pytest.approx(alone, rel=1e-9)
    assert min(column(trained / "alone", "grad_norm")) > 0.05  # so that all are clipped
    alone, together = saved(trained / "alone"), saved(trained / way)
    assert {"connector.scale", "exp_avg.connector.layers.0.1.open"} <= alone.keys()
    assert alone["connector.scale"].shape == () and float(alone["connector.scale"]) != 1.0
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES[:-1], ids=" to ".join)
def test_a_run_with_scalars_goes_on(change, trained):
    alone, other = trained / "alone-alone", trained / "-".join(change)
    assert column(other, "loss") == pytest.approx(column(alone, "loss"), rel=1e-4)
    assert column(other, "grad_norm") == pytest.approx(column(alone, "grad_norm"), rel=1e-3)
    for name, value in saved(alone).items():
        torch.testing.assert_close(saved(other)[name], value, rtol=1e-2, atol=1e-4, msg=name)
