"""What a reader must know before the figures of a comparison: where it is not fair or not whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.compare.report.finished_runs import ComparisonArm, FinishedRun

MATCH_TOLERANCE = 0.05  # budgets that differ by more are not the same
BUDGET_LABELS = {
    "parameters": "connector's parameters",
    "tokens": "tokens of a picture",
    "latents": "latents",
    "flops": "prefill FLOPs",
    "cache": "cache bytes of a picture",
}


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
