"""Probes read the labels of held-out pictures; a question's evidence is read right, or it is not.

A row of features stands for a picture, with the picture's labels, or for a whole question, with its
right answer as the one label.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from vlbench.data.picture_labels import Evidence, LabelledPicture
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.linear_probe import ProbeSpace

MIN_TRAINING_ROWS = 100  # with fewer, rows with such labels are not read
ANSWER_LABEL = "answer"
EXCHANGE_SEED = 0  # of the control's labels

Labels = Mapping[str, str]
"""Name of a label -> its value, of one row."""


@dataclass(frozen=True)
class LabelledRows:
    """What the rows of features stand for, and which of them questions rest on."""

    labels: list[Labels]
    """Of each row."""
    evidence: list[tuple[Evidence, ...]]
    """Of each question."""
    first_rows: list[int]
    """The row of each question's first picture."""
    pictures: list[LabelledPicture]
    """Of each row; [] where rows stand for questions."""

    def are_read(self, read: Sequence[Labels]) -> list[bool]:
        """Tell for each question whether the labels that were read have all its evidence."""
        return [
            all(read[first + one.picture].get(one.label) in one.values for one in needed)
            for needed, first in zip(self.evidence, self.first_rows, strict=True)
        ]


def picture_rows(questions: Sequence[EvalQuestion]) -> LabelledRows:
    """Return the rows of all pictures of questions; every picture has labels."""
    pictures: list[Any] = [image for one in questions for image in one.sample.images]
    counts = (len(one.sample.images) for one in questions)
    first_rows = [0, *accumulate(counts)][:-1]
    return LabelledRows(
        [image.labels for image in pictures],
        [one.evidence for one in questions],
        first_rows,
        pictures,
    )


def answer_rows(questions: Sequence[EvalQuestion]) -> LabelledRows:
    """Return a row for each question: its right answer is its label, and all its evidence."""
    return LabelledRows(
        [{ANSWER_LABEL: one.answer} for one in questions],
        [(Evidence(ANSWER_LABEL, frozenset({one.answer})),) for one in questions],
        list(range(len(questions))),
        [],
    )


def read_labels(
    training_features: Tensor,
    training_labels: Sequence[Labels],
    features: Tensor,
    labels: Sequence[Labels],
) -> tuple[list[Labels], list[Labels]]:
    """Return the values that probes read from the rows of `features`, and those of control probes.

    The probes are fitted on training rows; those of the control with the labels exchanged between
    these rows at random, always in the same way. Of `labels`, the true ones, the names alone are
    used: rows with the same names are a family that has its own probes. A family with fewer than
    MIN_TRAINING_ROWS to fit on gets no values.
    """
    read: list[dict[str, str]] = [{} for _ in labels]
    control: list[dict[str, str]] = [{} for _ in labels]
    training_families, families = _group_by_names(training_labels), _group_by_names(labels)
    for names, rows in families.items():
        training_rows = training_families.get(names, [])
        if len(training_rows) < MIN_TRAINING_ROWS:
            continue
        space = ProbeSpace(training_features[training_rows])
        similarity = space.similarity(features[rows])
        exchanged = random.Random(EXCHANGE_SEED).sample(training_rows, len(training_rows))
        for values, fitted_rows in ((read, training_rows), (control, exchanged)):
            for name in names:
                probe = space.fit_label([training_labels[row][name] for row in fitted_rows])
                for row, value in zip(rows, probe.read(similarity), strict=True):
                    values[row][name] = value
    return list(read), list(control)


def _group_by_names(labels: Sequence[Labels]) -> dict[tuple[str, ...], list[int]]:
    """Return the rows that have the same names of labels, by these."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, one in enumerate(labels):
        groups[tuple(sorted(one))].append(row)
    return groups


def label_accuracies(read: Sequence[Labels], labels: Sequence[Labels]) -> dict[str, float]:
    """Return the share of rows in which each label is read right."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for values, truth in zip(read, labels, strict=True):
        for name, value in truth.items():
            hits[name].append(values.get(name) == value)
    return {name: round(sum(some) / len(some), 4) for name, some in sorted(hits.items())}
