"""Do intervals of crossings and frontiers of budget curves keep their promise? Simulated.

    python benchmarks/simulate_curves.py                          # all cells
    python benchmarks/simulate_curves.py short=true               # a few cells, a minute
    python benchmarks/simulate_curves.py only='steep seeds=3' trials=2000

Two curves are drawn over their budgets; what they answer comes from `simulated_answers.py`, which
shares nothing with the statistics. Printed per cell:

    set holds      how often the true crossing is among the budgets at which the curves are not told
                   apart
    interval holds how often the interval that the report gives for a crossing of the means does, of
                   the comparisons whose means cross
    bounded        how often that interval ends on both sides within the budgets measured
    width          its median factor from end to end, where bounded
    claimed        how often the report says that one overtakes the other, without "may be chance"
    wrong          how often it says so where nothing crosses, or the wrong one
    frontier holds how often the truly best row is among those that may be best, over the budgets
    reversed steps how often a step is called more than chance in the wrong direction, or where the
                   curve is flat, in any step of the two curves
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from simulated_answers import Cell, Population, choose_cells


@dataclass(frozen=True)
class World:
    """Two curves whose true accuracies are known, and where they cross."""

    budgets: tuple[int, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    crossing: float | None
    """Where the first one overtakes; of the straight lines, or of the smooth curves behind them."""


def logistic_curve(budgets: tuple[int, ...], low: float, high: float, middle: float) -> list[float]:
    """Return accuracies that rise smoothly over the log budget."""
    at = np.log2(np.array(budgets)) - middle
    return list(low + (high - low) / (1 + np.exp(-at)))


def smooth_world() -> World:
    """Return two smooth curves: the straight lines between their points cross elsewhere."""
    budgets = (4, 16, 64, 256)
    first = logistic_curve(budgets, 0.4, 0.92, 5.0)
    second = logistic_curve(budgets, 0.55, 0.80, 3.5)
    fine = np.geomspace(4, 256, 20_001)
    gap = np.array(logistic_curve(tuple(fine), 0.4, 0.92, 5.0))
    gap -= np.array(logistic_curve(tuple(fine), 0.55, 0.80, 3.5))
    return World(budgets, tuple(first), tuple(second), float(fine[np.argmax(gap > 0)]))


def straight_world(first: tuple[float, ...], second: tuple[float, ...]) -> World:
    """Return curves that are straight lines between 4, 16, 64, ... and cross once or never."""
    budgets = tuple(4**power for power in range(1, len(first) + 1))
    gap = np.array(first) - np.array(second)
    crossing = None
    for index in range(len(gap) - 1):
        if gap[index] < 0 < gap[index + 1]:
            share = gap[index] / (gap[index] - gap[index + 1])
            crossing = float(budgets[index] * (budgets[index + 1] / budgets[index]) ** share)
    return World(budgets, first, second, crossing)


WORLDS = {
    "steep": straight_world((0.55, 0.75, 0.90), (0.70, 0.72, 0.74)),
    "slow": straight_world((0.70, 0.75, 0.80), (0.74, 0.76, 0.78)),
    "late": straight_world((0.60, 0.68, 0.76, 0.88), (0.72, 0.76, 0.80, 0.83)),
    "high": straight_world((0.90, 0.96, 0.99), (0.95, 0.955, 0.96)),
    "smooth": smooth_world(),
    "equal": straight_world((0.70, 0.70, 0.70), (0.70, 0.70, 0.70)),
    "apart": straight_world((0.60, 0.70, 0.80), (0.65, 0.75, 0.85)),
    "touch": straight_world((0.70, 0.75, 0.80), (0.80, 0.75 + 1e-9, 0.80 + 1e-9)),
}
"""Name -> world: steep, slow, late and near the ceiling; smooth; without any crossing."""


@dataclass(frozen=True)
class CurveCell:
    """A world and a design: one line of the table."""

    world: str
    kind: str
    seeds: int
    seed_sd: float
    questions: int = 1200

    @property
    def answers(self) -> Cell:
        """The cell of answers, with a row for each point."""
        rows = 2 * len(WORLDS[self.world].budgets)
        return Cell(self.kind, rows, self.seeds, 0.75, self.seed_sd, self.questions)

    @property
    def name(self) -> str:
        """The words by which `only=` selects the cell."""
        return (
            f"{self.world} {self.kind} seeds={self.seeds} sd={self.seed_sd:g} "
            f"questions={self.questions}"
        )


class Judge:
    """Asks the package's statistics, unchanged, about comparisons of one world."""

    def __init__(self, world: World) -> None:
        """Plan the points."""
        from vlbench.compare.report.curve_plan import CurvePlan, CurvePoint

        self.world = world
        self.plan = CurvePlan(
            "visual_tokens",
            tuple(
                CurvePoint(curve, budget, budget, f"{curve}/{budget}")
                for curve in ("first", "second")
                for budget in world.budgets
            ),
        )

    def counts(self, correct: np.ndarray, pictures: np.ndarray) -> dict[str, float]:
        """Return what the statistics said of one comparison, as numbers for the columns."""
        from vlbench.compare.report.curve_analysis import analyze_curves
        from vlbench.compare.report.paired_statistics import RowStatistics
        from vlbench.compare.report.row_pairs import compare_pairs

        plan, statistics = self.plan, RowStatistics(correct, pictures)
        names = [point.name for point in plan.points]
        tested = compare_pairs(names, statistics, plan.number_pairs(names, plan.tested_pairs()))
        found = analyze_curves(plan, names, statistics, tested, [])
        (pair,) = found.curve_pairs
        crossed = [one for one in pair.undecided if one.crossings]
        claimed = [one for one in crossed if pair.is_certain(one)]
        true = self.world.crossing
        said: dict[str, float] = {
            "claimed": bool(claimed),
            "wrong": any(true is None or not one.first_rises for one in claimed),
            "frontier": np.mean(self._frontier_hits(found.frontiers[0].cells, names)),
            "reversed": self._has_reversed_step(found.curves),
        }
        if true is not None:
            said["set"] = any(one.low <= true <= one.high for one in pair.undecided)
            if crossed:
                said["interval"] = any(one.low <= true <= one.high for one in crossed)
        if crossed:
            said["bounded"] = all(one.is_bounded for one in crossed)
            if said["bounded"]:
                said["width"] = max(one.high / one.low for one in crossed)
        return said

    def _frontier_hits(self, cells, names) -> list[bool]:
        truths = np.array([*self.world.first, *self.world.second])
        hits = []
        for cell in cells:
            affordable = [
                index for index, point in enumerate(self.plan.points) if point.value <= cell.budget
            ]
            best = max(affordable, key=lambda index: truths[index])
            hits.append(names[best] in (cell.best, *cell.may_be_best))
        return hits

    def _has_reversed_step(self, curves) -> bool:
        for curve, truths in zip(curves, (self.world.first, self.world.second), strict=True):
            for step, rise in zip(curve.steps, np.diff(truths), strict=True):
                if step.is_significant and (rise == 0 or step.gain.mean * rise < 0):
                    return True
        return False


