"""Kinds of questions, by type, language, subject and so on: every row's accuracy and every pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlbench.compare.report.pair_families import TestedPairs, compare_family
from vlbench.compare.report.paired_statistics import RowStatistics
from vlbench.compare.report.row_pairs import RowPair

KINDS = ("type", "domain", "category", "language")
"""What a kind of question may be a kind by, in the order of tables."""


@dataclass(frozen=True)
class QuestionGroup:
    """Questions of one kind, with the accuracy of each row and the differences of all pairs."""

    name: str
    kind: str
    """One of `KINDS`."""
    question_count: int
    row_accuracies: list[tuple[float, float, float]]
    """Accuracy of each row with the ends of its interval, in the order of the rows."""
    pairs: list[RowPair]
    """Their p-values are corrected over all pairs of all kinds of the table."""

    def scores_of(self, row_names: Sequence[str]) -> dict[str, float]:
        """Return row -> accuracy; `row_names` are in the order of the rows."""
        accuracies = (accuracy for accuracy, _, _ in self.row_accuracies)
        return dict(zip(row_names, accuracies, strict=True))


def group_questions(
    row_names: Sequence[str],
    question_kinds: Sequence[Mapping[str, str]],
    statistics: RowStatistics,
    tested: TestedPairs | None = None,
) -> list[QuestionGroup]:
    """Group the questions by each of `KINDS`; an empty name makes no group.

    `question_kinds` has, for every question, its name by kind: type -> colour. `tested` are the
    pairs of rows that are compared, by default all.
    """
    columns_of = columns_by_kind(question_kinds)
    groups = list(columns_of)
    subsets = [statistics.of_questions(columns) for columns in columns_of.values()]
    pairs = compare_family([(row_names, subset) for subset in subsets], tested)
    return [
        QuestionGroup(
            name,
            KINDS[rank],
            subset.question_count,
            [subset.accuracy_interval(row) for row in range(len(row_names))],
            pairs_of_group,
        )
        for (rank, name), subset, pairs_of_group in zip(groups, subsets, pairs, strict=True)
    ]


def columns_by_kind(
    question_kinds: Sequence[Mapping[str, str]],
) -> dict[tuple[int, str], list[int]]:
    """Return (rank in `KINDS`, name) -> numbers of these questions, in the order of tables."""
    columns_of: dict[tuple[int, str], list[int]] = {}
    for column, names in enumerate(question_kinds):
        for rank, kind in enumerate(KINDS):
            if names.get(kind):
                columns_of.setdefault((rank, names[kind]), []).append(column)
    return dict(sorted(columns_of.items()))
