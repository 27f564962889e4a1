"""The comparison of finished runs, computed once; the Markdown and HTML reports only show it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlbench.compare.report.comparison_warnings import comparison_warnings
from vlbench.compare.report.detectable_difference import (
    SIGNIFICANCE_LEVEL,
    describe_detectable,
)
from vlbench.compare.report.finished_runs import (
    ComparisonArm,
    FinishedRun,
    cluster_numbers,
    common_seeds_and_questions,
    correct_matrix,
    differing_keys,
    group_into_arms,
    shown_values,
)
from vlbench.compare.report.paired_statistics import (
    PairedDifference,
    RowStatistics,
    holm_correction,
)
from vlbench.compare.report.question_clusters import CorrectMatrix
from vlbench.compare.report.score_limits import RowScore, floor_and_ceiling_warnings

MAX_NAMED_ROWS = 4  # a sentence about more rows gives their number instead of names


@dataclass(frozen=True)
class RowResult:
    """A row of the comparison: its runs with the common seeds, and their accuracy."""

    name: str
    runs: tuple[FinishedRun, ...]
    correct: CorrectMatrix
    accuracy: float
    interval_low: float
    """Lower end of the 95 % interval."""
    interval_high: float

    @property
    def accuracy_std(self) -> float | None:
        """Standard deviation of accuracy over the seeds; None for one seed."""
        by_seed = self.correct.mean(axis=1)
        return float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None

    @property
    def budget(self) -> dict[str, Any]:
        """The `budget` of the first run's results.json, {} without one."""
        budget: dict[str, Any] = self.runs[0].results.get("budget") or {}
        return budget

    def mean_result(self, result_key: str) -> float | None:
        """Return the mean of a key of results.json over the runs that have it."""
        values = [run.results.get(result_key) for run in self.runs]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class RowPair:
    """The difference of two rows of a comparison, the better one first."""

    better: str
    worse: str
    difference: PairedDifference
    corrected_p: float
    """After Holm's correction over all pairs."""
    pair_count: int
    """The number of these pairs."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and the corrected p is small enough.

        With one seed that is said of two runs, not of their rows.
        """
        return self.difference.interval_low > 0 and self.corrected_p <= SIGNIFICANCE_LEVEL

    @property
    def corrected_p_text(self) -> str:
        """The corrected p with a relation sign: "= 0.012" or "< 0.001"."""
        return f"= {self.corrected_p:.3f}" if self.corrected_p >= 0.001 else "< 0.001"

    def short_sentence(self) -> str:
        """Return the difference as a sentence."""
        caution = (
            ", so this may be chance"
            if self.difference.interval_low > 0 and self.corrected_p > SIGNIFICANCE_LEVEL
            else ""
        )
        return (
            f"{self.difference.describe_difference(self.better, self.worse)}; p "
            f"{self.corrected_p_text} after Holm's "
            f"correction over {format_count(self.pair_count, 'pair')}{caution}."
        )

    def full_sentence(self) -> str:
        """Return the short sentence with the smallest detectable difference."""
        smallest = 100 * self.difference.smallest_detectable
        return (
            f"{self.short_sentence()} Smallest detectable difference of this design: "
            f"{smallest:.1f} points."
        )


class QuestionGroup(NamedTuple):
    """Questions of one type or in one language, with the accuracy of each row."""

    name: str
    is_language: bool
    """True for a language, False for a type."""
    question_count: int
    row_accuracies: list[tuple[float, float, float]]
    """Accuracy of each row with the ends of its interval, in the order of the rows."""


