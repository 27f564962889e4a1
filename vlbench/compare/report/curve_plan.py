"""The plan of a budget curve: which rows are the points of which curve, and what is tested.

`compare curve=...` writes it into the comparison's folder as `curve.json`, so that `report` shows
the same curves.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlbench.errors import UserError
from vlbench.text_files import read_json, write_atomically

CURVE_FILE = "curve.json"
CURVE_LABELS = {
    "visual_tokens": "visual tokens",
    "flops": "FLOPs up to the first answer token",
    "samples": "samples of the last stage",
}
"""Budgets that a curve may be drawn over -> what they are called."""
UNIT_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PLAIN_BELOW = 10_000  # budgets that are written without a prefix


@dataclass(frozen=True)
class CurvePoint:
    """A row of the comparison as the point of a curve."""

    curve: str
    """The row that the curve is drawn of, as it was given."""
    value: int
    """The budget that was asked for."""
    reached: int
    """The budget that it has."""
    row: str
    """The row's name, which is its folder in the comparison's."""

    @property
    def name(self) -> str:
        """The name of the row in reports."""
        return point_name(self.curve, self.value)


@dataclass(frozen=True)
class UnreachedBudget:
    """A budget that a row cannot have, so that its curve lacks the point."""

    curve: str
    value: int
    nearest: tuple[int, ...]
    """The nearest budgets that it can have, below and above."""
    reason: str

    def sentence(self, budget: str) -> str:
        """Return what cannot be had, and what can."""
        near = " and ".join(f"{value:,}" for value in self.nearest)
        return (
            f"{self.curve} cannot have {self.value:,} {CURVE_LABELS[budget]}, nearest "
            f"{'are' if len(self.nearest) > 1 else 'is'} {near}: {self.reason}"
        )


@dataclass(frozen=True)
class CurvePlan:
    """The points of all curves of a comparison."""

    budget: str
    """One of `CURVE_LABELS`."""
    points: tuple[CurvePoint, ...]
    unreached: tuple[UnreachedBudget, ...] = ()

    @property
    def label(self) -> str:
        """What the budget is called."""
        return CURVE_LABELS[self.budget]

    @property
    def curves(self) -> list[str]:
        """The names of the curves, in the order given."""
        return list(dict.fromkeys(point.curve for point in self.points))

    @property
    def values(self) -> list[int]:
        """The budgets that any curve has, in rising order."""
        return sorted({point.value for point in self.points})

    def points_of(self, curve: str) -> list[CurvePoint]:
        """Return the points of a curve, in rising order of the budget."""
        points = [point for point in self.points if point.curve == curve]
        return sorted(points, key=lambda point: point.value)

    def points_by_budget(self) -> list[list[CurvePoint]]:
        """Return the points that have each budget, in rising order of the budgets."""
        return [[point for point in self.points if point.value == value] for value in self.values]

    def tested_pairs(self) -> list[tuple[CurvePoint, CurvePoint]]:
        """Return what is tested: at each budget every two rows that have it.

        Rows of different budgets are no competitors. Of one curve, its steps are tested.
        """
        if len(self.curves) == 1:
            return self.steps()
        return [
            pair for points in self.points_by_budget() for pair in itertools.combinations(points, 2)
        ]

    @property
    def tested_names(self) -> frozenset[frozenset[str]]:
        """The same by the names of the rows."""
        return frozenset(frozenset((one.name, other.name)) for one, other in self.tested_pairs())

    def steps(self) -> list[tuple[CurvePoint, CurvePoint]]:
        """Return the steps of every curve, from a budget to the next one."""
        return [pair for curve in self.curves for pair in itertools.pairwise(self.points_of(curve))]

    def number_pairs(
        self, names: Sequence[str], pairs: Sequence[tuple[CurvePoint, CurvePoint]]
    ) -> list[tuple[int, int]]:
        """Return pairs of points as numbers of the rows with these names."""
        return [(names.index(first.name), names.index(second.name)) for first, second in pairs]

    def only(self, rows: Sequence[str]) -> CurvePlan:
        """Return the plan with the points of some rows alone, as others have not finished."""
        points = tuple(point for point in self.points if point.row in rows)
        return dataclasses.replace(self, points=points)


def write_curve_plan(plan: CurvePlan, folder: Path) -> None:
    """Write a plan into the folder of its comparison."""
    write_atomically(folder / CURVE_FILE, json.dumps(dataclasses.asdict(plan), indent=1))


def load_curve_plan(folder: Path) -> CurvePlan | None:
    """Return the plan in the folder of a comparison, None without one."""
    file = folder / CURVE_FILE
    if not file.is_file():
        return None
    record = read_json(file)
    try:
        points = tuple(CurvePoint(**point) for point in record["points"])
        unreached = tuple(
            UnreachedBudget(**{**one, "nearest": tuple(one["nearest"])})
            for one in record["unreached"]
        )
        texts = [text for point in points for text in (point.curve, point.row)]
        texts += [text for one in unreached for text in (one.curve, one.reason)]
        numbers = [number for point in points for number in (point.value, point.reached)]
        numbers += [number for one in unreached for number in (one.value, *one.nearest)]
        if not all(type(text) is str for text in texts) or record["budget"] not in CURVE_LABELS:
            raise ValueError
        if not points or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError
        return CurvePlan(record["budget"], points, unreached)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: is no plan of a curve; `compare curve=...` writes it") from error


def find_curve_plan(run_folders: Sequence[Path]) -> CurvePlan | None:
    """Return the plan of the comparison that runs are part of, None where they are of none.

    A point lies in COMPARISON/CURVE/BUDGET/SEED, so one of its runs is enough to find the others.
    """
    folders = dict.fromkeys(comparison_of(folder) for folder in run_folders)
    plans = {folder: plan for folder in folders if (plan := load_curve_plan(folder))}
    if len(plans) > 1:
        named = ", ".join(map(str, plans))
        raise UserError(f"the runs are points of the curves of {named}: report one at a time")
    return next(iter(plans.values()), None)


def comparison_of(run_folder: Path) -> Path:
    """Return the folder of the comparison that a point's run would be part of."""
    return Path(run_folder, "..", "..", "..").resolve()


def row_folder_name(run_folder: Path) -> str:
    """Return the name of the row that a point's run would belong to."""
    return "/".join(run_folder.resolve().parts[-3:-1])


def point_name(curve: str, value: int) -> str:
    """Return the name of a point in reports."""
    return f"{curve} at {format_budget(value)}"


def format_budget(value: float) -> str:
    """Return a budget as it is read: "64", "22.6" (three digits of what was estimated), "1.5G"."""
    if value < PLAIN_BELOW:
        whole = float(value).is_integer()
        return f"{value:,.0f}" if whole else f"{float(f'{value:.3g}'):,g}"
    factor, prefix = next(pair for pair in UNIT_PREFIXES if value >= pair[0])
    return f"{value / factor:.4g}{prefix}"
