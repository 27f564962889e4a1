"""Differences in what rows were trained with: budgets, parts, truncation, first weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller
from statistics import mean
from typing import Any

from vlbench.compare.report.finished_runs import ComparisonArm
from vlbench.compare.report.learning_trend import row_fall
from vlbench.compare.report.row_identity import differing_how_keys, stages_that_ran
from vlbench.config.key_types import PART_NAMES
from vlbench.config.recipe_files import recipe_files
from vlbench.text_files import read_json, read_text

BUDGET_TOLERANCE = 0.01  # relative difference of two training budgets that is not told
MAX_NAMED = 4  # rows in a sentence
CountOf = Callable[[Mapping[str, Any]], float | None]
"""Returns a number of the `budget` of a run, None where it has none."""


def mean_count(row: ComparisonArm, count: CountOf) -> float | None:
    """Return the mean over a row's runs of a count of their budgets, None if one has none."""
    counts = [count(run.results.get("budget") or {}) for run in row.runs]
    known = [one for one in counts if one is not None]
    return mean(known) if known and len(known) == len(counts) else None


def _sum_stages(key: str) -> CountOf:
    return lambda budget: sum(budget[key].values()) if budget.get(key) else None


COUNTS: dict[str, CountOf] = {
    "optimizer steps": _sum_stages("steps"),
    "samples": methodcaller("get", "samples"),
    "epochs": _sum_stages("epochs"),
    "supervised tokens": methodcaller("get", "supervised_tokens"),
}
"""What is counted, and how it is read from the `budget` of results.json."""
TRUNCATION_KEYS = ("truncated_samples", "lost_supervised_tokens", "samples", "supervised_tokens")


def training_warnings(rows: Sequence[ComparisonArm]) -> Iterable[str]:
    """Yield a sentence for each way in which rows were not trained alike."""
    yield _budget_warning(rows)
    yield parts_warning({row.name: row.runs[0].recipe for row in rows})
    yield _truncation_warning(rows)
    yield _reduction_warning(rows)
    yield from _first_weights_warnings(rows)
    yield _settings_warning(rows)


def _budget_warning(rows: Sequence[ComparisonArm]) -> str:
    counts = {
        label: {row.name: value for row in rows if (value := mean_count(row, count)) is not None}
        for label, count in COUNTS.items()
    }
    return budgets_warning(counts)


def budgets_warning(counts: Mapping[str, Mapping[str, float]]) -> str:
    """Return a sentence if rows differ in what is counted: label -> row -> count."""
    told = [
        f"{label} {group_names({name: f'{value:,.6g}' for name, value in values.items()})}"
        for label, values in counts.items()
        if values and max(values.values()) > (1 + BUDGET_TOLERANCE) * min(values.values())
    ]
    return f"Training budgets differ: {'; '.join(told)}." if told else ""


def group_names(values: Mapping[str, str]) -> str:
    """Return "900 (A, B), 1,050 (C)": each value with the rows that have it."""
    names_by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        names_by_value.setdefault(value, []).append(name)
    return ", ".join(
        f"{value} ({', '.join(names) if len(names) <= MAX_NAMED else f'{len(names)} rows'})"
        for value, names in names_by_value.items()
    )


