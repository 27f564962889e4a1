"""Training on a GPU: compiled as eager, one kernel as many calls, a resumed run as a whole one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from test_fit import SHORT, last_of

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.model.build_vlm import build_vlm
from vlbench.train.callbacks import StageCallback
from vlbench.train.stage_plan import build_stage_steps, plan_stage_runs
from vlbench.train.stage_runner import StageRunner
from vlbench.train.training_module import VLMTrainingModule

pytestmark = pytest.mark.gpu
STEPS = 4
WORDS = ["recipe=yivl_llava", "stages.chat.global_batch_size=4"]


class LossNotes(StageCallback):
    """Note the loss and the gradient's norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_end(self, training: VLMTrainingModule, step: OptimizerStep) -> None:
        assert training.device.type == "cuda"
        self.losses.append(training.report.loss)
        self.norms.append(float(training.report.grad_norm))


def train(*words: str, precision: str = "bf16") -> LossNotes:
    """Train some steps of the last stage on the miniatures."""
    recipe = recipes.load_recipe([*WORDS, f"precision={precision}", *words])
    stage_run = plan_stage_runs(recipe.selected_data, recipe.last_stage_data)[-1]
    vlm = build_vlm(recipe.model, stage_run.stage.image_size)
    steps, notes = build_stage_steps(vlm.processor, stage_run), LossNotes()
    runner = StageRunner.from_recipe(recipe)
    with runner.prepare_stage(vlm.model, stage_run.stage):
        runner.set_activation_checkpointing(vlm.model, steps)
        runner.train_stage(vlm.model, "chat", stage_run.stage, steps, STEPS, callbacks=[notes])
    return notes


@pytest.fixture(scope="module")
def eager() -> LossNotes:
    return train()


def assert_alike(notes: LossNotes, other: LossNotes) -> None:
    assert len(notes.losses) == STEPS and all(map(math.isfinite, notes.losses + notes.norms))
    assert notes.losses == pytest.approx(other.losses, rel=2e-2)
    assert notes.norms == pytest.approx(other.norms, rel=0.1)


@pytest.mark.parametrize(
    "words",
    [
        ("activation_checkpointing=selective",),
        ("activation_checkpointing=full",),
        ("activation_checkpointing=auto",),
        ("trainer.compile=true",),
        ("trainer.compile=true", "activation_checkpointing=selective"),
    ],
)
def test_losses_are_finite_and_those_of_eager_steps(words, eager):
    assert_alike(train(*words), eager)


def test_losses_in_16_bits_are_close_to_those_in_32(eager):
    assert_alike(train(precision="32"), eager)


def test_attention_in_one_call_is_that_of_a_call_per_sample(eager, monkeypatch):
    monkeypatch.setattr("vlbench.model.packed_attention.find_varlen_attention", lambda: None)
    assert_alike(train(), eager)


def test_a_resumed_run_ends_as_a_whole_one(tmp_path: Path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    words = [*SHORT, "precision=bf16"]
    assert main([*words, f"run={whole}"]) == 0
    shutil.copytree(whole, resumed)
    shutil.rmtree(last_of(resumed))
    (resumed / "results.json").unlink()
    assert main([*words, f"run={resumed}"]) == 0
    rows = [
        [line.split(",")[:3] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
        for run in (whole, resumed)
    ]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    losses = [[float(row[2]) for row in table] for table in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert torch.cuda.max_memory_allocated() > 0
