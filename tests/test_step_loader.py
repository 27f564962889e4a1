"""The loader of packed rows: what it keeps in memory, and samples that are lost on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from kept_gradients import KeptGradients
from PIL import Image
from random_vlm import make_batch, make_sample, small_vlm
from test_batch_sampler import ENCODER, MixedSource, steps
from test_vlm import assert_same

from vlbench.config import recipe as recipes
from vlbench.config.stage_schema import PartTrainConfig
from vlbench.connector import registry
from vlbench.data.image_processing import ImageTransform
from vlbench.data.optimizer_step import LoadedRow, RowPlan, StepPlan
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.shuffle import SourceMixture
from vlbench.data.step_loader import PREFETCHED_ROWS, StepLoader
from vlbench.errors import BadSample
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule

WORKERS = 2
GLOBAL_BATCH = 4096  # of align_448
SAMPLE_TEXT = "A red circle on a table. " * 8


@dataclass(frozen=True)
class CountedImage:
    """An image that notes in a file that it is opened, in whichever process."""

    number: int
    opened: str

    @property
    def name(self) -> str:
        return f"counted {self.number}"

    def open(self) -> Image.Image:
        with Path(self.opened).open("a") as file:
            os.write(file.fileno(), b".")
        return Image.new("RGB", (8, 6), (self.number % 256, 9, 200))


class Captions:
    """One image and a caption each."""

    name = "captions"

    def __init__(self, opened: Path) -> None:
        self.opened = str(opened)

    def __len__(self) -> int:
        return GLOBAL_BATCH

    def __getitem__(self, index: int) -> Sample:
        turns = (ChatTurn("human", IMAGE_PLACEHOLDER), ChatTurn("assistant", SAMPLE_TEXT))
        return Sample(f"s{index}", turns, (CountedImage(index, self.opened),))


def test_a_step_of_4096_images_at_448_pixels_takes_little_memory_on_its_way(tmp_path):
    """Whole steps were 158 GB: 9.9 GB of float32 pixels, for 8 workers twice."""
    opened = tmp_path / "opened"
    opened.touch()
    data = steps(
        mixture=SourceMixture([(Captions(opened), 1.0)], 0),
        encoder=replace(ENCODER, tokens_per_image=1024, sample_format="caption"),
        image_transform=ImageTransform(448, 448, (0.5,) * 3, (0.25,) * 3),
        global_batch_size=GLOBAL_BATCH,
        max_tokens_per_row=16384,
        total_steps=2,
    )
    loader = StepLoader(steps=data, step_numbers=[0], num_workers=WORKERS)
    step = next(iter(loader))
    assert step.counts.images == GLOBAL_BATCH
    micro_batches = step.take_micro_batches()
    batch = next(micro_batches)
    images = len(batch.pixels)
    row_bytes = sum(v.nbytes for v in vars(batch).values() if isinstance(v, torch.Tensor))
    for _ in range(2):
        next(micro_batches)
    time.sleep(0.5)  # in which workers would go on, if nothing held them back
    rows_opened = opened.stat().st_size / images
    assert rows_opened <= 3 + PREFETCHED_ROWS * WORKERS + 1
    assert batch.pixels.dtype == torch.uint8 and images >= 12
    in_flight = row_bytes * (PREFETCHED_ROWS * 8 + 1)  # 8 workers, and the one that is taken
    assert in_flight < 0.25e9  # of 12 GB that are allowed, for all 8 ranks of a node 2 GB
    assert not any(len(done.input_ids) for done in step.micro_batches)  # names and counts stay


def test_steps_that_are_not_taken_are_passed_over():
    data = steps(source=MixedSource(missing=(4,)))
    taken = []
    for step in StepLoader(steps=data, step_numbers=range(5), num_workers=1):
        if step.index in (1, 4):
            step.load_micro_batches()
            taken.append((step.index, step.counts))
    assert taken == [(index, data[index].counts) for index in (1, 4)]


class LosingSteps:
    """One step of two rows; images of some samples are found broken when they are opened."""

    def __init__(self, vlm: Any, rows: list[list[Sample]], lost: Collection[str]) -> None:
        self.vlm, self.rows, self.lost = vlm, rows, lost

    def __len__(self) -> int:
        return 1

    def plan_step(self, index: int) -> StepPlan:
        batches = [make_batch(self.vlm, [row]) for row in self.rows]
        rows = [
            RowPlan([n], b.sample_lengths[0], b.image_count, b.view_count, b.supervised_token_count)
            for n, b in enumerate(batches)
        ]
        return StepPlan(index, rows)

    def load_row(self, row: RowPlan) -> LoadedRow:
        samples = self.rows[row.stream_index[0]]
        good = [sample for sample in samples if sample.id not in self.lost]
        bad = [BadSample(each.id, "is torn") for each in samples if each not in good]
        batch = make_batch(self.vlm, [good]).to("cpu", torch.float64) if good else None
        return LoadedRow(batch, bad)


def trained(
    rows: list[list[Sample]], lost: frozenset[str] | set[str] = frozenset()
) -> tuple[Any, Any]:
    """Return the report of a step and the gradients of its connector."""
    vlm = small_vlm(registry.load_connector("linear")).to(torch.float64)
    stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["align_224"]
    stage = stage.model_copy(
        update={"train": {"connector": PartTrainConfig(lr=1e-9)}, "grad_clip": None}
    )
    freeze_untrained_parts(vlm.model, stage)
    training = VLMTrainingModule(vlm.model, stage, 1, 0, seed=3)
    loader = StepLoader(steps=LosingSteps(vlm, rows, lost), step_numbers=[0])
    kept = KeptGradients()
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, barebones=True, callbacks=[kept])
    trainer.fit(training, loader)
    return training.report, kept.gradients


def test_a_sample_that_is_lost_on_loading_counts_nowhere():
    """The loss was to be divided by its tokens as well: the step is as if it had not been there."""
    one, two, three = make_sample(1), make_sample(2, words=9), make_sample(3, images=2)
    report, grads = trained([[one, two], [three]], {"s2"})
    expected, expected_grads = trained([[one], [three]])
    assert (report.samples, report.tokens, report.supervised_tokens, report.images) == (
        *(expected.samples, expected.tokens, expected.supervised_tokens, expected.images),
    )
    assert_same((report.loss, grads), (expected.loss, expected_grads), 1e-6)
    report, grads = trained([[one, two], [three]], {"s3"})  # a whole row
    expected, expected_grads = trained([[one, two]])
    assert_same((report.loss, grads), (expected.loss, expected_grads), 1e-6)
    report, grads = trained([[one], [three]], {"s1", "s3"})
    assert report.samples == 0 and not grads
