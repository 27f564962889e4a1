"""What a comparison will be able to tell, printed before its runs: the differences it can find."""

from __future__ import annotations

from statistics import mean, variance

from vlbench.compare.experiment.grid import ComparisonGrid
from vlbench.compare.report.detectable_difference import (
    FEW_PICTURES,
    PLANNED_SEEDS,
    ROUGH_FIGURES,
    PlannedDesign,
    describe_detectable,
)
from vlbench.evaluate.heldout_questions import MAX_OWN_QUESTIONS
from vlbench.evaluate.question_count import QuestionCount, count_final_questions
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_results_file import read_results

ASSUMED_ACCURACY = 0.8
ASSUMED_SPREADS: tuple[float, ...] = (0.01, 0.03)
"""Standard deviations of accuracy over seeds: a calm and a restless training."""


def describe_power(grid: ComparisonGrid) -> list[str]:
    """Return lines on the smallest differences that 3, 5 and 10 seeds find; [] for one row."""
    rows, pairs = len(grid.rows), grid.tested_pair_count
    if not pairs:
        return []
    recipe = grid.recipes[grid.rows[0].name]
    limit = recipe.log.questions or MAX_OWN_QUESTIONS
    counted = count_final_questions(recipe.last_stage_data, recipe.log.questions)
    asked, pictures = counted or QuestionCount(limit, limit)
    if not pictures:
        return ["  no question will be asked at the end, so nothing can be told of the rows"]
    accuracy, spreads, source = ASSUMED_ACCURACY, ASSUMED_SPREADS, "assumed"
    by_row = _finished_accuracies(grid)
    if by_row:
        accuracy = mean(value for values in by_row for value in values)
        noise = accuracy * (1 - accuracy) / 2 / pictures
        spreads = (max(0.0, mean(map(variance, by_row)) - noise) ** 0.5,)
        source = "of the finished runs"
    counts = sorted({*PLANNED_SEEDS, len(grid.seeds)} - {1})
    lines = [
        f"  smallest difference found in 80 of 100 such comparisons, after Holm's correction over "
        f"{pairs} pair{'s' if pairs > 1 else ''}, with {_describe_questions(asked, pictures)} and "
        f"{100 * accuracy:.0f} % right ({source}):"
    ]
    for spread in spreads:
        design = PlannedDesign(rows, pictures, accuracy, spread, pairs)
        lines.append(
            f"    if seeds spread by {100 * spread:.1f} points ({source}): "
            f"{describe_detectable(design, counts)}"
        )
    if pictures < FEW_PICTURES:
        lines.append(f"    {ROUGH_FIGURES}")
    if len(grid.seeds) == 1:
        lines.append("    with one seed nothing is said of rows, only of these runs")
    return lines


def _describe_questions(asked: int, pictures: int) -> str:
    if asked == pictures:
        return f"{asked:,} questions about pictures of their own"
    return f"{asked:,} questions about {pictures:,} pictures"


def _finished_accuracies(grid: ComparisonGrid) -> list[list[float]]:
    """Return the accuracies of each row that has several finished seeds."""
    by_row = []
    for row in grid.rows:
        runs = [RunFolder(grid.run_folder(row, seed)) for seed in grid.seeds]
        values = [read_results(run.results_file).get("accuracy") for run in runs if run.is_finished]
        known = [float(value) for value in values if value is not None]
        if len(values) > 1 and len(known) == len(values):
            by_row.append(known)
    return by_row
