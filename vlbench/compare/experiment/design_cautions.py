"""What makes a comparison unfair by its design, told before its runs; and what its seeds change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlbench.command_line.overrides import flatten_keys
from vlbench.compare.experiment.grid import ComparisonGrid
from vlbench.compare.report.training_budgets import (
    budgets_warning,
    group_names,
    parts_warning,
    unprepared_warning,
)
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.data.data_sources import RENDERED_SOURCES

UNTUNED_NOTE = (
    "No learning rate was tuned: a rate that suits one connector may cost another several points "
    "(sweep=0.3,1,3 lets every row try)."
)
"""For a report of several connectors without a sweep."""


def describe_seeds(grid: ComparisonGrid) -> str:
    """Return what differs from seed to seed of a row, and what does not."""
    recipe = grid.recipes[grid.rows[0].name]
    sources = [stage.data or recipe.data for stage in recipe.stages.values()]
    is_rendered = any(data.train in RENDERED_SOURCES and not data.mix for data in sources)
    data = "which scenes are rendered, " if is_rendered else "the order of the samples, "
    same = "" if is_rendered else "the samples themselves, "
    return (
        f"a seed changes {data}the first weights of what begins at random (connectors, adapters) "
        f"and what is random in a step; the same in all: {same}pretrained weights and the "
        "questions at the end"
    )


def describe_design_cautions(grid: ComparisonGrid) -> list[str]:
    """Return a sentence for everything in the recipes that makes rows unequal."""
    warnings = [
        sentence
        for rows in grid.compared_rows()
        for sentence in _unequal_training({row.name: grid.recipes[row.name] for row in rows})
    ]
    if is_untuned(grid):
        runs = 3 * len(grid.rows)
        warnings.append(f"{UNTUNED_NOTE[:-1]}, for {runs} more runs.")
    return list(dict.fromkeys(warnings))


def _unequal_training(recipe_by_row: Mapping[str, Recipe]) -> list[str]:
    """Return what is unequal in the training of rows that are compared with one another."""
    counts: dict[str, dict[str, float]] = {"optimizer steps": {}, "samples": {}}
    for name, recipe in recipe_by_row.items():
        stages = list(recipe.selected_stages.values())
        steps = [stage.steps for stage in stages]
        if None in steps:  # epochs: how many steps they are is known once the data are open
            continue
        counts["optimizer steps"][name] = sum(step or 0 for step in steps)
        counts["samples"][name] = sum(
            (stage.steps or 0) * stage.global_batch_size for stage in stages
        )
    plain = {name: flatten_keys(recipes.to_plain(one)) for name, one in recipe_by_row.items()}
    warnings = (budgets_warning(counts), parts_warning(plain), _other_questions(recipe_by_row))
    return [warning for warning in warnings if warning]


def _other_questions(recipe_by_row: Mapping[str, Recipe]) -> str:
    """Return a sentence if rows will be asked about different data, so that nothing is paired."""
    asked = {name: _asked_data(recipe) for name, recipe in recipe_by_row.items()}
    if len(set(asked.values())) < 2:
        return ""
    return (
        f"At their end rows are asked about different data: {group_names(asked)}. Such answers are "
        "not paired; data.val=FILE asks all rows the same."
    )


def _asked_data(recipe: Recipe) -> str:
    """Return the data that a run's questions at the end are about: held-out ones, or its own."""
    data = recipe.last_stage_data.config
    if data.val or not data.mix:
        return str(data.val or data.train)
    return f"a mixture of {', '.join(part.train for part in data.mix)}"


def is_untuned(grid: ComparisonGrid) -> bool:
    """Tell whether several connectors are compared at rates that none of them has tried."""
    names = {recipe.connector["name"] for recipe in grid.recipes.values()}
    return len(names) > 1 and not grid.lr_factors


def describe_probe_cautions(row_name: str, probe: Mapping[str, Any]) -> list[str]:
    """Return a sentence for everything that trying some steps of a row has shown."""
    warnings = [
        f"{row_name}: language.max_length cuts {cut['truncated_samples']:,} of the first "
        f"{cut['samples']:,} samples of {stage}, which takes {cut['lost_supervised_tokens']:,} "
        "supervised tokens."
        for stage, cut in (probe.get("cut") or {}).items()
        if cut["truncated_samples"]
    ]
    unused = probe.get("unused_objectives")
    return [*warnings, unprepared_warning(row_name, unused)] if unused else warnings