def parts_warning(recipe_by_row: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence if rows train different parts; recipes are flattened."""
    stages = dict.fromkeys(
        stage for recipe in recipe_by_row.values() for stage in stages_that_ran(recipe)
    )
    told = []
    for stage in stages:
        parts = {name: _trained_parts(recipe, stage) for name, recipe in recipe_by_row.items()}
        if len(set(parts.values())) > 1:
            told.append(f"{stage}: {group_names(parts)}")
    return f"Different parts are trained: {'; '.join(told)}." if told else ""


def _trained_parts(recipe: Mapping[str, Any], stage: str) -> str:
    """Return "vision + connector + language (LoRA)" of a stage of a flattened recipe."""
    if stage not in stages_that_ran(recipe):
        return "not run"
    parts = {part: recipe.get(f"stages.{stage}.train.{part}.lr") for part in PART_NAMES}
    named = [
        f"{part} as LoRA" if recipe.get(f"stages.{stage}.train.{part}.lora.rank") else part
        for part, rate in parts.items()
        if rate is not None
    ]
    return " + ".join(named) or "nothing"


def _truncation_warning(rows: Sequence[ComparisonArm]) -> str:
    """Return how many samples and supervised tokens each row lost at `language.max_length`."""
    told = {}
    for row in rows:
        counts = [mean_count(row, methodcaller("get", key)) for key in TRUNCATION_KEYS]
        cut, lost, samples, kept = counts
        if cut is None or lost is None or not samples or kept is None:
            continue
        told[row.name] = (
            f"{cut / samples:.1%} of samples and {lost / max(1, kept + lost):.1%} of supervised "
            "tokens"
            if cut
            else "nothing"
        )
    if not set(told.values()) - {"nothing"}:
        return ""
    values = set(told.values())
    if len(told) > 1 and len(values) == 1:
        return f"Cut off at language.max_length, in all rows alike: {values.pop()}."
    unequally = ", unequally" if len(told) > 1 else ""
    return f"Cut off at language.max_length{unequally}: {group_names(told)}."


def _reduction_warning(rows: Sequence[ComparisonArm]) -> str:
    """Return in how many samples of each row images had fewer tiles than they could."""
    told, has_reduced = {}, False
    for row in rows:
        reduced = mean_count(row, methodcaller("get", "reduced_samples", 0))
        samples = mean_count(row, methodcaller("get", "samples"))
        if samples:
            told[row.name] = f"{(reduced or 0) / samples:.1%} of samples"
            has_reduced = has_reduced or bool(reduced)
    if not has_reduced:
        return ""
    return f"Fewer tiles than images could have, for vision.max_visual_tokens: {group_names(told)}."


def _first_weights_warnings(rows: Sequence[ComparisonArm]) -> Iterable[str]:
    """Yield sentences on connectors without their own first stage, and on what seeds share."""
    unprepared = {
        row.name: objectives
        for row in rows
        if (objectives := _unused_objectives(row)) and _begins_at_random(row)
    }
    yield from map(unprepared_warning, unprepared, unprepared.values())
    began = {row.name: "at random" if _begins_at_random(row) else "pretrained" for row in rows}
    if len(set(began.values())) > 1:
        yield f"Connectors began differently: {group_names(began)}."
    for row in rows:
        inits = {str(run.recipe.get("init")) for run in row.runs if run.recipe.get("init")}
        if len(row.runs) > 1 and len(inits) == 1:
            yield (
                f"All seeds of {row.name} began with the same init={inits.pop()}: their spread "
                "leaves out what other seeds of that training would give."
            )


def unprepared_warning(row_name: str, objectives: Sequence[str]) -> str:
    """Return a sentence on a connector without the stage that it offers to prepare it."""
    recipe_names = ", ".join(
        f"recipe={name}"
        for name, file in recipe_files().items()
        if f"objective: {objectives[0]}" in read_text(file)
    )
    example = f", as in {recipe_names}" if recipe_names else ""
    return (
        f"{row_name} begins with random weights and without the stage that its connector offers to "
        f"prepare it (objective={objectives[0]}{example}): give it that stage, or weights by init=."
    )


def _unused_objectives(row: ComparisonArm) -> list[str]:
    budgets = [run.results.get("budget") or {} for run in row.runs]
    unused = [list(budget.get("unused_objectives") or []) for budget in budgets]
    return unused[0] if all(unused) else []


def _begins_at_random(row: ComparisonArm) -> bool:
    """Tell whether the connector's first weights were random; without a record by `init`."""
    file = row.runs[0].folder / "versions.json"
    weights = (read_json(file) if file.is_file() else {}).get("weights")
    origin = weights.get("connector") if isinstance(weights, dict) else None
    if isinstance(origin, dict):
        return str(origin.get("source", "")).startswith("random")
    return not row.runs[0].recipe.get("init")


def still_improving_warning(rows: Sequence[ComparisonArm]) -> str:
    """Return a sentence on the rows whose loss still fell as their training ended, "" for none."""
    told = []
    for row in rows:
        ran = stages_that_ran(row.runs[0].recipe)
        fall = row_fall([run.folder for run in row.runs], ran[-1]) if ran else None
        if fall is not None:
            told.append(
                f"{row.name} (its {'held-out' if fall.is_held_out else 'training'} loss fell by "
                f"{fall.share:.0%} over the last third of {fall.stage})"
            )
    if not told:
        return ""
    return (
        f"Still improving at the end, so that more steps may change the order: {', '.join(told)}."
    )


def _settings_warning(rows: Sequence[ComparisonArm]) -> str:
    all_recipes = [run.recipe for row in rows for run in row.runs]
    told = [f"{key} ({', '.join(values)})" for key, values in differing_how_keys(all_recipes)]
    if not told:
        return ""
    return f"Times and memory are of different settings: {'; '.join(told)}."
