"""Which answers to a task can be paired: rows that were asked alike, common seeds and questions.

Answers under different protocols, of different data, or of checkpoints that do not correspond are
never paired; one sentence says what differs. Questions that were not put to every run are counted
and named, and are in no figure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlbench.compare.report.row_pairs import format_count, join_names
from vlbench.compare.report.task_answers import LAST_CHECKPOINT, TaskAnswers
from vlbench.text_tables import list_some

MAX_NAMED_QUESTIONS = 3
RunAnswers = Mapping[int, Sequence[TaskAnswers]]
"""Seed -> everything that the run with it was asked."""
VariantRows = dict[str, dict[int, TaskAnswers]]
"""Row -> seed -> its answers; all of them to one task under the same settings."""


@dataclass(frozen=True)
class MatchedTask:
    """A task that rows were asked alike."""

    title: str
    settings: Mapping[str, str]
    answers: VariantRows
    """Of the rows that are compared, with the common seeds."""
    seeds: list[int]
    questions: list[str]
    remarks: list[str]
    """Sentences on the rows, seeds and questions that are left out."""


def match_tasks(answers_by_row: Mapping[str, RunAnswers]) -> tuple[list[MatchedTask], list[str]]:
    """Return the tasks that at least two rows were asked alike, and sentences on the others.

    If there is one row only, its tasks are all of those that it was asked.
    """
    matched, remarks = [], []
    for task, variants in _find_variants(answers_by_row).items():
        wanted = min(2, len(answers_by_row))
        usable = [one for one in variants if len(one) >= wanted]
        if not usable:
            remarks.append(_describe_mismatch(task, variants, list(answers_by_row)))
        for variant in usable:
            others = [one for one in variants if one is not variant]
            one, remark = _match_variant(task, variant, others, list(answers_by_row))
            matched += [one] if one else []
            remarks += [remark] if remark else []
    return matched, remarks


def _find_variants(answers_by_row: Mapping[str, RunAnswers]) -> dict[str, list[VariantRows]]:
    """Return, for every task, the rows and seeds that were asked it, settings by settings."""
    found: dict[str, dict[str, VariantRows]] = {}
    for row, by_seed in answers_by_row.items():
        for seed, answers in by_seed.items():
            for one in answers:
                key = json.dumps(sorted(one.settings.items()))
                variant = found.setdefault(one.task, {}).setdefault(key, {})
                variant.setdefault(row, {})[seed] = one
    return {task: list(variants.values()) for task, variants in found.items()}


def _match_variant(
    task: str, variant: VariantRows, others: Sequence[VariantRows], all_rows: Sequence[str]
) -> tuple[MatchedTask | None, str]:
    """Return what can be compared of answers under the same settings, else a sentence on why."""
    settings = _settings_of(variant)
    title = _title(task, settings, [_settings_of(other) for other in others])
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in variant.values())))
    if not seeds:
        told = "; ".join(f"{row}: {', '.join(map(str, sorted(by)))}" for row, by in variant.items())
        return None, f"{title} is not compared: no seed is common to the rows ({told})."
    kept = {row: {seed: by_seed[seed] for seed in seeds} for row, by_seed in variant.items()}
    runs = [one for by_seed in kept.values() for one in by_seed.values()]
    common = set.intersection(*(set(one.scores) for one in runs))
    unlike = {name for name in common if _is_unlike(runs, name)}
    common -= unlike
    if not common:
        return None, f"{title} is not compared: no question was put to every run."
    remarks = [
        *_describe_missing_rows(variant, others, all_rows),
        *_describe_dropped_seeds(variant, seeds),
        *_describe_left_out(kept, common | unlike),
        *_describe_unlike(len(unlike)),
        *dict.fromkeys(one.caution for one in runs if one.caution),
    ]
    questions = [name for name in runs[0].scores if name in common]
    return MatchedTask(title, settings, kept, seeds, questions, remarks), ""


def _is_unlike(runs: Sequence[TaskAnswers], name: str) -> bool:
    """Tell whether runs that know the content of a question know different ones."""
    contents = [one.contents[name] for one in runs if name in one.contents]
    return any(len({*filter(None, values)}) > 1 for values in zip(*contents, strict=True))


def _describe_unlike(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{format_count(count, 'question')} left out: under the same id the true answer, text or "
        "picture differs from run to run."
    ]


def _settings_of(variant: VariantRows) -> Mapping[str, str]:
    return next(one.settings for by_seed in variant.values() for one in by_seed.values())


def _title(task: str, settings: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> str:
    """Return the task with its protocol, and what tells it from the same task asked otherwise."""
    told = {key: settings[key] for key in ("protocol",) if key in settings}
    if settings.get("checkpoint", LAST_CHECKPOINT) != LAST_CHECKPOINT:
        told["checkpoint"] = settings["checkpoint"]
    for key, _ in differing_settings([settings, *others]):
        told.setdefault(key, settings.get(key, "none"))
    return ", ".join([task, *(f"{key} {value}" for key, value in told.items())])


def differing_settings(several: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the keys in which settings differ, with the value of each; "none" for no value."""
    keys = dict.fromkeys(key for settings in several for key in settings)
    values = {key: [settings.get(key, "none") for settings in several] for key in keys}
    return [(key, found) for key, found in values.items() if len(set(found)) > 1]


