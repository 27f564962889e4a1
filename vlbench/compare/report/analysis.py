"""The comparison of finished runs, computed once; the Markdown and HTML reports only show it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlbench.compare.report.finished_runs import (
    BUDGET_LABELS,
    MATCH_TOLERANCE,
    ComparisonArm,
    FinishedRun,
    common_seeds_and_questions,
    correct_matrix,
    differing_keys,
    group_into_arms,
)
from vlbench.compare.report.paired_statistics import (
    CorrectMatrix,
    PairedDifference,
    accuracy_interval,
    bootstrap_interval,
    holm_correction,
    paired_difference,
)

MAX_NAMED_ROWS = 4  # a sentence about more rows gives their number instead of names
SIGNIFICANCE_LEVEL = 0.05  # largest p, after Holm's correction, of a significant difference


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
    bootstrap_interval: tuple[float, float]
    """A bootstrap interval of the difference, as a cross-check."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and the corrected p is small enough."""
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
        """Return the short sentence with the smallest detectable difference and the bootstrap."""
        low, high = (100 * end for end in self.bootstrap_interval)
        if not self.difference.standard_error:
            return (
                f"{self.short_sentence()} Nothing varies, so the smallest detectable difference "
                "is not known."
            )
        return (
            f"{self.short_sentence()} Smallest detectable difference of this design: "
            f"{100 * self.difference.smallest_detectable:.1f} points. Bootstrap: {low:.1f} to "
            f"{high:.1f}."
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
    asked_of: str
    """The data that the questions are about."""
    pairs: list[RowPair]
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
        return [(key, [str(arm.runs[0].recipe.get(key, "")) for arm in self.arms]) for key in keys]

    @property
    def scope_sentence(self) -> str:
        """A sentence on the numbers of rows, seeds and questions."""
        return (
            f"Rows: {len(self.rows)}; seeds: {', '.join(map(str, self.seeds))}; questions about "
            f"{self.asked_of}: {len(self.question_ids)}. Intervals are of 95 %, over seeds and "
            "questions."
        )

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
        if significant:
            text += f" That it is better than {join_names(significant, 'and')} is more than chance."
        if undecided:
            text += (
                f" Whether it is better than {join_names(undecided, 'or')}, this comparison cannot "
                "tell."
            )
        return text


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
    rows = sorted(
        (_make_row_result(arm, seeds, questions) for arm in arms), key=lambda row: -row.accuracy
    )
    failed = failed or {}
    return ComparisonResult(
        arms=tuple(arms),
        rows=tuple(rows),
        seeds=seeds,
        question_ids=questions,
        asked_of=rows[0].runs[0].results.get("asked_of", "the data of the recipe"),
        pairs=compare_all_pairs(rows),
        question_groups=_group_questions(rows, questions),
        warnings=comparison_warnings(arms, seeds, questions, failed),
        notes=[*_frozen_encoder_note(arms), *notes],
        failed=failed,
    )


def _frozen_encoder_note(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return a sentence if the vision encoder is frozen in all runs, else []."""
    keys = [key for arm in arms for key, value in arm.runs[0].recipe.items() if value is not None]
    is_trained = any(key.startswith("stages.") and ".train.vision" in key for key in keys)
    return [] if is_trained else ["The vision encoder is frozen in every stage of every row."]


def _make_row_result(
    arm: ComparisonArm, seeds: Sequence[int], questions: Sequence[str]
) -> RowResult:
    correct = correct_matrix(arm, seeds, questions)
    runs = tuple(run for run in arm.runs if run.seed in seeds)
    return RowResult(arm.name, runs, correct, *accuracy_interval(correct))


def compare_all_pairs(rows: Sequence[RowResult]) -> list[RowPair]:
    """Return all pairs of rows, best rows first, with p-values corrected for their number."""
    pairs = list(itertools.combinations(rows, 2))
    differences = [paired_difference(better.correct, worse.correct) for better, worse in pairs]
    corrected_ps = holm_correction([difference.p_value for difference in differences])
    return [
        RowPair(
            better=better.name,
            worse=worse.name,
            difference=difference,
            corrected_p=corrected_p,
            pair_count=len(pairs),
            bootstrap_interval=bootstrap_interval(better.correct, worse.correct),
        )
        for (better, worse), difference, corrected_p in zip(
            pairs, differences, corrected_ps, strict=True
        )
    ]


def _group_questions(rows: Sequence[RowResult], questions: Sequence[str]) -> list[QuestionGroup]:
    """Group the questions by type, then by language; an empty name makes no group."""
    types_and_languages = rows[0].runs[0].types_and_languages
    groups: dict[tuple[bool, str], list[int]] = {}
    for column, question_id in enumerate(questions):
        question_type, language = types_and_languages[question_id]
        for is_language, name in ((False, question_type), (True, language)):
            if name:
                groups.setdefault((is_language, name), []).append(column)
    return [
        QuestionGroup(
            name,
            is_language,
            len(columns),
            [accuracy_interval(row.correct[:, columns]) for row in rows],
        )
        for (is_language, name), columns in sorted(groups.items())
    ]


def format_count(count: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_names(names: Sequence[str], conjunction: str) -> str:
    """Return "a, b and c"; "N others" for more than `MAX_NAMED_ROWS`."""
    if len(names) > MAX_NAMED_ROWS:
        return f"{len(names)} others"
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def comparison_warnings(
    arms: Sequence[ComparisonArm],
    seeds: Sequence[int],
    questions: Sequence[str],
    failed: Mapping[Path, str],
) -> list[str]:
    """Return a sentence for everything that makes the comparison unfair or incomplete."""
    used = [run for arm in arms for run in arm.runs if run.seed in seeds]
    warnings = [
        _single_seed_warning(seeds),
        _dropped_seeds_warning(arms, seeds),
        _budget_warning(arms),
        _questions_warning(used, questions),
        _truths_warning(used, questions),
        _versions_warning(used),
        _failed_runs_warning(failed),
    ]
    return [warning for warning in warnings if warning]


def _single_seed_warning(seeds: Sequence[int]) -> str:
    return "One seed: what another run would give is not known." if len(seeds) == 1 else ""


def _dropped_seeds_warning(arms: Sequence[ComparisonArm], seeds: Sequence[int]) -> str:
    dropped = [
        f"{len(arm.seeds) - len(seeds)} of {arm.name}"
        for arm in arms
        if len(arm.seeds) > len(seeds)
    ]
    if not dropped:
        return ""
    return f"Left out, because not every row has the seed: {', '.join(dropped)}."


def _budget_warning(arms: Sequence[ComparisonArm]) -> str:
    budgets = [arm.runs[0].results.get("budget") or {} for arm in arms]
    values_by_key = {key: [budget.get(key) for budget in budgets] for key in BUDGET_LABELS}
    labels = [
        BUDGET_LABELS[key]
        for key, values in values_by_key.items()
        if any(values) and _is_unmatched(values)
    ]
    return f"Not matched within {MATCH_TOLERANCE:.0%}: {', '.join(labels)}." if labels else ""


def _is_unmatched(values: Sequence[int | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) < len(values) or max(known) > (1 + MATCH_TOLERANCE) * min(known)


def _questions_warning(runs: Sequence[FinishedRun], questions: Sequence[str]) -> str:
    largest = max(len(run.correct) for run in runs)
    topics = dict.fromkeys(run.results.get("asked_of", "") for run in runs)
    if len(topics) > 1:
        named = "; ".join(topic or "?" for topic in topics)
        return f"The runs were asked questions about different data: {named}."
    if largest > len(questions):
        return f"Only {len(questions)} of up to {largest} questions were asked of every run."
    return ""


def _truths_warning(runs: Sequence[FinishedRun], questions: Sequence[str]) -> str:
    truths = [{run.answers_and_truths[name][1] for run in runs} for name in questions]
    count = sum(len(different) > 1 for different in truths)
    return f"The true answer differs from run to run for {count} questions." if count else ""


def _versions_warning(runs: Sequence[FinishedRun]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.versions)
    versions_by_name = {
        name: dict.fromkeys(run.versions.get(name, "?") for run in runs) for name in names
    }
    differing = [
        f"{name} ({', '.join(version[:10] or '?' for version in versions)})"
        for name, versions in versions_by_name.items()
        if len(versions) > 1
    ]
    if not differing:
        return ""
    return f"The runs were made with different versions: {'; '.join(differing)}."


def _failed_runs_warning(failed: Mapping[Path, str]) -> str:
    if not failed:
        return ""
    runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
    return f"{runs} failed, and their results are missing."
