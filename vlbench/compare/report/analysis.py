"""What finished runs say about each other, computed once: Markdown and page only show it."""

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

MAX_NAMED_ROWS = 4  # rows that a sentence names, at most
SIGNIFICANCE_LEVEL = 0.05  # largest p, after Holm's correction, that is called a difference


@dataclass(frozen=True)
class RowResult:
    """A row of the comparison: the runs of the seeds that all rows have, and their accuracy."""

    name: str
    runs: tuple[FinishedRun, ...]
    correct: CorrectMatrix
    accuracy: float
    interval_low: float
    """Lower end of the 95 % interval."""
    interval_high: float

    @property
    def accuracy_std(self) -> float | None:
        """Standard deviation of the accuracies of seeds; None for one seed."""
        by_seed = self.correct.mean(axis=1)
        return float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None

    @property
    def budget(self) -> dict[str, Any]:
        """What the row costs, {} if its runs do not say."""
        return self.runs[0].results.get("budget") or {}

    def mean_result(self, result_key: str) -> float | None:
        """Return the mean of a figure of results.json over the runs that have it."""
        values = [run.results.get(result_key) for run in self.runs]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class RowPair:
    """Two rows of a comparison, the better one first, and what is known of their difference."""

    better: str
    worse: str
    difference: PairedDifference
    corrected_p: float
    """After Holm's correction over all pairs."""
    pair_count: int
    """How many these are."""
    bootstrap_interval: tuple[float, float]
    """The interval of a bootstrap, for comparison."""

    @property
    def is_significant(self) -> bool:
        """Say whether chance alone hardly makes such a difference."""
        return self.difference.interval_low > 0 and self.corrected_p <= SIGNIFICANCE_LEVEL

    @property
    def corrected_p_text(self) -> str:
        """Give p with its sign: "= 0.012" or "< 0.001"."""
        return f"= {self.corrected_p:.3f}" if self.corrected_p >= 0.001 else "< 0.001"

    def short_sentence(self) -> str:
        """Say it in plain words."""
        chance = (
            ", so this may be chance"
            if self.difference.interval_low > 0 and self.corrected_p > SIGNIFICANCE_LEVEL
            else ""
        )
        return (
            f"{self.difference.describe_difference(self.better, self.worse)}; p "
            f"{self.corrected_p_text} after Holm's "
            f"correction over {format_count(self.pair_count, 'pair')}{chance}."
        )

    def full_sentence(self) -> str:
        """Say it in plain words, with what this design could have found."""
        low, high = (100 * end for end in self.bootstrap_interval)
        if not self.difference.standard_error:
            return (
                f"{self.short_sentence()} Nothing varies: what else would have been found is not "
                "known."
            )
        return (
            f"{self.short_sentence()} Smallest difference that this design would have found: "
            f"{100 * self.difference.smallest_detectable:.1f} points. Bootstrap: {low:.1f} to "
            f"{high:.1f}."
        )


class QuestionGroup(NamedTuple):
    """Questions of one type or in one language, and how well each row answers them."""

    name: str
    is_language: bool
    """True for a language, False for a type."""
    question_count: int
    """How many they are."""
    row_accuracies: list[tuple[float, float, float]]
    """Accuracy of each row and the ends of its interval, in the order of the rows."""