@dataclass(frozen=True)
class ComparisonResult:
    """A whole comparison."""

    arms: tuple[ComparisonArm, ...]
    """In the order given, with all of their seeds."""
    rows: tuple[RowResult, ...]
    """Sorted by accuracy, the best first."""
    seeds: list[int]
    question_ids: list[str]
    cluster_count: int
    """The number of pictures, or else conversations, that the questions are about."""
    asked_of: str
    """The data that the questions are about."""
    pairs: list[RowPair]
    design: str
    """What more seeds would find, as a sentence; "" where that cannot be said."""
    question_groups: list[QuestionGroup]
    warnings: list[str]
    notes: list[str]
    """Sentences on what all rows have in common, or on how they were made."""
    failed: Mapping[Path, str]
    """Folder of a failed run -> reason."""

    @property
    def recipe_differences(self) -> list[tuple[str, list[str]]]:
        """The keys in which recipes differ, learning rates first, with a value for each arm."""
        keys = differing_keys(self.arms)
        runs = [arm.runs[0] for arm in self.arms]
        return [
            (
                key,
                [
                    "" if value is None and key not in run.recipe else str(value)
                    for run, value in zip(runs, shown_values(runs, key), strict=True)
                ],
            )
            for key in keys
        ]

    @property
    def scope_sentence(self) -> str:
        """A sentence on the numbers of rows, seeds and questions."""
        return (
            f"Rows: {len(self.rows)}; seeds: {', '.join(map(str, self.seeds))}; questions about "
            f"{self.asked_of}: {len(self.question_ids)}{self._pictures}. Intervals are of 95 %, "
            f"over {'questions alone' if len(self.seeds) == 1 else 'seeds and questions'}."
        )

    @property
    def _pictures(self) -> str:
        same = self.cluster_count == len(self.question_ids)
        return "" if same else f" about {format_count(self.cluster_count, 'picture')}, the unit"

    @property
    def question_sentence(self) -> str:
        """The question that the comparison answers, as a sentence."""
        seeds = format_count(len(self.seeds), "seed")
        questions = f"{format_count(len(self.question_ids), 'question')} about {self.asked_of}"
        if len(self.rows) == 1:
            return f"How well does {self.rows[0].name}, trained with {seeds}, answer {questions}?"
        if len(self.rows) > MAX_NAMED_ROWS:
            rows = f"{len(self.rows)} rows, each trained with {seeds}"
            return f"Which of {rows}, answers {questions} best?"
        names = join_names([row.name for row in self.rows], "or")
        return f"Which answers {questions} best, each trained with {seeds}: {names}?"

    @property
    def verdict_sentence(self) -> str:
        """A sentence on which row is best, and over which others that is significant."""
        best, *others = self.rows
        text = f"{best.name} answers {100 * best.accuracy:.1f} % of the questions right"
        if not others:
            return f"{text}. There is no other row to compare it with."
        pairs_of_best = [pair for pair in self.pairs if pair.better == best.name]
        significant = [pair.worse for pair in pairs_of_best if pair.is_significant]
        undecided = [pair.worse for pair in pairs_of_best if not pair.is_significant]
        is_best_alone = best.accuracy > others[0].accuracy
        text += ", the most of all rows." if is_best_alone else f", as does {others[0].name}."
        if len(self.seeds) == 1:
            return f"{text} {_one_seed_verdict(best.name, significant)}"
        if significant:
            text += f" That it is better than {join_names(significant, 'and')} is more than chance."
        if undecided:
            text += (
                f" Whether it is better than {join_names(undecided, 'or')}, this comparison cannot "
                "tell."
            )
        return text


def _one_seed_verdict(best: str, significant: Sequence[str]) -> str:
    """Return what a single run of each row can say: something of runs, nothing of rows."""
    text = ""
    if significant:
        runs = join_names(significant, "and")
        text = f"That this run of {best} is better than that of {runs} is more than chance. "
    return f"{text}With one seed nothing is known of how other runs would do."


