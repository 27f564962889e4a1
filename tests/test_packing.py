"""In a packed row every sample keeps its own positions, labels and images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vlbench.data.filler_batches import empty_batch
from vlbench.data.packing import collate, pack_samples
from vlbench.data.sample import Sample
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX, EncodedSample


@dataclass(frozen=True)
class Named:
    """An image that is only a number."""

    number: int

    @property
    def name(self) -> str:
        return str(self.number)

    def open(self) -> Any:
        raise AssertionError


def pixels_of(image: Named) -> torch.Tensor:
    return torch.full((3, 2, 2), float(image.number))


def make(
    name: str, ids: list[int], image_numbers: tuple[int, ...] = (), places: int = 2
) -> EncodedSample:
    labels = [
        IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else token
        for token in [*ids[1:], IMAGE_TOKEN_INDEX]
    ]
    return EncodedSample(ids, labels, Sample(name, (), tuple(map(Named, image_numbers))), places)


P = IMAGE_TOKEN_INDEX
FIRST = make("first", [5, P, P, 6, P, P, 7], (10, 11))
TEXT = make("text", [1, 2, 3])
LAST = make("last", [P, P, 8, 9], (12,))


def test_fields_of_packed_rows():
    batch = collate([[FIRST, TEXT], [LAST]], pixels_of)
    assert batch.input_ids.tolist() == [[5, P, P, 6, P, P, 7, 1, 2, 3], [P, P, 8, 9] + [0] * 6]
    i = IGNORE_INDEX
    assert batch.labels.tolist() == [
        [i, i, 6, i, i, 7, i, 2, 3, i],
        [i, 8, 9, i] + [i] * 6,
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], [0, 1, 2, 3] + [0] * 6]
    assert batch.sample_index.tolist() == [[0] * 7 + [1] * 3, [2] * 4 + [-1] * 6]
    assert batch.image_index.tolist() == [
        [-1, 0, 0, 0, 1, 1, 1, -1, -1, -1],  # text after an image sees it; other samples do not
        [2, 2, 2, 2] + [-1] * 6,
    ]
    assert batch.pixels[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert batch.sample_ids == ["first", "text", "last"]
    assert batch.sample_lengths == [[7, 3], [4]] and batch.supervised_token_count == 6


def test_a_sample_is_the_same_alone_and_packed():
    packed = collate([[TEXT, FIRST, LAST]], pixels_of)
    for number, sample in enumerate((TEXT, FIRST, LAST)):
        alone = collate([[sample]], pixels_of)
        where = packed.sample_index[0] == number
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(getattr(packed, name)[0][where], getattr(alone, name)[0])
        seen, own = packed.image_index[0][where], alone.image_index[0]
        assert torch.equal(seen < 0, own < 0)
        shown = own >= 0
        if shown.any():
            assert torch.equal(packed.pixels[seen[shown]], alone.pixels[own[shown]])


def test_a_batch_without_images():
    batch = collate([[TEXT]], pixels_of)
    assert len(batch.pixels) == 0 and batch.pixels.ndim == 4
    assert (batch.image_index == -1).all()


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (
            replace(FIRST, sample=replace(FIRST.sample, images=(Named(1),))),
            "4 image positions for 1 images",
        ),
        (replace(FIRST, tokens_per_image=3), "4 image positions for 2 images x 3"),
        (replace(FIRST, labels=[IMAGE_TOKEN_INDEX] * 7), "image position is a label"),
        (replace(FIRST, labels=[1]), "7 ids, 1 labels"),
        (replace(TEXT, input_ids=[], labels=[]), "0 ids"),
    ],
)
def test_what_does_not_fit_together_is_refused(sample, words):
    with pytest.raises(ValueError, match=words):
        collate([[TEXT, sample]], pixels_of)


def test_moving_changes_the_type_of_pixels_alone():
    batch = collate([[FIRST]], pixels_of)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.pixels.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64
    assert batch.pixels.dtype == torch.float32
    prompt = replace(batch, labels=None).to("cpu")
    assert prompt.labels is None and torch.equal(prompt.pixels, batch.pixels)


def test_an_empty_batch_weighs_nothing():
    for like in (collate([[FIRST]], pixels_of), None):
        batch = empty_batch(like)
        assert (
            batch.supervised_token_count == 0
            and len(batch.pixels) == 0
            and batch.input_ids.shape == (1, 1)
        )
        assert (batch.labels == IGNORE_INDEX).all() and batch.sample_lengths == [[1]]


def test_packing_fills_rows_and_is_deterministic():
    lengths = [30, 70, 50, 50, 120, 20, 10, 100, 1]
    samples = [make(str(n), [1] * length) for n, length in enumerate(lengths)]
    rows = pack_samples(samples, 100)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    sums = [sum(lengths[n] for n in row) for row in rows]
    assert sorted(sums) == [31, 100, 100, 100, 120]  # the sample of 120 has a row of its own
    assert [4] in rows and all(row == sorted(row) for row in rows) and rows == sorted(rows)
    assert pack_samples(samples, 100) == rows and pack_samples([], 100) == []
    assert pack_samples(samples, 1) == [[n] for n in range(len(lengths))]


def test_image_positions_and_labels_are_located_before_a_batch_moves():
    batch = collate([[FIRST, TEXT], [LAST]], pixels_of)
    assert batch.supervised_positions is None and batch.image_positions is None
    moved = batch.to("cpu")
    assert moved.input_ids.flatten()[moved.image_positions].eq(IMAGE_TOKEN_INDEX).all()
    assert len(moved.image_positions) == int(batch.input_ids.eq(IMAGE_TOKEN_INDEX).sum())
    assert moved.labels.flatten()[moved.supervised_positions].ne(IGNORE_INDEX).all()
    assert len(moved.supervised_positions) == batch.supervised_token_count
    unlabelled = replace(batch, labels=None).to("cpu")
    assert unlabelled.supervised_positions is None and torch.equal(
        unlabelled.image_positions, moved.image_positions
    )
