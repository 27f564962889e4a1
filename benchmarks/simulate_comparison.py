"""Do the statistics of a comparison keep what they promise? Simulated, with answers of our own.

    python benchmarks/simulate_comparison.py                      # all cells, about half an hour
    python benchmarks/simulate_comparison.py short=true           # a few cells, a minute
    python benchmarks/simulate_comparison.py only='seeds=3 acc=0.99' trials=4000

Every cell is a design (rows, seeds, questions) in a world (accuracy, spread of seeds, kind of
questions: `simulated_answers.py`). Printed per cell: how often 95 % intervals of rows and of
differences hold the truth; how often a family of equal rows has a significant pair; the printed
smallest detectable difference; and how often a pair that differs by it is found, with all pairs
corrected by Holm. With one seed the truth is that of the runs drawn.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
from simulated_answers import Cell, Population, choose_cells

COVERAGE_BAR, ALARM_BAR, POWER_BAR = (0.93, 0.99), 0.06, (0.75, 0.90)
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the statistics said of one trial: arrays over rows, or over pairs of rows."""

    row_ends: np.ndarray
    """`[rows, 2]`"""
    pair_ends: np.ndarray
    """`[pairs, 2]`, of the first row less the second."""
    corrected: np.ndarray
    """`[pairs]`, after Holm."""
    detectable: float
    """The smallest detectable difference, as printed for the first pair."""


def judge(correct: np.ndarray, pictures: np.ndarray, need_detectable: bool) -> Verdict:
    """Ask the package's statistics, unchanged, about one comparison."""
    from vlbench.compare.report.paired_statistics import RowStatistics, holm_correction

    statistics = RowStatistics(correct, pictures)
    pairs = itertools.combinations(range(len(correct)), 2)
    found = [statistics.difference(first, second) for first, second in pairs]
    return Verdict(
        row_ends=np.array([statistics.accuracy_interval(row)[1:] for row in range(len(correct))]),
        pair_ends=np.array([(one.interval_low, one.interval_high) for one in found]),
        corrected=np.array(holm_correction([one.p_value for one in found])),
        detectable=found[0].smallest_detectable if need_detectable else float("nan"),
    )


@dataclass(frozen=True)
class Measured:
    """The figures of one cell, as shares of its trials."""

    cell: Cell
    row_coverage: float
    pair_coverage: float
    false_alarms: float
    detectable: float
    power: float

    @property
    def missed(self) -> list[str]:
        """The bars that the cell misses; with one seed, coverage has none."""
        low, high = COVERAGE_BAR
        cases = {"false alarms": self.false_alarms > ALARM_BAR}
        if self.cell.seeds > 1:
            cases["rows"] = not low <= self.row_coverage <= high
            cases["pairs"] = not low <= self.pair_coverage <= high
        cases["power"] = self.power < POWER_BAR[0] or self.power > POWER_BAR[1]
        return [name for name, is_missed in cases.items() if is_missed]

    def line(self) -> str:
        """Return the cell's line of the table."""
        cell = self.cell
        return (
            f"| {cell.kind} | {cell.rows} | {cell.seeds} | {cell.questions} | {cell.accuracy:g} | "
            f"{cell.seed_sd:g} | {100 * self.row_coverage:.1f} | {100 * self.pair_coverage:.1f} | "
            f"{100 * self.false_alarms:.1f} | {100 * self.detectable:.2f} | "
            f"{100 * self.power:.0f} | {', '.join(self.missed)} |"
        )


HEADER = [
    "| kind | rows | seeds | questions | accuracy | seeds' sd | rows hold | pairs hold | false "
    "alarms | detectable, points | found | missed |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
]


def measure_cell(cell: Cell, trials: int) -> Measured:
    """Simulate families of equal rows, then some in which two differ by what is printed."""
    rng, population = cell.generator("equal"), Population(cell)
    pairs = np.array(list(itertools.combinations(range(cell.rows), 2)))
    row_hits = pair_hits = alarms = 0.0
    detectable = []
    for trial in range(trials):
        correct, pictures, truths = population.draw(rng)
        said = judge(correct, pictures, trial < max(50, trials // 4))
        gaps = truths[pairs[:, 0]] - truths[pairs[:, 1]]
        row_hits += np.mean((said.row_ends[:, 0] <= truths) & (truths <= said.row_ends[:, 1]))
        pair_hits += np.mean((said.pair_ends[:, 0] <= gaps) & (gaps <= said.pair_ends[:, 1]))
        wrong = said.corrected <= SIGNIFICANT
        if cell.seeds == 1:  # runs do differ: wrong is what lies on the other side
            wrong &= (said.pair_ends.sum(axis=1) > 0) != (gaps > 0)
        alarms += bool(wrong.any())
        detectable.append(said.detectable)
    printed = float(np.nanmean(detectable))
    return Measured(
        cell,
        row_hits / trials,
        pair_hits / trials,
        alarms / trials,
        printed,
        measure_power(cell, printed, max(200, trials // 2)),
    )


def measure_power(cell: Cell, difference: float, trials: int) -> float:
    """Return how often the first row is found better than the second, which it is by this much."""
    if difference > max(cell.accuracy, 1 - cell.accuracy):  # no row can be so far away
        return float("nan")
    rng, population = cell.generator("differ"), Population(cell, difference)
    found = 0
    for _ in range(trials):
        correct, pictures, _ = population.draw(rng)
        said = judge(correct, pictures, False)
        found += bool(said.corrected[0] <= SIGNIFICANT and said.pair_ends[0].sum() > 0)
    return found / trials


def list_cells(short: bool) -> list[Cell]:
    """Return the cells of the table."""
    if short:
        return [
            Cell("plain", 4, 3, 0.9, 0.3),
            Cell("pictures", 2, 3, 0.9, 0.3),
            Cell("noisy", 4, 3, 0.5, 0.3),
            Cell("few", 4, 3, 0.99, 0.3, 30),
        ]
    rows, seeds, accuracies, sds = (2, 4, 8), (3, 5, 10), (0.5, 0.9, 0.99), (0.1, 0.3, 1.0)
    cells = [Cell("plain", *one) for one in itertools.product(rows, seeds, accuracies, sds)]
    for kind in ("pictures", "bimodal", "noisy"):
        cells += [Cell(kind, *one) for one in itertools.product(rows, seeds, accuracies, sds[1:2])]
    cells += [Cell("pictures", 4, 3, accuracy, 0.0) for accuracy in accuracies]
    cells += [Cell("plain", 2, count, accuracy, 0.0) for count in seeds for accuracy in accuracies]
    cells += [Cell("shared", 4, count, 0.9, 0.3) for count in seeds]
    few = itertools.product((2, 4), (3, 5), accuracies, sds[1:2], (10, 30, 60))
    cells += [Cell("few", *one) for one in few]
    ones = itertools.product(("plain", "pictures"), rows, (1,), accuracies, (0.0,))
    return cells + [Cell(*one) for one in ones]


def main() -> None:
    """Measure the chosen cells and print the table."""
    cells, trials = choose_cells(list_cells, 400, 2000)
    print(*HEADER, sep="\n", flush=True)
    started = time.monotonic()
    for cell in cells:
        print(measure_cell(cell, trials).line(), flush=True)
    print(f"{len(cells)} cells, {trials} trials each, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
