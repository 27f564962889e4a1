"""The tables on where information goes, cell by cell, for the Markdown and the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlbench.compare.report.information_loss import (
    ALL_KINDS,
    LOSSES,
    LOST_IN_CONNECTOR,
    InformationLoss,
    KindInformation,
    RowInformation,
    ShareEstimate,
)
from vlbench.compare.report.run_probes import PLACE_LABELS, WITHOUT_PROBES


class InformationTable(NamedTuple):
    """A table: what it says, its headings, and its lines; the first cell of a line is a row."""

    caption: str
    headings: list[str]
    lines: list[list[str]]


def information_tables(information: InformationLoss) -> list[InformationTable]:
    """Return the tables of wrong answers, of what probes read, and of neighbourhoods."""
    if not information.rows:
        return []
    return [_wrong_answers(information), _readings(information), _neighbours(information)]


def _wrong_answers(information: InformationLoss) -> InformationTable:
    return InformationTable(
        "Wrong answers of all seeds, by the last place that still has what the answer rests on; in "
        "brackets per cent of the questions of the family, with 95 % intervals.",
        ["row", "questions", "wrong", *LOSSES],
        _lines_by_kind(
            information,
            lambda kind: [
                f"{kind.wrong_count:,}",
                *(f"{loss.answers:,} ({_percent(loss.of_questions)})" for loss in kind.losses),
            ],
        ),
    )


def _readings(information: InformationLoss) -> InformationTable:
    return InformationTable(
        "Share of held-out questions of which linear probes read all that the answer rests on, "
        "with 95 % intervals; chance: probes that were fitted on exchanged labels; right answers: "
        "the same share, at the three places, of questions that the row answers right. What these "
        "rest on has passed all places: as far as they are below 1, a loss may be the probe's.",
        ["row", "questions", *PLACE_LABELS.values(), "chance", "right answers"],
        _lines_by_kind(
            information,
            lambda kind: [
                *(_share(one) for one in kind.read or ()),
                *([] if kind.read else ["-"] * len(PLACE_LABELS)),
                f"{kind.by_chance:.3f}" if kind.read else "-",
                " / ".join(f"{share:.2f}" for share in kind.read_of_right) or "-",
            ],
        ),
    )


def _lines_by_kind(
    information: InformationLoss, describe: Callable[[KindInformation], list[str]]
) -> list[list[str]]:
    """Return a line for each kind of question of each row; `describe` gives its further cells."""
    return [
        [row.row_name, f"{kind.kind} ({kind.question_count:,})", *describe(kind)]
        for row in information.rows
        for kind in row.kinds
    ]


def _neighbours(information: InformationLoss) -> InformationTable:
    return InformationTable(
        f"Share of the {information.rows[0].neighbour_count} nearest pictures in the encoder that "
        "are the nearest behind the connector too (arXiv:2509.11986); chance: of two unrelated "
        "spaces.",
        ["row", "neighbours kept", "chance"],
        [
            [row.row_name, _share(row.neighbours), f"{row.neighbours_by_chance:.3f}"]
            for row in information.rows
        ],
    )


def information_notes(information: InformationLoss) -> Iterator[str]:
    """Yield sentences on how the probes were made, and on rows that have none.

    Where no run was asked for probes there are none.
    """
    if information.rows:
        pictures = information.rows[0].training_pictures
        counts = ", ".join(f"{count:,} for {name}" for name, count in pictures.items())
        yield (
            f"Linear probes of exact labels, fitted on training pictures ({counts}), read the "
            "pictures of the questions at three places: from the features of the vision encoder, "
            "from the connector's output, and from the hidden states at the image positions before "
            "the middle layer of the language model. A wrong answer is put down to the last place "
            "at which they read what it rests on: the objects that the question names or asks for, "
            "each where it is, of several pictures in the one that is asked about, and each letter "
            "of a word. Small objects and letters are read from the token at their place."
        )
    others = [row.row_name for row in information.rows if row.reads_answers]
    if others:
        yield (
            f"{_names(others)}: image positions hold no visual tokens, so what is read in the "
            "language model is the right answer itself, at the last position of the question; of "
            "families other than gist what the connector has counts as being there, as text looks "
            "at it from every position."
        )
    for row in information.rows:
        yield from _row_notes(row)
    is_asked_for = information.rows or {*information.missing.values()} - {WITHOUT_PROBES}
    for name, reason in information.missing.items() if is_asked_for else ():
        yield f"{name} has no information probes: {reason}."


def _row_notes(row: RowInformation) -> Iterator[str]:
    """Yield sentences on what is not attributed, and on families whose probes read too little."""
    for reason, count in row.not_attributed.items():
        yield f"{row.row_name}: wrong answers that are not attributed: {count:,}, as {reason}."
    weak = [
        f"{kind.kind} {kind.read_of_right[LOST_IN_CONNECTOR]:.0%}: about {kind.missed_count:,} of "
        f"{kind.losses[LOST_IN_CONNECTOR].answers:,}"
        for kind in row.kinds
        if kind.kind != ALL_KINDS and not kind.is_trusted
    ]
    if weak:
        yield (
            f"{row.row_name}: of what right answers rest on, probes behind the connector read only "
            "a part. If they miss as much of what is there for wrong ones, so many of those 'lost "
            f"in the connector' are not ({'; '.join(weak)})."
        )


def _names(names: list[str]) -> str:
    return ", ".join(names)


def _share(estimate: ShareEstimate) -> str:
    return f"{estimate.share:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _percent(estimate: ShareEstimate) -> str:
    share, low, high = (100 * value for value in estimate)
    return f"{share:.1f}, {low:.1f} to {high:.1f}"
