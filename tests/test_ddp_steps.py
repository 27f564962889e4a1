"""Steps of two processes under DDP: where gradients lie, and losses that one process lacks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked_processes import run_in_processes
from random_vlm import make_batch, make_sample, small_vlm
from torch.utils.data import DataLoader

from vlbench.config import recipe as recipes
from vlbench.config.schema import TrainerConfig
from vlbench.config.stage_schema import PartTrainConfig, StageConfig
from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.sample import Sample
from vlbench.model.vlm import VLM
from vlbench.train.lightning_trainer import build_trainer
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule

ROWS = [[make_sample(1), make_sample(2)], [make_sample(3), make_sample(4)]]
"""Of each process: two micro-batches of one sample."""
Pointers = list[int]


class LossOfImages(registry.load_connector("linear")):  # type: ignore[misc]
    """A connector with a loss that micro-batches without an image do not have."""

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        return {"small": len(batch.pixels)}

    def losses(self, features: Any, visual: Any, batch: Any) -> dict[str, Any]:
        count = len(batch.pixels)
        if not count:
            return {}
        return {"small": (visual.flatten(1).square().mean(1).sum(), torch.tensor(count))}


def prepare_stage(vlm: VLM) -> StageConfig:
    """Return a stage that trains the connector of a model, which is prepared for it."""
    stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["align_224"]
    parts = {"connector": PartTrainConfig(lr=1e-3)}
    stage = stage.model_copy(update={"train": parts, "grad_clip": None})
    freeze_untrained_parts(vlm, stage)
    return stage


def train(
    rank: int,
    rows: Sequence[Sequence[Sample]],
    connector: type[Connector],
    steps: int = 1,
    watch: Callable[[VLM], None] = lambda vlm: None,
) -> VLMTrainingModule:
    """Train the connector as one of two processes; each step has the same samples."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.manual_seed(0)
    vlm = small_vlm(connector)
    stage = prepare_stage(vlm.model)
    loaded = [
        OptimizerStep(number, [make_batch(vlm, [[sample]]) for sample in rows[rank]])
        for number in range(steps)
    ]
    watch(vlm.model)
    training = VLMTrainingModule(vlm.model, stage, steps, 0, seed=3)
    trainer = build_trainer(TrainerConfig(accelerator="cpu", devices=2, strategy="ddp"), "32")
    trainer.fit(training, DataLoader(loaded, batch_size=None))
    return training


@pytest.mark.parametrize("bad_step", [None, 1])
def test_gradients_lie_in_ddps_buckets_while_they_are_added_up(bad_step):
    """Beside them they would take 4 bytes more for every number that is trained."""

    def find_addresses(rank: int) -> tuple[list[Pointers], list[float]]:
        before, losses = [], []

        def watch(vlm: VLM) -> None:
            def note(*_: Any) -> None:
                trained = [p for p in vlm.parameters() if p.requires_grad]
                before.append([0 if p.grad is None else p.grad.data_ptr() for p in trained])

            def spoil(_: Any, __: Any, output: Any) -> None:
                losses.append(float(output.loss_sum))
                if bad_step is not None and (len(before) - 1) // 2 == bad_step:
                    output.loss_sum = output.loss_sum * math.nan

            vlm.register_forward_pre_hook(note)
            vlm.register_forward_hook(spoil)

        train(rank, ROWS, registry.load_connector("linear"), 4, watch)
        return before, losses

    for before, losses in run_in_processes(find_addresses):
        assert len(before) == 8 and all(before[0])  # two micro-batches in each of four steps
        assert before == [before[0]] * 8
        # a step that is not finite changes nothing
        assert (losses[4:6] == losses[2:4]) == (bad_step == 1)


def test_a_loss_that_one_process_lacks_is_that_of_the_others():
    def find_losses(rank: int) -> tuple[dict[str, float], float]:
        text = [make_sample(3, images=0), make_sample(4, images=0)]
        report = train(rank, [ROWS[0], text], LossOfImages).report
        return report.extra, report.loss

    first, second = run_in_processes(find_losses)
    assert first == second
    assert first[0].keys() == {"small"} and first[0]["small"] > 0


def test_two_processes_update_as_one_does():
    def find_weights(rank: int) -> list[list[float]]:
        trained = train(rank, ROWS, LossOfImages, 3).vlm.connector.parameters()
        return [parameter.flatten().tolist() for parameter in trained]

    first, second = run_in_processes(find_weights)
    alone = small_vlm_trained_alone()
    for one, other, expected in zip(first, second, alone, strict=True):
        assert one == other
        assert torch.allclose(torch.tensor(one), expected, rtol=1e-3, atol=1e-5)


def small_vlm_trained_alone() -> list[torch.Tensor]:
    """Return the weights that one process learns from the samples of both."""
    torch.manual_seed(0)
    vlm = small_vlm(LossOfImages)
    stage = prepare_stage(vlm.model)
    samples = [sample for rows in ROWS for sample in rows]
    loaded = [OptimizerStep(n, [make_batch(vlm, [[one]]) for one in samples]) for n in range(3)]
    training = VLMTrainingModule(vlm.model, stage, 3, 0, seed=3)
    pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True).fit(
        training, DataLoader(loaded, batch_size=None)
    )
    return [p.detach().flatten() for p in vlm.connector.parameters()]
