"""The training module's arithmetic."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from kept_gradients import KeptGradients
from random_vlm import make_batch, make_sample, small_vlm
from test_vlm import assert_same
from torch.utils.data import DataLoader

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.config.stage_schema import PartTrainConfig
from vlbench.connector import registry
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.scene_world import make_scene
from vlbench.errors import UserError
from vlbench.train.lr_schedule import learning_rate_factor
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule


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


class Uncounted(registry.load_connector("linear")):
    """A connector with a loss, a mean over images, that no `loss_counts` tells of."""

    def losses(self, features, visual, batch):
        pictures = len(batch.pixels)
        sums = (visual.flatten(1).square().mean(1)[:pictures]).sum()
        return {"small": (sums, torch.tensor(pictures))}


def test_a_loss_that_is_not_counted_ahead_does_not_depend_on_the_micro_batches() -> None:
    samples = [
        make_sample(1, images=3),
        make_sample(2, images=0),
        make_sample(3),
        make_sample(4, words=9),
        make_sample(5),
    ]
    found = []
    for rows in ([samples], [[one] for one in samples], [samples[:2], samples[2:]]):
        vlm = small_vlm(Uncounted).to(torch.float64)
        stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["align_224"]
        stage = stage.model_copy(
            update={"train": {"connector": PartTrainConfig(lr=1e-9)}, "grad_clip": None}
        )
        freeze_untrained_parts(vlm.model, stage)
        step = OptimizerStep(0, [make_batch(vlm, [row]).to("cpu", torch.float64) for row in rows])
        training = VLMTrainingModule(vlm.model, stage, 1, 0, seed=3)
        kept = KeptGradients()
        trainer = pl.Trainer(accelerator="cpu", max_steps=1, barebones=True, callbacks=[kept])
        trainer.fit(training, DataLoader([step], batch_size=None))
        assert kept.gradients.keys() == {f"connector.{n}" for n in vlm.connector.state_dict()}
        found.append((training.report.extra["small"], kept.gradients))
    assert_same(found[0], found[1], 1e-9)
    assert_same(found[0], found[2], 1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_leaves_no_gradients_and_no_moments_and_moves_nothing(fails, monkeypatch) -> None:
    """Its last checkpoint is written by then; Lightning would move everything to the host."""
    vlm = small_vlm(registry.load_connector("linear"))
    stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["align_224"]
    freeze_untrained_parts(vlm.model, stage)
    steps = [OptimizerStep(n, [make_batch(vlm, [[make_sample(n)]])]) for n in range(2)]
    training = VLMTrainingModule(vlm.model, stage, 2, 0, seed=3)
    moves: list[str] = []
    found: list[tuple[int, bool]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_: object) -> None:
            if fails:
                raise UserError("the step fails")

        def on_exception(self, trainer, pl_module, exception) -> None:
            self.on_train_end(trainer, pl_module)

        def on_train_end(self, trainer, pl_module) -> None:
            has_gradients = any(p.grad is not None for p in vlm.parameters())
            found.append((len(trainer.optimizers[0].state), has_gradients))
            real = torch.nn.Module._apply
            monkeypatch.setattr(
                torch.nn.Module,
                "_apply",  # what `to`, `cpu`, `cuda` and the like go through
                lambda self, *given: moves.append(type(self).__name__) or real(self, *given),
            )

    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[Watch()])
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        trainer.fit(training, DataLoader(steps, batch_size=None))
    assert found == [(sum(p.requires_grad for p in vlm.parameters()), True)]
    assert not trainer.optimizers[0].state and not moves
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_a_connectors_own_loss_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch) -> None:
    """The gradient of a step is that of the global batch, however its samples are packed."""
    monkeypatch.chdir(tmp_path)
    records = []
    for number, pictures in enumerate(([1, 2, 3], [4], [], [5])):
        for one in pictures:
            make_scene("module", 0, one).open().save(f"{one}.png")
        tags = "<image>\n" * len(pictures)
        turns = [{"from": "human", "value": f"{tags}What?"}, {"from": "gpt", "value": "One."}]
        images = [f"{one}.png" for one in pictures]
        records.append({"id": f"r{number}", "image": images, "conversations": turns})
    Path("data.json").write_text(json.dumps(records))
    norms = []
    for rows in (16, 100_000):
        words = ["recipe=yivl_eva", "only=chat", "stages.chat.steps=1", f"run=rows{rows}"]
        words += [
            "stages.chat.global_batch_size=4",
            f"stages.chat.max_tokens_per_row={rows}",
            "log.questions=2",
        ]
        words += ["data.train=data.json", "data.images=."]
        assert (
            main(["fit", *words, "log.every_n_steps=1", "log.examples=0", "log.tensorboard=false"])
            == 0
        )
        with (tmp_path / f"rows{rows}" / "metrics.csv").open() as file:
            norms.append([float(row["grad_norm"]) for row in csv.DictReader(file)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
