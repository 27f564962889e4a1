"""Probes of the small things that a picture shows, each at its own place.

A picture of 16 objects that lie anywhere has too many labels for probes of the picture as a whole,
which would need thousands of training pictures. One probe of an attribute serves all places
instead: it reads the visual token that covers the middle of a thing. A token may cover several
things (means of 2 x 2 patches, say), and a linear probe can tell them apart only if it knows which
one is meant: besides the token it has the token times the thing's place within it, in steps of a
patch. So what is read of a mean is what the mean says of that place. Where questions name a thing
by one attribute and ask for another ("the colour of the star"), that attribute takes the role of
the place: a mean that holds a star and its colour answers, wherever in it the star is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vlbench.data.picture_labels import LabelledPicture, LabelledRegion
from vlbench.data.scene_world import COLOURS, SHAPES
from vlbench.data.token_grid import TokenGrid
from vlbench.evaluate.label_reading import EXCHANGE_SEED, Labels
from vlbench.evaluate.linear_probe import ProbeSpace

MAX_TRAINING_REGIONS = 3000  # that a probe is fitted on, of the first pictures
NAMES = (*COLOURS, *SHAPES)  # values of attributes that name a region
_MARKED, _PLAIN = "marked", "plain"


def region_tokens(
    features: Tensor, pictures: Sequence[LabelledPicture], grid: TokenGrid, named_by: str = ""
) -> Tensor:
    """Return the token of each region, and this once more by its place, or by what names it.

    `features` are `[pictures, tokens, width]`, with the tokens of `grid` last. The result is
    `[regions, width + choices x (width + 1)]`: choices are the places within a token, none where
    there is but one, or the values of the attribute `named_by`.
    """
    tokens, choices = [], []
    for of_picture, picture in zip(features[:, -grid.rows * grid.columns :], pictures, strict=True):
        for region in picture.regions:
            token, place = grid.locate(region.x, region.y)
            tokens.append(of_picture[token])
            choices.append(NAMES.index(region.attributes[named_by]) if named_by else place)
    stacked = torch.stack(tokens).float()
    count = len(NAMES) if named_by else grid.places_in_token
    if count == 1:
        return stacked
    chosen = one_hot(torch.tensor(choices), count).to(stacked.dtype)
    by_choice = (chosen[:, :, None] * stacked[:, None]).flatten(1)
    return torch.cat([stacked, by_choice, chosen], 1)


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
    exchanged = random.Random(EXCHANGE_SEED).sample(fitted, len(fitted))

    @cache
    def open_space(named_by: str) -> tuple[ProbeSpace, Tensor]:
        rows = region_tokens(training_features, training_pictures, grid, named_by)
        space = ProbeSpace(rows[:MAX_TRAINING_REGIONS])
        return space, space.similarity(region_tokens(features, pictures, grid, named_by))

    return (
        _read_pictures(open_space, fitted, pictures),
        _read_pictures(open_space, exchanged, pictures),
    )


def _read_pictures(
    open_space: Callable[[str], tuple[ProbeSpace, Tensor]],
    fitted: Sequence[LabelledRegion],
    pictures: Sequence[LabelledPicture],
) -> list[Labels]:
    """Fit a probe of each attribute and each mark, and read all regions of pictures."""
    attributes, marks = {}, {}
    for name in fitted[0].attributes:
        space, similarity = open_space(fitted[0].named_by.get(name, ""))
        probe = space.fit_label([one.attributes[name] for one in fitted])
        attributes[name] = probe.read(similarity)
    for name in fitted[0].marks:
        if any(one.marks[name] for one in fitted):
            space, similarity = open_space("")
            probe = space.fit_label([_MARKED if one.marks[name] else _PLAIN for one in fitted])
            marks[name] = probe.scores(similarity, _MARKED)
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
