"""The probes of one kind of pictures, at every place, and which questions they read.

Of large objects, labels are those of a picture as a whole, and a probe has all tokens side by side.
Of small ones, each has a probe at its own place (`region_reading`). Behind a connector whose tokens
have no places in the picture (learned queries), probes of all tokens must do. They are much weaker:
what they do not read of the encoder's patches either, where it can be read place by place, is
`unsure`.

Where the language model's features belong to a whole question, the label is the right answer; of
pictures with small things and of several pictures, whose answers are too many, what is behind the
connector counts as being there, as the text looks at it from every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vlbench.data.token_grid import TokenGrid
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.label_reading import (
    MIN_TRAINING_ROWS,
    LabelledRows,
    Labels,
    answer_rows,
    label_accuracies,
    picture_rows,
    read_labels,
)
from vlbench.evaluate.neighbour_overlap import NEIGHBOUR_COUNT, neighbour_overlap
from vlbench.evaluate.place_features import PLACES, PlaceFeatures
from vlbench.evaluate.region_reading import attribute_accuracies, read_regions

MIN_TRAINING_PICTURES = MIN_TRAINING_ROWS

Probed = tuple[Sequence[EvalQuestion], PlaceFeatures]
"""Questions, and the features of their pictures."""


class KindReadings(NamedTuple):
    """What probes of one kind of pictures read."""

    families: str
    """Of the questions: "fine and place"."""
    training_pictures: int
    shapes: list[list[int]]
    """Tokens and width at each place."""
    accuracies: dict[str, Mapping[str, float]]
    """Place -> label or attribute -> share of held-out pictures, or regions, read right."""
    control_accuracies: dict[str, Mapping[str, float]]
    questions: list[dict[str, Any]]
    """Id and flags of each question, as in information.json."""
    neighbour_overlap: Tensor | None
    """`[pictures]`; None where these are too few to have neighbours."""


class _PlaceReading(NamedTuple):
    """What probes and control probes of one place read."""

    is_read: list[bool]
    by_chance: list[bool]
    accuracies: Mapping[str, float]
    control_accuracies: Mapping[str, float]


def probe_kind(
    fitted_on: Probed,
    asked: Probed,
    grids: Mapping[str, TokenGrid | None],
    language_reads_answers: bool,
) -> KindReadings:
    """Fit probes at every place on training pictures, and read those of the questions asked."""
    (training_questions, training), (questions, held_out) = fitted_on, asked
    rows = picture_rows(questions)
    has_regions = bool(rows.pictures[0].regions)
    takes_connector = language_reads_answers and (
        has_regions or len(rows.pictures) > len(questions)
    )
    readings: dict[str, _PlaceReading] = {}
    for place, fitted, seen in zip(PLACES, training, held_out, strict=True):
        grid = grids[place]
        if place == "language" and takes_connector:
            readings[place] = readings["connector"]
        elif place == "language" and language_reads_answers:
            readings[place] = _read_whole(
                answer_rows(training_questions), fitted, answer_rows(questions), seen
            )
        elif has_regions and grid:
            readings[place] = _read_places(
                picture_rows(training_questions), fitted, rows, seen, grid
            )
        else:
            readings[place] = _read_whole(picture_rows(training_questions), fitted, rows, seen)
    unsure = [False] * len(questions)
    if has_regions and not grids["connector"]:
        whole = _read_whole(
            picture_rows(training_questions), training.encoder, rows, held_out.encoder
        )
        unsure = [not one for one in whole.is_read]
    return KindReadings(
        families=" and ".join(sorted({one.family for one in questions})),
        training_pictures=len(training.encoder),
        shapes=[list(one.shape[1:]) for one in held_out],
        accuracies={place: one.accuracies for place, one in readings.items()},
        control_accuracies={place: one.control_accuracies for place, one in readings.items()},
        questions=[
            {
                "id": question.sample.id,
                "read": [int(one.is_read[number]) for one in readings.values()],
                "control": [int(one.by_chance[number]) for one in readings.values()],
            }
            | ({"unsure": 1} if unsure[number] else {})
            for number, question in enumerate(questions)
        ],
        neighbour_overlap=neighbour_overlap(held_out.encoder, held_out.connector)
        if len(held_out.encoder) > NEIGHBOUR_COUNT
        else None,
    )


def _read_whole(
    training: LabelledRows, fitted: Tensor, rows: LabelledRows, features: Tensor
) -> _PlaceReading:
    """Read labels of rows as a whole, from all tokens side by side."""
    values = read_labels(fitted, training.labels, features, rows.labels)
    return _judge(rows, values, [label_accuracies(one, rows.labels) for one in values])


def _read_places(
    training: LabelledRows, fitted: Tensor, rows: LabelledRows, features: Tensor, grid: TokenGrid
) -> _PlaceReading:
    """Read each region of pictures at its place."""
    values = read_regions(fitted, training.pictures, features, rows.pictures, grid)
    return _judge(rows, values, [attribute_accuracies(one, rows.pictures) for one in values])


def _judge(
    rows: LabelledRows,
    values: tuple[Sequence[Labels], Sequence[Labels]],
    accuracies: Sequence[Mapping[str, float]],
) -> _PlaceReading:
    is_read, by_chance = (rows.are_read(one) for one in values)
    return _PlaceReading(is_read, by_chance, *accuracies)