COLUMNS = {
    "set": "set holds",
    "interval": "interval holds",
    "bounded": "bounded",
    "width": "width",
    "claimed": "claimed",
    "wrong": "wrong",
    "frontier": "frontier holds",
    "reversed": "reversed steps",
}


def measure_cell(cell: CurveCell, trials: int) -> str:
    """Simulate comparisons of a cell and return its line of the table."""
    world, answers = WORLDS[cell.world], cell.answers
    rng = answers.generator(cell.name)
    population = Population(answers, accuracies=[*world.first, *world.second])
    judge = Judge(world)
    said: dict[str, list[float]] = {key: [] for key in COLUMNS}
    for _ in range(trials):
        correct, pictures, _ = population.draw(rng)
        for key, value in judge.counts(correct, pictures).items():
            said[key].append(float(value))
    texts = []
    for key, values in said.items():
        if not values:
            texts.append("")
        elif key == "width":
            texts.append(f"{np.median(values):.2f}")
        else:
            texts.append(f"{100 * np.mean(values):.1f}")
    place = "" if world.crossing is None else f"{world.crossing:.1f}"
    return (
        f"| {cell.world} | {place} | {cell.kind} | {cell.seeds} | {cell.seed_sd:g} | "
        f"{cell.questions} | {' | '.join(texts)} |"
    )


def list_cells(short: bool) -> list[CurveCell]:
    """Return the cells of the table."""
    if short:
        return [CurveCell("steep", "plain", 3, 0.3), CurveCell("equal", "plain", 3, 0.3)]
    cells = []
    for world in WORLDS:
        cells += [CurveCell(world, "plain", seeds, 0.3) for seeds in (3, 5, 10)]
        cells += [CurveCell(world, "plain", 3, sd) for sd in (0.1, 1.0)]
        cells += [CurveCell(world, "pictures", 3, 0.3), CurveCell(world, "plain", 3, 0.3, 300)]
    return cells


def main() -> None:
    """Measure the chosen cells and print the table."""
    cells, trials = choose_cells(list_cells, 200, 1000)
    heads = ["world", "true crossing", "kind", "seeds", "seeds' sd", "questions", *COLUMNS.values()]
    print(f"| {' | '.join(heads)} |", f"|---|---:|---|{'---:|' * 11}", sep="\n", flush=True)
    started = time.monotonic()
    for cell in cells:
        print(measure_cell(cell, trials), flush=True)
    print(f"{len(cells)} cells, {trials} trials each, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
