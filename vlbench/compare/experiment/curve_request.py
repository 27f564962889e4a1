"""`curve=visual_tokens:4,16,64`: the budgets at which every row of a comparison is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from vlbench.compare.report.curve_plan import CURVE_LABELS
from vlbench.compare.report.finished_runs import MATCH_TOLERANCE
from vlbench.errors import UserError, suggest_name

MAX_VALUES = 32  # of a curve
MAX_VALUE = 10**18


@dataclass(frozen=True)
class CurveRequest:
    """A budget, and the values that every row is to have of it."""

    budget: str
    """One of `CURVE_LABELS`."""
    values: tuple[int, ...]
    """In rising order."""

    @property
    def word(self) -> str:
        """The request as it is typed."""
        return f"curve={self.budget}:{','.join(map(str, self.values))}"


def parse_curve(text: str | None) -> CurveRequest | None:
    """Return the request of `curve=NAME:VALUE,VALUE,...`, None without one."""
    if text is None:
        return None
    budget, _, listed = text.partition(":")
    if budget not in CURVE_LABELS:
        raise UserError(
            f"curve must be one of {', '.join(CURVE_LABELS)}, then a colon and values, as in "
            f"visual_tokens:4,16,64; given '{text}'.{suggest_name(budget, CURVE_LABELS)}"
        )
    values = sorted(filter(None, (_parse_value(word) for word in listed.split(","))))
    if len(values) != listed.count(",") + 1 or not 2 <= len(values) <= MAX_VALUES:
        raise UserError(
            f"curve is '{text}'; wanted are 2 to {MAX_VALUES} whole numbers of at least 1 behind "
            f"the colon, as in {budget}:4,16,64 or {budget}:1e9,4e9"
        )
    for low, high in pairwise(values):
        if high <= (1 + MATCH_TOLERANCE) * low:
            raise UserError(
                f"curve is '{text}': {low:,} and {high:,} are the same budget within "
                f"{MATCH_TOLERANCE:.0%}; leave one out"
            )
    return CurveRequest(budget, tuple(values))


def _parse_value(word: str) -> int | None:
    """Return a whole number of at least 1, also of 4e9; None for anything else."""
    try:
        number = float(word)
    except ValueError:
        return None
    in_range = math.isfinite(number) and 1 <= number <= MAX_VALUE
    return int(number) if in_range and number.is_integer() else None
