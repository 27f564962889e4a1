"""The comparison of finished runs, computed once; the Markdown and HTML reports only show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlbench.compare.report import curve_sentences
from vlbench.compare.report.common_questions import common_seeds_and_questions
from vlbench.compare.report.comparison_warnings import comparison_warnings
from vlbench.compare.report.curve_analysis import CurveFindings, analyze_curves
from vlbench.compare.report.curve_arms import arms_of_points, compared_groups, left_out_note
from vlbench.compare.report.curve_plan import CurvePlan
from vlbench.compare.report.detectable_difference import (
    FEW_PICTURES,
    ROUGH_FIGURES,
    describe_detectable,
)
from vlbench.compare.report.finished_runs import (
    ComparisonArm,
    FinishedRun,
    cluster_numbers,
    correct_matrix,
)
from vlbench.compare.report.paired_statistics import ROUNDING, RowStatistics
from vlbench.compare.report.question_clusters import CorrectMatrix
from vlbench.compare.report.question_kinds import QuestionGroup, group_questions
from vlbench.compare.report.row_groups import differing_keys, group_into_arms, shown_values
from vlbench.compare.report.row_pairs import (
    MAX_NAMED_ROWS,
    RowPair,
    all_pairs,
    compare_pairs,
    format_count,
    join_names,
)
from vlbench.compare.report.score_limits import RowScore, floor_and_ceiling_warnings
from vlbench.compare.report.task_comparison import TaskComparison, compare_tasks
from vlbench.compare.report.unequal_spreads import unequal_spreads_warning
from vlbench.compare.report.vote_statistics import VoteFindings


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
    tasks: list[TaskComparison]
    """What the runs were asked beside their own questions."""
    task_remarks: list[str]
    """Sentences on what was asked and cannot be compared."""
    warnings: list[str]
    notes: list[str]
    """Sentences on what all rows have in common, or on how they were made."""
    failed: Mapping[Path, str]
    """Folder of a run that failed or is not finished -> reason."""
    curves: CurveFindings | None = None
    """Of a comparison whose rows are points of curves over a budget."""
    looks: tuple[int, ...] = ()
    """Numbers of seeds of the reports that a comparison has had, this one last."""
    votes: VoteFindings | None = None
    """On answers of the models side by side, where `votes=` names files of them."""

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
        if self.curves:
            names = join_names(self.curves.plan.curves, "and")
            return f"How do {names} answer {questions} over {self.curves.plan.label}, with {seeds}?"
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
        if self.curves:
            return curve_sentences.verdict_sentence(self.curves)
        best, *others = self.rows
        text = f"{best.name} answers {100 * best.accuracy:.1f} % of the questions right"
        if not others:
            return f"{text}. There is no other row to compare it with."
        pairs_of_best = [pair for pair in self.pairs if pair.better == best.name]
        significant = [pair.worse for pair in pairs_of_best if pair.is_significant]
        undecided = [pair.worse for pair in pairs_of_best if not pair.is_significant]
        level = [row.name for row in others if best.accuracy - row.accuracy < ROUNDING]
        if level:
            text += f", as {'does' if len(level) == 1 else 'do'} {join_names(level, 'and')}."
        else:
            text += ", the most of all rows."
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
    plan: CurvePlan | None = None,
) -> ComparisonResult:
    """Return the comparison of finished runs.

    Args:
        runs: The runs of all rows.
        failed: Folders of runs that failed or are not finished -> the reason.
        notes: Sentences on how the runs were made.
        plan: Of which curves the rows are points; without it every two rows are compared.
    """
    notes = [*notes, *(left_out_note(runs, plan) if plan else [])]
    arms, plan = arms_of_points(runs, plan) if plan else (group_into_arms(runs), None)
    seeds, questions = common_seeds_and_questions(arms)
    by_arm = {arm.name: correct_matrix(arm, seeds, questions) for arm in arms}
    arm_order = sorted(arms, key=lambda arm: -by_arm[arm.name].mean())
    compared = (run for arm in arms for run in arm.runs if run.seed in seeds)
    clusters = cluster_numbers(compared, questions)
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
    names = [row.name for row in rows]
    kinds = _kinds_of(rows[0].runs[0], questions)
    tested = plan.tested_names if plan else None
    numbers = plan.number_pairs(names, plan.tested_pairs()) if plan else all_pairs(len(rows))
    pairs = compare_pairs(names, statistics, numbers)
    tasks, task_remarks = compare_tasks(arms, tested)
    curves = analyze_curves(plan, names, statistics, pairs, kinds) if plan else None
    notes = [*(curve_sentences.family_sentences(curves) if curves else []), *notes]
    spreads = {row.name: row.accuracy_std for row in rows}
    groups = group_questions(names, kinds, statistics, tested)
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
        pairs=pairs,
        design=_describe_design(statistics, len(pairs)),
        question_groups=groups,
        tasks=tasks,
        task_remarks=task_remarks,
        warnings=[
            *comparison_warnings(arms, seeds, questions, failed, compared_groups(arms, plan)),
            *filter(None, [unequal_spreads_warning(spreads, len(questions))]),
            *floor_and_ceiling_warnings(
                scores,
                [(group.name, [one for one, *_ in group.row_accuracies]) for group in groups],
            ),
        ],
        notes=[
            *_frozen_encoder_note(arms),
            *notes,
            *_rough_figures_note(
                [pairs, *(one.pairs for one in groups), *(one.pairs for one in tasks)]
            ),
        ],
        failed=failed,
        curves=curves,
    )


def _frozen_encoder_note(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return a sentence if the vision encoder is frozen in all runs, else []."""
    keys = [key for arm in arms for key, value in arm.runs[0].recipe.items() if value is not None]
    is_trained = any(key.startswith("stages.") and ".train.vision" in key for key in keys)
    return [] if is_trained else ["The vision encoder is frozen in every stage of every row."]


def _rough_figures_note(tables: Sequence[Sequence[RowPair]]) -> list[str]:
    """Return a sentence if the detectable difference in any table is one of few pictures."""
    pictures = [pairs[0].difference.uncertainty.question_count for pairs in tables if pairs]
    return [ROUGH_FIGURES] if min(pictures, default=FEW_PICTURES) < FEW_PICTURES else []


def _describe_design(statistics: RowStatistics, pair_count: int) -> str:
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
    found = describe_detectable(statistics.planned_design(spread, pair_count))
    return (
        f"{known}. A new comparison of so many rows and questions would find in 80 of 100 cases: "
        f"{found}."
    )


def _kinds_of(run: FinishedRun, questions: Sequence[str]) -> list[dict[str, str]]:
    """Return family, type and language of each question; "" for a type that is its family."""
    kinds = []
    for name in questions:
        question_type, language = run.types_and_languages[name]
        family = run.families[name]
        inner = "" if question_type == family else question_type
        kinds.append({"family": family, "type": inner, "language": language})
    return kinds
