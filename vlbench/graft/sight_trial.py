"""`try=true`: a short training on rendered scenes, and whether the grafted model sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlbench.compare.report.paired_statistics import PairedDifference, RowStatistics
from vlbench.compare.report.question_clusters import number_clusters
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageConfig
from vlbench.data.data_sources import SCENES_SOURCE
from vlbench.text_files import read_json_lines

ALIGN_STEPS = 150
"""Most steps of a stage before the last."""
LAST_STEPS = 150
"""Most steps of the last stage."""
MAX_BATCH_SIZE = 32
"""Most samples of a step."""
QUESTIONS = 240
"""Questions about new pictures, as many with blank and with exchanged pictures."""
MARGINS = {"blank": "without a picture", "shuffled": "with another question's picture"}


def trial_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with rendered scenes for data, few steps of few samples."""
    names = list(recipe.stages)
    stages = {
        name: _short_stage(stage, LAST_STEPS if name == names[-1] else ALIGN_STEPS)
        for name, stage in recipe.stages.items()
    }
    data = recipe.data.model_copy(update={"train": SCENES_SOURCE, "mix": None, "val": None})
    log = recipe.log.model_copy(update={"questions": QUESTIONS})
    return recipe.model_copy(update={"stages": stages, "data": data, "log": log})


def _short_stage(stage: StageConfig, most_steps: int) -> StageConfig:
    changes = {
        "steps": min(stage.steps if stage.steps is not None else most_steps, most_steps),
        "epochs": None,
        "data": None,
        "global_batch_size": min(stage.global_batch_size, MAX_BATCH_SIZE),
    }
    return stage.model_copy(update=changes)


def sight_lines(folder: Path) -> list[str]:
    """Return what the answers of a run say: accuracy, and how much of it the pictures give."""
    differences, shares, count = sight_differences(folder)
    lines = [
        f"trial: {folder}, {count} questions about new pictures; right {100 * shares[0]:.1f} %, "
        f"blank {100 * shares[1]:.1f} %, shuffled {100 * shares[2]:.1f} %"
    ]
    for name, found in differences.items():
        low, high = 100 * found.interval_low, 100 * found.interval_high
        lines.append(
            f"  {100 * found.mean:+.1f} points over the same questions {MARGINS[name]} (95 % "
            f"interval {low:.1f} to {high:.1f})"
        )
    sees = all(found.interval_low > 0 for found in differences.values())
    told = (
        "it sees: the pictures change its answers for the better, by more than chance"
        if sees
        else "it does NOT show that it sees: so short a training may be too short, or the graft "
        "does not take"
    )
    return [*lines, told]


def sight_differences(folder: Path) -> tuple[dict[str, PairedDifference], list[float], int]:
    """Return the paired differences to both controls, the three accuracies, and the questions.

    A question is compared with itself; questions about one picture are one cluster.
    """
    by_set: dict[str, dict[str, bool]] = {}
    pictures: dict[str, str] = {}
    for line in read_json_lines(folder / "answers.jsonl"):
        by_set.setdefault(line["set"], {})[line["id"]] = line["correct"]
        if line["set"] == "accuracy":
            pictures[line["id"]] = line["picture"]
    ids = list(pictures)
    rows = [[[by_set[name][one] for one in ids]] for name in ("accuracy", *MARGINS)]
    clusters = number_clusters([pictures[one] for one in ids])
    statistics = RowStatistics(np.array(rows, float), clusters)
    differences = {name: statistics.difference(0, row) for row, name in enumerate(MARGINS, 1)}
    return differences, statistics.accuracies.tolist(), len(ids)
