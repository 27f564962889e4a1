"""How many false findings do reports bring that are read while seeds are added? Simulated.

    python benchmarks/simulate_looks.py              # a minute

Rows do not differ, and each comparison is judged with 3, 5 and 10 of its seeds. Printed per cell:
how often a pair is significant after Holm's correction at each of them, and at any.
"""

from __future__ import annotations

import itertools

import numpy as np
from simulate_comparison import SIGNIFICANT, judge
from simulated_answers import Cell, Population

LOOKS = (3, 5, 10)
TRIALS = 600


def measure_cell(cell: Cell) -> np.ndarray:
    """Return the shares of comparisons with a false finding at each of `LOOKS`, and at any."""
    rng, population = cell.generator("looks"), Population(cell)
    found = np.zeros(len(LOOKS) + 1)
    for _ in range(TRIALS):
        correct, pictures, _ = population.draw(rng)
        said = [judge(correct[:, :seeds], pictures, False).corrected for seeds in LOOKS]
        alarms = [bool((one <= SIGNIFICANT).any()) for one in said]
        found += [*alarms, any(alarms)]
    return found / TRIALS


def main() -> None:
    """Measure some cells and print a line for each."""
    print(f"| rows | accuracy | seeds' sd | {' | '.join(map(str, LOOKS))} | any |")
    print(f"|{'---:|' * (len(LOOKS) + 4)}")
    for rows, (accuracy, sd) in itertools.product((2, 4), ((0.9, 0.1), (0.9, 0.3), (0.5, 0.1))):
        cell = Cell("plain", rows, max(LOOKS), accuracy, sd)
        shares = " | ".join(f"{100 * share:.1f}" for share in measure_cell(cell))
        print(f"| {rows} | {accuracy:g} | {sd:g} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
