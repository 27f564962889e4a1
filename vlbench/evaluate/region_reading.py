"""Probes of the small things that a picture shows, each at its own place.

A picture of 16 objects that lie anywhere has too many labels for probes of the picture as a whole,
which would need thousands of training pictures. One probe of an attribute serves all places
instead: it reads the visual token that covers the middle of a thing. A token may cover several
things (means of 2 x 2 patches, say), and a linear probe can tell them apart only if it knows which
one is meant: besides the token it has the token times the thing's place within it, in steps of a
patch. So what is read of a mean is what the mean says of that place.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlbench.data.picture_labels import LabelledPicture, LabelledRegion
from vlbench.data.token_grid import TokenGrid
from vlbench.evaluate.label_reading import EXCHANGE_SEED, Labels
from vlbench.evaluate.linear_probe import ProbeSpace

MAX_TRAINING_REGIONS = 3000  # that a probe is fitted on, of the first pictures
_MARKED, _PLAIN = "marked", "plain"


def region_tokens(features: Tensor, pictures: Sequence[LabelledPicture], grid: TokenGrid) -> Tensor:
    """Return the token of each region and, if it has several places, this once more by place.

    `features` are `[pictures, tokens, width]`, with the tokens of `grid` last; the result is
    `[regions, width]`, or `[regions, width + places x (width + 1)]`.
    """
    tokens, places = [], []
    for of_picture, picture in zip(features[:, -grid.rows * grid.columns :], pictures, strict=True):
        for region in picture.regions:
            token, place = grid.locate(region.x, region.y)
            tokens.append(of_picture[token])
            places.append(place)
    stacked = torch.stack(tokens).float()
    if grid.places_in_token == 1:
        return stacked
    at_place = one_hot(torch.tensor(places), grid.places_in_token).to(stacked.dtype)
    by_place = (at_place[:, :, None] * stacked[:, None]).flatten(1)
    return torch.cat([stacked, by_place, at_place], 1)


def read_regions(
    training_features: Tensor,
    training_pictures: Sequence[LabelledPicture],
    features: Tensor,
    pictures: Sequence[LabelledPicture],
    grid: TokenGrid,
) -> tuple[list[Labels], list[Labels]]:
    """Return the values that probes read of pictures' labels, and those of control probes.

    Features are `[pictures, tokens, width]`, all pictures of one kind. Labels of places where
    nothing is shown are not read. The control's values are exchanged between training regions.
    """
    fitted = [region for one in training_pictures for region in one.regions][:MAX_TRAINING_REGIONS]
    space = ProbeSpace(
        region_tokens(training_features, training_pictures, grid)[:MAX_TRAINING_REGIONS]
    )
    similarity = space.similarity(region_tokens(features, pictures, grid))
    exchanged = random.Random(EXCHANGE_SEED).sample(fitted, len(fitted))
    return (
        _read_pictures(space, fitted, similarity, pictures),
        _read_pictures(space, exchanged, similarity, pictures),
    )


def _read_pictures(
    space: ProbeSpace,
    fitted: Sequence[LabelledRegion],
    similarity: Tensor,
    pictures: Sequence[LabelledPicture],
) -> list[Labels]:
    """Fit a probe of each attribute and each mark, and read all regions of pictures."""
    attributes = {
        name: space.fit_label([one.attributes[name] for one in fitted]).read(similarity)
        for name in fitted[0].attributes
    }
    marks = {
        name: space.fit_label([_MARKED if one.marks[name] else _PLAIN for one in fitted]).scores(
            similarity, _MARKED
        )
        for name in fitted[0].marks
        if any(one.marks[name] for one in fitted)
    }
    read: list[Labels] = []
    start = 0
    for picture in pictures:
        regions = picture.regions
        rows = range(start, start + len(regions))
        start = rows.stop
        of_regions = {
            region.labels[name]: values[row]
            for row, region in zip(rows, regions, strict=True)
            for name, values in attributes.items()
        }
        # one region is marked, so it is the one that looks most like it
        of_picture = {
            name: regions[int(scores[rows.start : rows.stop].argmax())].name
            for name, scores in marks.items()
        }
        read.append(of_regions | of_picture)
    return read


def attribute_accuracies(
    read: Sequence[Labels], pictures: Sequence[LabelledPicture]
) -> Mapping[str, float]:
    """Return the share of regions in which each attribute is read right, of pictures each mark."""
    hits: dict[str, list[bool]] = {}
    for values, picture in zip(read, pictures, strict=True):
        for region in picture.regions:
            for name, value in region.attributes.items():
                hits.setdefault(name, []).append(values[region.labels[name]] == value)
            for name, is_marked in region.marks.items():
                if is_marked and name in values:
                    hits.setdefault(name, []).append(values[name] == region.name)
    return {name: round(sum(some) / len(some), 4) for name, some in sorted(hits.items())}
