"""A step is a pure function of (seed, step, rank, world size), in any process."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlbench.data.batch_sampler import StepDataset
from vlbench.data.chat_template import YI_VL
from vlbench.data.image_processing import ImageFile, ImageTransform
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import SampleEncoder
from vlbench.data.shuffle import SourceMixture
from vlbench.data.step_loader import StepLoader
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import BadSample

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
ENCODER = SampleEncoder(
    Tokenizer.load(GOLDEN / "checkpoint"), YI_VL, tokens_per_image=4, max_length=4096
)
TRANSFORM = ImageTransform(16, 16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
OPENED: list[int] = []


@dataclass(frozen=True)
class PlainImage:
    """An image in one colour, which records when it is opened."""

    number: int

    @property
    def name(self) -> str:
        return f"plain {self.number}"

    def open(self) -> Image.Image:
        OPENED.append(self.number)
        return Image.new("RGB", (9, 7), (self.number * 7 % 256, 9, 200))


class MixedSource:
    """Samples with one or two images, every fifth with none; those in `bad` raise BadSample."""

    name = "world"

    def __init__(self, count: int = 40, bad: tuple[int, ...] = (), missing: tuple[int, ...] = ()):
        self.count, self.bad, self.missing = count, bad, missing

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(f"s{index}", "is broken")
        images = 0 if index % 5 == 0 else 1 + index % 2
        question = IMAGE_PLACEHOLDER * images + "\nWhat is it? " * (1 + index % 4)
        turns = (ChatTurn("human", question), ChatTurn("assistant", f"It is number {index}."))
        gone = ImageFile("gone.png")
        pictures = tuple(
            gone if index in self.missing else PlainImage(index // 2) for _ in range(images)
        )
        return Sample(f"s{index}", turns, pictures)


def steps(seed: int = 0, source: MixedSource | None = None, **changes) -> StepDataset:
    settings = {
        "mixture": SourceMixture([(source or MixedSource(), 1.0)], seed),
        "encoder": ENCODER,
        "image_transform": TRANSFORM,
        "global_batch_size": 12,
        "max_tokens_per_row": 400,
        "total_steps": 9,
    }
    return StepDataset(**{**settings, **changes})


def same_batch(one: PackedBatch, two: PackedBatch) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(PackedBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def same(one: OptimizerStep, two: OptimizerStep) -> bool:
    batches = zip(one.micro_batches, two.micro_batches, strict=True)
    return (
        all(same_batch(a, b) for a, b in batches)
        and (one.index, one.counts, one.skipped_samples)
        == (two.index, two.counts, two.skipped_samples)
        and [str(bad) for bad in one.bad_samples] == [str(bad) for bad in two.bad_samples]
    )


def names(step: OptimizerStep) -> list[str]:
    return sorted(name.split()[0] for batch in step.micro_batches for name in batch.sample_ids)


def test_a_step_is_the_same_from_anyone():
    data = steps(source=MixedSource(bad=(3,), missing=(4,)))
    first = [data[index] for index in range(9)]
    fresh, copy = (
        steps(source=MixedSource(bad=(3,), missing=(4,))),
        pickle.loads(pickle.dumps(data)),
    )
    for index in reversed(range(9)):
        assert same(first[index], data[index])
        assert same(first[index], fresh[index]) and same(first[index], copy[index])
    assert sum(len(step.bad_samples) for step in first) >= 4
    assert not same(first[0], first[1]) and not same(first[0], steps(seed=1)[0])


def test_workers_make_the_same_steps_from_any_start():
    data = steps(source=MixedSource(bad=(3,), missing=(4,)))
    for workers, numbers in ((0, range(9)), (1, [6, 2]), (2, range(4, 9))):
        loader = StepLoader(steps=data, step_numbers=numbers, num_workers=workers)
        for index, step in zip(numbers, loader, strict=True):
            planned = step.counts
            step.load_micro_batches()
            assert same(step, data[index])
            lost = len(data.plan_step(index).bad_samples) < len(step.bad_samples)
            assert lost == (planned.supervised_tokens > step.counts.supervised_tokens)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_a_step(world):
    whole = steps(source=MixedSource(bad=(3,), missing=(4,)))
    for index in range(4):
        made = [replace(whole, rank=rank, world_size=world)[index] for rank in range(world)]
        assert sorted(n for step in made for n in names(step)) == names(whole[index])
        for number in range(1, len(whole[index].counts)):
            assert sum(step.counts[number] for step in made) == whole[index].counts[number]
        assert sum(step.skipped_samples for step in made) == whole[index].skipped_samples
        assert sum(len(step.bad_samples) for step in made) == len(whole[index].bad_samples)


def test_an_epoch_meets_every_sample_once_in_rows_that_fit():
    data = steps(global_batch_size=10, total_steps=4, max_tokens_per_row=250)
    made = [data[index] for index in range(4)]
    assert sorted(n for step in made for n in names(step)) == sorted(f"s{n}" for n in range(40))
    for step in made:
        assert all(len(batch.input_ids) == 1 for batch in step.micro_batches)
        assert all(sum(batch.sample_lengths[0]) <= 250 for batch in step.micro_batches)
        counts, batches = step.counts, step.micro_batches
        assert counts.samples == 10 and counts.images == sum(len(b.pixels) for b in batches)
        assert counts.supervised_tokens == sum(int((b.labels != -100).sum()) for b in batches) > 0
        assert counts.tokens == sum(int((b.sample_index >= 0).sum()) for b in batches)
        assert counts == OptimizerStep(0, [], planned_rows=data.plan_step(step.index).rows).counts


def test_bad_samples_contribute_nothing_and_are_named():
    step = steps(source=MixedSource(12, bad=(3,), missing=(4,)))[0]
    assert sorted(bad.sample_id for bad in step.bad_samples) == ["s3", "s4"]
    assert "gone.png: does not exist" in " ".join(map(str, step.bad_samples))
    assert names(step) == sorted(f"s{n}" for n in range(12) if n not in (3, 4))
    assert step.counts.samples == 10
    nothing = steps(source=MixedSource(12, bad=tuple(range(12))))[0]
    assert (
        nothing.micro_batches == []
        and len(nothing.bad_samples) == 12
        and nothing.counts.supervised_tokens == 0
    )


def test_what_max_length_cuts_off_is_counted_as_planned_and_as_loaded():
    whole = steps()
    lengths = [n for row in whole.plan_step(0).rows for n in row.sample_lengths]
    limit = max(lengths) - 2
    cut = steps(encoder=replace(ENCODER, max_length=limit))
    plan, loaded = cut.plan_step(0), cut[0]
    counts, before = loaded.counts, whole[0].counts
    assert counts.truncated_samples == sum(n > limit for n in lengths) > 0
    lost = before.supervised_tokens - counts.supervised_tokens
    assert counts.lost_supervised_tokens == lost > 0
    assert before.truncated_samples == before.lost_supervised_tokens == 0
    for name in ("truncated_samples", "lost_supervised_tokens"):
        assert sum(getattr(row, name) for row in plan.rows) == getattr(counts, name)


def test_captions_skip_samples_without_an_image():
    step = steps(source=MixedSource(12), encoder=replace(ENCODER, sample_format="caption"))[0]
    assert (step.skipped_samples, step.counts.samples, step.bad_samples) == (3, 9, [])
    assert step.counts.images == 9 and step.micro_batches[0].input_ids[0, 0] < 0


def test_an_image_is_opened_once_per_step():
    OPENED.clear()
    step = steps(source=MixedSource(12))[0]
    assert len(OPENED) == len(set(OPENED)) < step.counts.images
    with_images = [batch for batch in step.micro_batches if len(batch.pixels)]
    shown = {float(pixel) for batch in with_images for pixel in batch.pixels[:, 0, 8, 8]}
    assert len(shown) == len(OPENED)


def test_steps_outside_the_stage_are_refused():
    with pytest.raises(IndexError, match="step 9 of 9"):
        steps()[9]
