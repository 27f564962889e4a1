"""The rows of a comparison on further tasks: the same statistics as of the main outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlbench.compare.report.asked_tasks import read_task_answers
from vlbench.compare.report.finished_runs import ComparisonArm
from vlbench.compare.report.pair_families import TestedPairs, compare_family
from vlbench.compare.report.paired_statistics import RowStatistics
from vlbench.compare.report.question_clusters import number_clusters
from vlbench.compare.report.question_kinds import QuestionGroup, group_questions
from vlbench.compare.report.row_pairs import RowPair, format_count
from vlbench.compare.report.task_matching import MatchedTask, match_tasks


@dataclass(frozen=True)
class TaskRow:
    """A row's score on a task, from 0 to 1."""

    name: str
    score: float
    interval_low: float
    """Lower end of the 95 % interval."""
    interval_high: float
    seed_scores: list[float]
    """In the order of the task's seeds."""


@dataclass(frozen=True)
class TaskComparison:
    """The rows of a comparison on one task."""

    matched: MatchedTask
    rows: list[TaskRow]
    """Sorted by score, the best first."""
    cluster_count: int
    pairs: list[RowPair]
    """Their p-values are corrected over all pairs of all further tasks."""
    groups: list[QuestionGroup]
    """By kind of question; [] where there is only one kind."""

    @property
    def title(self) -> str:
        """The task and how it was asked."""
        return self.matched.title

    @property
    def scope_sentence(self) -> str:
        """A sentence on questions, pictures, seeds and score."""
        asked = format_count(len(self.matched.questions), "question")
        if self.cluster_count < len(self.matched.questions):
            asked += f" about {format_count(self.cluster_count, 'picture')}, the unit"
        seeds = ", ".join(map(str, self.matched.seeds))
        told = "; ".join(
            f"{key} {value}"
            for key, value in self.matched.settings.items()
            if key not in ("score", "seed of draws", "protocol")
        )
        if len(self.matched.seeds) == 1:
            seeds += " (differences are those of these runs)"
        return (
            f"{asked}; seeds {seeds}; score: {self.matched.settings['score']}"
            f"{f'; {told}' if told else ''}."
        )

    @property
    def row_scores(self) -> dict[str, float]:
        """Row -> its score, for the rows that were asked."""
        return {row.name: row.score for row in self.rows}


def compare_tasks(
    arms: Sequence[ComparisonArm], tested: TestedPairs | None = None
) -> tuple[list[TaskComparison], list[str]]:
    """Return the rows' comparison on everything that they were asked beside the main outcome.

    Also returned are sentences on what was asked and cannot be compared. `tested` are the pairs of
    rows that are compared, by default all.
    """
    remarks: list[str] = []
    answers_by_row = {}
    for arm in arms:
        by_seed = {}
        for run in arm.runs:
            by_seed[run.seed], unusable = read_task_answers(run.folder)
            remarks += unusable
        answers_by_row[arm.name] = by_seed
    matched, mismatches = match_tasks(answers_by_row)
    tables = [_rows_and_statistics(task) for task in matched]
    pairs = compare_family([(names, statistics) for names, statistics in tables], tested)
    compared = [
        _describe_task(task, names, statistics, task_pairs, tested)
        for task, (names, statistics), task_pairs in zip(matched, tables, pairs, strict=True)
    ]
    return compared, list(dict.fromkeys([*remarks, *mismatches]))


def _rows_and_statistics(task: MatchedTask) -> tuple[list[str], RowStatistics]:
    """Return the rows of a task, the best first, and their statistics in this order."""
    scores = {
        row: np.array(
            [[by_seed[seed].scores[name] for name in task.questions] for seed in task.seeds]
        )
        for row, by_seed in task.answers.items()
    }
    names = sorted(scores, key=lambda row: -scores[row].mean())
    clusters = _clusters_of(task)
    numbers = number_clusters([clusters[name] for name in task.questions])
    return names, RowStatistics(np.stack([scores[name] for name in names]), numbers)


def _clusters_of(task: MatchedTask) -> Mapping[str, str]:
    """Return the pictures of the questions, from a run that names them: older ones do not."""
    runs = [one for by_seed in task.answers.values() for one in by_seed.values()]
    return min(runs, key=lambda one: len({*one.clusters.values()})).clusters


def _describe_task(
    task: MatchedTask,
    names: Sequence[str],
    statistics: RowStatistics,
    pairs: list[RowPair],
    tested: TestedPairs | None,
) -> TaskComparison:
    groups = group_questions(names, _telling_kinds(task), statistics, tested)
    return TaskComparison(
        matched=task,
        rows=[
            TaskRow(
                name,
                *statistics.accuracy_interval(index),
                seed_scores=statistics.correct[index].mean(axis=1).tolist(),
            )
            for index, name in enumerate(names)
        ],
        cluster_count=statistics.cluster_count,
        pairs=pairs,
        groups=groups,
    )


def _telling_kinds(task: MatchedTask) -> list[dict[str, str]]:
    """Return the kinds of each question, without those in which all questions are alike."""
    kinds_by_question = next(iter(next(iter(task.answers.values())).values())).kinds
    asked = [kinds_by_question[name] for name in task.questions]
    names_by_kind: dict[str, set[str]] = {}
    for kinds in asked:
        for kind, name in kinds.items():
            names_by_kind.setdefault(kind, set()).add(name)
    return [
        {kind: name for kind, name in kinds.items() if len(names_by_kind[kind]) > 1}
        for kinds in asked
    ]
