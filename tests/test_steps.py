"""A step is a pure function of (seed, step, rank, world), whoever makes it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlbench.data.batch import Batch
from vlbench.data.images import File, ImageTransform
from vlbench.data.order import Mixture
from vlbench.data.sample import PLACEHOLDER, Sample, Turn
from vlbench.data.steps import Step, Steps
from vlbench.data.template import YI_VL
from vlbench.data.tokenizer import Tokenizer
from vlbench.mistakes import BadSample

GOLDEN = Path(__file__).parent / "goldens/yi_vl/tiny_a"
TRANSFORM = ImageTransform(16, 16, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
OPENED: list[int] = []


@dataclass(frozen=True)
class Plain:
    """A picture in one colour, which counts how often it is opened."""

    number: int

    @property
    def name(self) -> str:
        return f"plain {self.number}"

    def open(self) -> Image.Image:
        OPENED.append(self.number)
        return Image.new("RGB", (9, 7), (self.number * 7 % 256, 9, 200))


class World:
    """Samples with an image, with two, and every fifth with none; `bad` ones are broken."""

    name = "world"

    def __init__(self, count: int = 40, bad: tuple[int, ...] = (), missing: tuple[int, ...] = ()):
        self.count, self.bad, self.missing = count, bad, missing

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(f"s{index}", "is broken")
        images = 0 if index % 5 == 0 else 1 + index % 2
        question = PLACEHOLDER * images + "\nWhat is it? " * (1 + index % 4)
        turns = (Turn("human", question), Turn("assistant", f"It is number {index}."))
        gone = File("gone.png")
        pictures = tuple(
            gone if index in self.missing else Plain(index // 2) for _ in range(images)
        )
        return Sample(f"s{index}", turns, pictures)


def steps(seed: int = 0, source: World | None = None, **changes) -> Steps:
    settings = {
        "mixture": Mixture([(source or World(), 1.0)], seed),
        "template": YI_VL,
        "tokenizer": Tokenizer.load(GOLDEN / "checkpoint"),
        "transform": TRANSFORM,
        "tokens_per_image": 4,
        "max_length": 4096,
        "form": "chat",
        "batch": 12,
        "row_tokens": 400,
        "total": 9,
    }
    return Steps(**{**settings, **changes})


def same_batch(one: Batch, two: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def same(one: Step, two: Step) -> bool:
    batches = zip(one.batches, two.batches, strict=True)
    plain = [f.name for f in fields(Step) if f.name not in ("batches", "bad")]
    return (
        all(same_batch(a, b) for a, b in batches)
        and all(getattr(one, name) == getattr(two, name) for name in plain)
        and [str(bad) for bad in one.bad] == [str(bad) for bad in two.bad]
    )


def names(step: Step) -> list[str]:
    return sorted(name.split()[0] for batch in step.batches for name in batch.sample_id)


def test_a_step_is_the_same_from_anyone():
    data = steps(source=World(bad=(3,), missing=(4,)))
    first = [data[index] for index in range(9)]
    fresh, copy = steps(source=World(bad=(3,), missing=(4,))), pickle.loads(pickle.dumps(data))
    for index in reversed(range(9)):
        assert same(first[index], data[index])
        assert same(first[index], fresh[index]) and same(first[index], copy[index])
    assert sum(len(step.bad) for step in first) >= 4
    assert not same(first[0], first[1]) and not same(first[0], steps(seed=1)[0])


def test_workers_make_the_same_steps_from_any_start():
    data = steps(source=World(bad=(3,)))
    sampler = range(4, data.total)
    loader = DataLoader(data, batch_size=None, sampler=sampler, num_workers=1)
    for index, step in zip(sampler, loader, strict=True):
        assert same(step, data[index])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_a_step(world):
    whole = steps(source=World(bad=(3,), missing=(4,)))
    for index in range(4):
        made = [replace(whole, rank=rank, world=world)[index] for rank in range(world)]
        assert sorted(n for step in made for n in names(step)) == names(whole[index])
        for name in ("samples", "images", "text_tokens", "tokens", "skipped"):
            assert sum(getattr(step, name) for step in made) == getattr(whole[index], name)
        assert sum(len(step.bad) for step in made) == len(whole[index].bad)


def test_an_epoch_meets_every_sample_once_in_rows_that_fit():
    data = steps(batch=10, total=4, row_tokens=250)
    made = [data[index] for index in range(4)]
    assert sorted(n for step in made for n in names(step)) == sorted(f"s{n}" for n in range(40))
    for step in made:
        assert all(len(batch.ids) == 1 for batch in step.batches)
        assert all(sum(batch.lengths[0]) <= 250 for batch in step.batches)
        assert step.samples == 10 and step.images == sum(len(b.pixels) for b in step.batches)
        assert step.tokens == sum(batch.tokens for batch in step.batches) > 0
        whole = sum(sum(batch.lengths[0]) for batch in step.batches)
        assert step.text_tokens == whole - 4 * step.images


def test_bad_samples_contribute_nothing_and_are_named():
    step = steps(source=World(12, bad=(3,), missing=(4,)))[0]
    assert sorted(bad.sample_id for bad in step.bad) == ["s3", "s4"]
    assert "gone.png: does not exist" in " ".join(map(str, step.bad))
    assert names(step) == sorted(f"s{n}" for n in range(12) if n not in (3, 4))
    assert step.samples == 10
    nothing = steps(source=World(12, bad=tuple(range(12))))[0]
    assert nothing.batches == [] and len(nothing.bad) == 12 and nothing.tokens == 0


def test_captions_skip_samples_without_an_image():
    step = steps(source=World(12), form="caption")[0]
    assert (step.skipped, step.samples, step.bad) == (3, 9, [])
    assert step.images == 9 and step.batches[0].ids[0, 0] < 0


def test_a_picture_is_opened_once_per_step():
    OPENED.clear()
    step = steps(source=World(12))[0]
    assert len(OPENED) == len(set(OPENED)) < step.images
    with_images = [batch for batch in step.batches if len(batch.pixels)]
    shown = {float(pixel) for batch in with_images for pixel in batch.pixels[:, 0, 8, 8]}
    assert len(shown) == len(OPENED)


def test_steps_outside_the_stage_are_refused():
    with pytest.raises(IndexError, match="step 9 of 9"):
        steps()[9]
