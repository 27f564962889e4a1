"""What makes a comparison unfair or incomplete, a sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vlbench.compare.report.common_questions import unlike_questions
from vlbench.compare.report.finished_runs import (
    BUDGET_LABELS,
    MATCH_TOLERANCE,
    ComparisonArm,
    FinishedRun,
)
from vlbench.compare.report.row_pairs import format_count, join_names
from vlbench.compare.report.training_budgets import still_improving_warning, training_warnings


def comparison_warnings(
    arms: Sequence[ComparisonArm],
    seeds: Sequence[int],
    questions: Sequence[str],
    failed: Mapping[Path, str],
    compared: Sequence[Sequence[ComparisonArm]],
) -> list[str]:
    """Return a sentence for everything that makes the comparison unfair or incomplete.

    `compared` are the groups of arms within which arms are compared: all, or those of a budget.
    """
    used = [run for arm in arms for run in arm.runs if run.seed in seeds]
    unlike_count = len(unlike_questions(used))
    warnings = [
        _single_seed_warning(seeds),
        _dropped_seeds_warning(arms, seeds),
        _budget_warning(compared),
        *_training_warnings(compared, seeds),
        still_improving_warning(_with_seeds(arms, seeds)),
        _topics_warning(used),
        _questions_warning(used, len(questions) + unlike_count, len(questions)),
        _unlike_warning(unlike_count),
        _versions_warning(used),
        _failed_runs_warning(failed),
    ]
    return [warning for warning in warnings if warning]


def _training_warnings(
    compared: Sequence[Sequence[ComparisonArm]], seeds: Sequence[int]
) -> list[str]:
    """Return what is unequal in the training of arms that are compared, each sentence once."""
    told = (
        sentence for arms in compared for sentence in training_warnings(_with_seeds(arms, seeds))
    )
    return list(dict.fromkeys(told))


def _with_seeds(arms: Sequence[ComparisonArm], seeds: Sequence[int]) -> list[ComparisonArm]:
    """Return the arms with the runs that are compared."""
    return [replace(arm, runs=tuple(run for run in arm.runs if run.seed in seeds)) for arm in arms]


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
    fewest = min(len(arm.seeds) for arm in arms)
    lacking = [arm.name for arm in arms if len(arm.seeds) == fewest]
    without = (
        f" Without {join_names(lacking, 'and')} ({format_count(fewest, 'seed')}), more could be "
        "compared."
        if len(lacking) < len(arms) - 1 and len(_seeds_without(arms, lacking)) > len(seeds)
        else ""
    )
    return f"Left out, because not every row has the seed: {', '.join(dropped)}.{without}"


def _seeds_without(arms: Sequence[ComparisonArm], names: Sequence[str]) -> set[int]:
    """Return the seeds that all but some arms have."""
    return set.intersection(*(set(arm.seeds) for arm in arms if arm.name not in names))


def _budget_warning(compared: Sequence[Sequence[ComparisonArm]]) -> str:
    unmatched = [key for arms in compared for key in _unmatched_keys(arms)]
    labels = [label for key, label in BUDGET_LABELS.items() if key in unmatched]
    return f"Not matched within {MATCH_TOLERANCE:.0%}: {', '.join(labels)}." if labels else ""


def _unmatched_keys(arms: Sequence[ComparisonArm]) -> list[str]:
    budgets = [arm.runs[0].results.get("budget") or {} for arm in arms]
    values_by_key = {key: [budget.get(key) for budget in budgets] for key in BUDGET_LABELS}
    return [key for key, values in values_by_key.items() if any(values) and _is_unmatched(values)]


def _is_unmatched(values: Sequence[int | None]) -> bool:
    known = [value for value in values if value is not None]
    return len(known) < len(values) or max(known) > (1 + MATCH_TOLERANCE) * min(known)


def _topics_warning(runs: Sequence[FinishedRun]) -> str:
    topics = dict.fromkeys(run.results.get("asked_of", "") for run in runs)
    if len(topics) < 2:
        return ""
    named = "; ".join(topic or "?" for topic in topics)
    return f"The runs were asked questions about different data: {named}."


def _questions_warning(runs: Sequence[FinishedRun], common: int, paired: int) -> str:
    """Tell of questions that not every run was asked: `common` were, of which `paired` count."""
    largest = max(len(run.correct) for run in runs)
    if largest > common:
        return f"Only {paired} of up to {largest} questions were asked of every run."
    return ""


def _unlike_warning(count: int) -> str:
    if not count:
        return ""
    are, their = ("is", "its") if count == 1 else ("are", "their")
    return (
        f"{format_count(count, 'question')} {are} left out, as under the same id {their} true "
        "answer, text or picture differs from run to run: the runs were not asked the same."
    )


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
    runs, whose = ("1 run", "its") if len(failed) == 1 else (f"{len(failed)} runs", "their")
    return f"{runs} failed or did not finish, and {whose} results are missing."
