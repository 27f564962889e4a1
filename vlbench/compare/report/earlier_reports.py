"""How often a comparison was looked at while seeds were added, as its own reports tell.

Seeds that are added until a difference is found find one by chance more often than the level says:
every look is one more chance (Armitage, McPherson and Rowe 1969, doi:10.2307/2343787).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench.compare.report.row_pairs import format_count, join_words
from vlbench.errors import UserError
from vlbench.text_files import read_json

LOOKS_KEY = "looks"  # of report.json: numbers of seeds of the reports until then, rising
FALSE_ALARMS = "4 to 10 of 100"
"""Comparisons of equal rows with a significant pair in any of the reports with 3, 5 and 10 seeds,
by benchmarks/simulate_looks.py."""


def count_looks(report_file: Path, seed_count: int) -> list[int]:
    """Return the numbers of seeds of the reports in a folder, with that of the one to be written.

    `report_file` is the last report as JSON; one that is not there, or not ours, counts as none.
    """
    report: dict[str, Any] = {}
    with contextlib.suppress(UserError, OSError):
        report = read_json(report_file)
    seeds = report.get("seeds")
    looks = report.get(LOOKS_KEY, [len(seeds)] if isinstance(seeds, list) else [])
    known = [one for one in looks if type(one) is int] if isinstance(looks, list) else []
    return [*(one for one in known if 0 < one < seed_count), seed_count]


def looks_note(looks: Sequence[int]) -> list[str]:
    """Return a sentence if there were reports with fewer seeds, else []."""
    *earlier, last = looks
    if not earlier:
        return []
    before = join_words([str(one) for one in earlier], "and")
    return [
        f"Seeds were added: there were reports with {before}, this one has {last}. Where they are "
        "added until a difference is found, one is found by chance in "
        f"{FALSE_ALARMS} comparisons instead of 5 (simulated with 3, 5 and 10 seeds). What counts "
        f"is a number of seeds that was fixed beforehand, or {format_count(last, 'new seed')}."
    ]
