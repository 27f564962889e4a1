"""Rows of a comparison that train the same, which a report could only count as one: refused.

They may have been so from the beginning, or have become so: `match=` sets the sizes in which two
rows differ, and a sweep the learning rates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlbench.command_line.overrides import flatten_keys
from vlbench.compare.report.row_identity import row_identity
from vlbench.compare.report.sweep_summary import describe_factors
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.errors import UserError


def refuse_equal_rows(recipes_by_row: Mapping[str, Recipe], made_equal_by: str = "") -> None:
    """Refuse rows that train the same; `made_equal_by` is the word that changed their recipes."""
    rows_by_identity: dict[str, str] = {}
    for name, recipe in recipes_by_row.items():
        other = rows_by_identity.setdefault(identity_text(recipe), name)
        if other == name:
            continue
        flat = flatten_keys(recipes.to_plain(recipe))
        before = flatten_keys(recipes.to_plain(recipes_by_row[other]))
        changed = [key for key in flat if flat[key] != before.get(key) and key != "recipe"]
        difference = (
            f"what differs ({', '.join(changed)}) is how a run is made, not what it trains"
            if changed
            else "their recipes are equal in every key, defaults included"
        )
        if made_equal_by:
            difference = f"{made_equal_by} has made their recipes equal; leave one of them out"
        raise UserError(f"rows {other} and {name} are the same experiment: {difference}")


def identity_text(recipe: Recipe) -> str:
    """Return what a recipe trains, as a text; its seed does not count."""
    return json.dumps(row_identity(flatten_keys(recipes.to_plain(recipe)), {}), sort_keys=True)


def refuse_equal_trials(
    recipes_by_row: Mapping[str, Recipe], trials_by_row: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Refuse rows that a sweep may make the same experiment: both try the same rates.

    `trials_by_row` are the factors of learning rates, by part, that may be taken for each row.
    It is told before the trials, since nothing could be compared after them.
    """
    tried: dict[str, tuple[str, Mapping[str, float]]] = {}
    for name, recipe in recipes_by_row.items():
        identity = row_identity(flatten_keys(recipes.to_plain(recipe)), {})
        for factors in trials_by_row[name]:
            trial = json.dumps(_multiply_rates(identity, factors), sort_keys=True)
            other, own_factors = tried.setdefault(trial, (name, factors))
            if other != name:
                raise UserError(
                    f"rows {other} and {name} are the same experiment at rates that the sweep may "
                    f"take for both ({other} {describe_factors(own_factors)}, {name} "
                    f"{describe_factors(factors)}); leave one of them out"
                )


def _multiply_rates(identity: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """Return a row's identity with learning rates times the factors of their parts, as texts."""
    return {
        key: f"{value * factors.get(key.split('.')[3], 1):.6g}" if _is_rate(key) else value
        for key, value in identity.items()
    }


def _is_rate(key: str) -> bool:
    """Tell whether a flat key is stages.NAME.train.PART.lr."""
    words = key.split(".")
    return len(words) == 5 and words[2] == "train" and words[4] == "lr"
