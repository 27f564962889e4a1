"""The budget card of a run: what its connector costs, and what was spent to train it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from vlbench.files import read_table
from vlbench.model.cost import count
from vlbench.model.vlm import VLM
from vlbench.schema import Recipe
from vlbench.train.module import trained
from vlbench.train.run import Run


def card(recipe: Recipe, run: Run, vlm: VLM) -> dict[str, Any]:
    """Return the costs of `model.cost.Cost`, and beside them what was spent.

    - `parts`: of each part the `total` parameters, and those `trained` in any stage
    - `step_seconds`: of each stage the median time of an optimizer step
    - `samples`, `images`, `tokens_seen` (places included): what was learned from; absent in a run
      that was begun by a version that did not count them
    """
    seen = dict((run.latest.seen if run.latest else None) or {})
    if seen:
        seen["tokens_seen"] = seen.pop("tokens")
    return {
        **count(vlm)._asdict(),
        "parts": {
            name: {
                "total": sum(parameter.numel() for parameter in part.parameters()),
                "trained": _trained(recipe, vlm, name),
            }
            for name, part in vlm.parts()
        },
        "step_seconds": step_seconds(run.folder / "metrics.csv"),
        **seen,
    }


def _trained(recipe: Recipe, vlm: VLM, name: str) -> int:
    """Return how many parameters of a part any stage has trained."""
    ways = [stage.parts[name] for stage in recipe.stages.values() if name in stage.parts]
    return max((sum(p.numel() for p in trained(vlm, name, way)) for way in ways), default=0)


def step_seconds(metrics: Path) -> dict[str, float]:
    """Return the median time of an optimizer step of each stage, from metrics.csv."""
    times: dict[str, list[float]] = {}
    for row in read_table(metrics):
        if row.get("step_seconds"):
            times.setdefault(row["stage"], []).append(float(row["step_seconds"]))
    return {stage: round(statistics.median(each), 4) for stage, each in times.items()}