@dataclass(frozen=True)
class ComparisonResult:
    """The whole comparison."""

    arms: tuple[ComparisonArm, ...]
    """As they were given, with all of their seeds."""
    rows: tuple[RowResult, ...]
    """The best first."""
    seeds: list[int]
    question_ids: list[str]
    """Their ids."""
    asked_of: str
    pairs: list[RowPair]
    question_groups: list[QuestionGroup]
    warnings: list[str]
    notes: list[str]
    """Sentences about what all rows have in common, or how they came to be."""
    failed: Mapping[Path, str]
    """Folder of a run that failed -> why."""

    @property
    def recipe_differences(self) -> list[tuple[str, list[str]]]:
        """Each key in which recipes differ, learning rates first, and its values arm by arm."""
        keys = differing_keys(self.arms)
        return [(key, [str(arm.runs[0].recipe.get(key, "")) for arm in self.arms]) for key in keys]

    @property
    def scope_sentence(self) -> str:
        """Say what was compared on what."""
        return (
            f"Rows: {len(self.rows)}; seeds: {', '.join(map(str, self.seeds))}; questions about "
            f"{self.asked_of}: {len(self.question_ids)}. Intervals are of 95 %, over seeds and "
            "questions."
        )

    @property
    def question_sentence(self) -> str:
        """Say in a sentence what is asked of whom."""
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
        """Say in plain words which row is best, and of which others that is known."""
        best, *others = self.rows
        text = f"{best.name} answers {100 * best.accuracy:.1f} % of the questions right"
        if not others:
            return f"{text}. There is no other row to compare it with."
        against = [pair for pair in self.pairs if pair.better == best.name]
        clear = [pair.worse for pair in against if pair.is_significant]
        open_ = [pair.worse for pair in against if not pair.is_significant]
        alone = best.accuracy > others[0].accuracy
        text += ", the most of all rows." if alone else f", as does {others[0].name}."
        if clear:
            text += f" That it is better than {join_names(clear, 'and')} is more than chance."
        if open_:
            text += (
                f" Whether it is better than {join_names(open_, 'or')}, this comparison cannot "
                "tell."
            )
        return text


def analyze_runs(
    runs: Sequence[FinishedRun],
    failed: Mapping[Path, str] | None = None,
    notes: Sequence[str] = (),
) -> ComparisonResult:
    """Compare finished runs; `failed` are the folders of others, with the reason.

    `notes` are sentences about how the runs came to be.
    """
    given = group_into_arms(runs)
    seeds, questions = common_seeds_and_questions(given)
    rows = sorted(
        (_make_row_result(arm, seeds, questions) for arm in given), key=lambda row: -row.accuracy
    )
    failed = failed or {}
    return ComparisonResult(
        arms=tuple(given),
        rows=tuple(rows),
        seeds=seeds,
        question_ids=questions,
        asked_of=rows[0].runs[0].results.get("asked_of", "the data of the recipe"),
        pairs=compare_all_pairs(rows),
        question_groups=_group_questions(rows, questions),
        warnings=comparison_warnings(given, seeds, questions, failed),
        notes=[*_frozen_encoder_note(given), *notes],
        failed=failed,
    )


def _frozen_encoder_note(arms: Sequence[ComparisonArm]) -> list[str]:
    """Say that the tower learned nothing in any run, if that is so."""
    keys = [key for arm in arms for key, value in arm.runs[0].recipe.items() if value is not None]
    trained = any(key.startswith("stages.") and ".train.vision" in key for key in keys)
    return [] if trained else ["The vision tower is frozen in every stage of every row."]


def _make_row_result(
    arm: ComparisonArm, seeds: Sequence[int], questions: Sequence[str]
) -> RowResult:
    right = correct_matrix(arm, seeds, questions)
    used = tuple(run for run in arm.runs if run.seed in seeds)
    return RowResult(arm.name, used, right, *accuracy_interval(right))


def compare_all_pairs(rows: Sequence[RowResult]) -> list[RowPair]:
    """Return all pairs of rows, best rows first, their p-values corrected for their number."""
    both = list(itertools.combinations(rows, 2))
    found = [paired_difference(one.correct, other.correct) for one, other in both]
    corrected = holm_correction([one.p_value for one in found])
    return [
        RowPair(
            one.name,
            other.name,
            difference,
            p,
            len(both),
            bootstrap_interval(one.correct, other.correct),
        )
        for (one, other), difference, p in zip(both, found, corrected, strict=True)
    ]