def analyze_runs(
    runs: Sequence[FinishedRun],
    failed: Mapping[Path, str] | None = None,
    notes: Sequence[str] = (),
) -> ComparisonResult:
    """Return the comparison of finished runs.

    `failed` maps folders of failed runs to the reason; `notes` are sentences on how the runs were
    made.
    """
    arms = group_into_arms(runs)
    seeds, questions = common_seeds_and_questions(arms)
    by_arm = {arm.name: correct_matrix(arm, seeds, questions) for arm in arms}
    arm_order = sorted(arms, key=lambda arm: -by_arm[arm.name].mean())
    clusters = cluster_numbers(arms[0].runs[0], questions)
    statistics = RowStatistics(np.stack([by_arm[arm.name] for arm in arm_order]), clusters)
    rows = [
        RowResult(
            arm.name,
            tuple(run for run in arm.runs if run.seed in seeds),
            by_arm[arm.name],
            *statistics.accuracy_interval(index),
        )
        for index, arm in enumerate(arm_order)
    ]
    failed = failed or {}
    groups = _group_questions(rows, questions, statistics)
    scores = [
        RowScore(row.name, row.accuracy, row.interval_low, row.mean_result("blank_accuracy"))
        for row in rows
    ]
    return ComparisonResult(
        arms=tuple(arms),
        rows=tuple(rows),
        seeds=seeds,
        question_ids=questions,
        cluster_count=statistics.cluster_count,
        asked_of=rows[0].runs[0].results.get("asked_of", "the data of the recipe"),
        pairs=_compare_all_pairs(rows, statistics),
        design=_describe_design(statistics),
        question_groups=groups,
        warnings=[
            *comparison_warnings(arms, seeds, questions, failed),
            *floor_and_ceiling_warnings(
                scores,
                [(group.name, [one for one, *_ in group.row_accuracies]) for group in groups],
            ),
        ],
        notes=[*_frozen_encoder_note(arms), *notes],
        failed=failed,
    )


def _frozen_encoder_note(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return a sentence if the vision encoder is frozen in all runs, else []."""
    keys = [key for arm in arms for key, value in arm.runs[0].recipe.items() if value is not None]
    is_trained = any(key.startswith("stages.") and ".train.vision" in key for key in keys)
    return [] if is_trained else ["The vision encoder is frozen in every stage of every row."]


def _compare_all_pairs(rows: Sequence[RowResult], statistics: RowStatistics) -> list[RowPair]:
    """Return all pairs of rows, best rows first, with p-values corrected for their number."""
    pairs = list(itertools.combinations(range(len(rows)), 2))
    differences = [statistics.difference(better, worse) for better, worse in pairs]
    corrected_ps = holm_correction([difference.p_value for difference in differences])
    return [
        RowPair(
            better=rows[better].name,
            worse=rows[worse].name,
            difference=difference,
            corrected_p=corrected_p,
            pair_count=len(pairs),
        )
        for (better, worse), difference, corrected_p in zip(
            pairs, differences, corrected_ps, strict=True
        )
    ]


def _describe_design(statistics: RowStatistics) -> str:
    """Return a sentence on what more seeds would find; "" for one row, or one seed."""
    spread = statistics.seed_spread
    if statistics.row_count == 1 or spread is None:
        return ""
    known = (
        f"Seeds of a row spread by {100 * spread:.1f} points (standard deviation, without the "
        "noise of answers)"
        if spread
        else "The spread of seeds is less than the noise of answers"
    )
    found = describe_detectable(statistics.planned_design(spread))
    return (
        f"{known}. A new comparison of so many rows and questions would find in 80 of 100 cases: "
        f"{found}."
    )


def _group_questions(
    rows: Sequence[RowResult], questions: Sequence[str], statistics: RowStatistics
) -> list[QuestionGroup]:
    """Group the questions by type, then by language; an empty name makes no group."""
    types_and_languages = rows[0].runs[0].types_and_languages
    groups: dict[tuple[bool, str], list[int]] = {}
    for column, question_id in enumerate(questions):
        question_type, language = types_and_languages[question_id]
        for is_language, name in ((False, question_type), (True, language)):
            if name:
                groups.setdefault((is_language, name), []).append(column)
    subsets = {key: statistics.of_questions(columns) for key, columns in sorted(groups.items())}
    return [
        QuestionGroup(
            name,
            is_language,
            subset.question_count,
            [subset.accuracy_interval(index) for index in range(len(rows))],
        )
        for (is_language, name), subset in subsets.items()
    ]


def format_count(count: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_names(names: Sequence[str], conjunction: str) -> str:
    """Return "a, b and c"; "N others" for more than `MAX_NAMED_ROWS`."""
    if len(names) > MAX_NAMED_ROWS:
        return f"{len(names)} others"
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