def _describe_mismatch(task: str, variants: Sequence[VariantRows], all_rows: Sequence[str]) -> str:
    """Return a sentence on why no two rows can be compared on a task."""
    if len(variants) == 1:
        (row,) = variants[0]
        return f"{task} is not compared: of {len(all_rows)} rows only {row} was asked."
    rows = [join_names(list(variant), "and") for variant in variants]
    differing = []
    for key, values in differing_settings([_settings_of(variant) for variant in variants]):
        told = (f"{value} for {row}" for value, row in zip(values, rows, strict=True))
        differing.append(f"{key} is {', '.join(told)}")
    return f"{task} is not compared, as the rows were not asked alike: {'; '.join(differing)}."


def _describe_missing_rows(
    variant: VariantRows, others: Sequence[VariantRows], all_rows: Sequence[str]
) -> list[str]:
    """Return a sentence for each row that was not asked, or not in this way."""
    remarks = []
    for row in all_rows:
        if row in variant:
            continue
        other = next((one for one in others if row in one), None)
        if other is None:
            remarks.append(f"{row} was not asked.")
            continue
        differing = ", ".join(
            f"{key} {theirs} instead of {ours}"
            for key, (ours, theirs) in differing_settings(
                [_settings_of(variant), _settings_of(other)]
            )
        )
        remarks.append(f"{row} was not asked alike: {differing}.")
    return remarks


def _describe_dropped_seeds(variant: VariantRows, seeds: Sequence[int]) -> list[str]:
    dropped = {
        row: sorted(set(by_seed) - set(seeds))
        for row, by_seed in variant.items()
        if len(by_seed) > len(seeds)
    }
    if not dropped:
        return []
    told = "; ".join(f"{', '.join(map(str, left))} of {row}" for row, left in dropped.items())
    return [f"Seeds that not every row was asked with are left out: {told}."]


def _describe_left_out(kept: VariantRows, common: set[str]) -> list[str]:
    """Return a sentence on the questions that were not put to every run, with who lacks them."""
    asked = dict.fromkeys(
        name for by_seed in kept.values() for one in by_seed.values() for name in one.scores
    )
    left_out = [name for name in asked if name not in common]
    if not left_out:
        return []
    lacking = {
        row: sum(any(name not in one.scores for one in by_seed.values()) for name in left_out)
        for row, by_seed in kept.items()
    }
    named = list_some(left_out, MAX_NAMED_QUESTIONS)
    told = ", ".join(f"{count} of {row}" for row, count in lacking.items() if count)
    return [
        f"{format_count(len(left_out), 'question')} not put to every run "
        f"{'is' if len(left_out) == 1 else 'are'} left out ({named}); not asked: {told}."
    ]