def _group_questions(rows: Sequence[RowResult], questions: Sequence[str]) -> list[QuestionGroup]:
    """Group the questions by type, then by language; what has no name is in no group."""
    kinds = rows[0].runs[0].types_and_languages
    groups: dict[tuple[int, str], list[int]] = {}
    for index, one in enumerate(questions):
        for axis, kind in enumerate(kinds[one]):
            if kind:
                groups.setdefault((axis, kind), []).append(index)
    return [
        QuestionGroup(
            kind,
            axis == 1,
            len(columns),
            [accuracy_interval(row.correct[:, columns]) for row in rows],
        )
        for (axis, kind), columns in sorted(groups.items())
    ]


def format_count(count: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_names(names: Sequence[str], conjunction: str) -> str:
    """Return "a, b and c"; the number of them, if they are too many to be read."""
    if len(names) > MAX_NAMED_ROWS:
        return f"{len(names)} others"
    return f" {conjunction} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def comparison_warnings(
    arms: Sequence[ComparisonArm],
    seeds: Sequence[int],
    questions: Sequence[str],
    failed: Mapping[Path, str],
) -> list[str]:
    """Return a sentence for everything that limits a comparison on these seeds and questions."""
    used = [run for arm in arms for run in arm.runs if run.seed in seeds]
    found = [
        _single_seed_warning(seeds),
        _dropped_seeds_warning(arms, seeds),
        _budget_warning(arms),
        _questions_warning(used, questions),
        _truths_warning(used, questions),
        _versions_warning(used),
        _failed_runs_warning(failed),
    ]
    return [text for text in found if text]


def _single_seed_warning(seeds: Sequence[int]) -> str:
    return "One seed: what another run would give is not known." if len(seeds) == 1 else ""


def _dropped_seeds_warning(arms: Sequence[ComparisonArm], seeds: Sequence[int]) -> str:
    left = {arm.name: len(arm.seeds) - len(seeds) for arm in arms if len(arm.seeds) > len(seeds)}
    which = ", ".join(f"{count} of {name}" for name, count in left.items())
    return f"Left out, because not every row has the seed: {which}." if left else ""


def _budget_warning(arms: Sequence[ComparisonArm]) -> str:
    budgets = [arm.runs[0].results.get("budget") or {} for arm in arms]
    shown = {key: [one.get(key) for one in budgets] for key in BUDGET_LABELS}
    labels = [
        BUDGET_LABELS[key] for key, values in shown.items() if any(values) and _is_unmatched(values)
    ]
    return f"Not matched within {MATCH_TOLERANCE:.0%}: {', '.join(labels)}." if labels else ""


def _is_unmatched(values: Sequence[int | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) < len(values) or max(known) > (1 + MATCH_TOLERANCE) * min(known)


def _questions_warning(runs: Sequence[FinishedRun], questions: Sequence[str]) -> str:
    most = max(len(run.correct) for run in runs)
    about = dict.fromkeys(run.results.get("asked_of", "") for run in runs)
    if len(about) > 1:
        return f"The runs were asked different things: {'; '.join(one or '?' for one in about)}."
    if most > len(questions):
        return f"Only {len(questions)} of up to {most} questions were asked of every run."
    return ""


def _truths_warning(runs: Sequence[FinishedRun], questions: Sequence[str]) -> str:
    texts = [[run.answers_and_truths[one][1] for run in runs] for one in questions]
    wrong = sum(len(set(truths)) > 1 for truths in texts)
    return f"The true answer differs from run to run for {wrong} questions." if wrong else ""


def _versions_warning(runs: Sequence[FinishedRun]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.versions)
    values = {name: dict.fromkeys(run.versions.get(name, "?") for run in runs) for name in names}
    differ = [
        f"{name} ({', '.join(one[:10] or '?' for one in found)})"
        for name, found in values.items()
        if len(found) > 1
    ]
    return f"The runs were made with different versions: {'; '.join(differ)}." if differ else ""


def _failed_runs_warning(failed: Mapping[Path, str]) -> str:
    if not failed:
        return ""
    runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
    return f"{runs} failed, and what they would have said is missing."
