"""Two rows of which one's seeds spread much further: where the statistics promise too much."""

from __future__ import annotations

from collections.abc import Mapping

NOTABLE_RATIO = 3.0
"""Of two standard deviations; so different are those of equal seeds in a fifth of all comparisons
with 3 seeds, and in a twentieth with 5 (F distribution)."""
FALSE_ALARMS = "up to 9 of 100"
"""Of benchmarks/simulated_comparison.md, cells `noisy` with 2 rows; with 4 rows the level holds."""


def unequal_spreads_warning(spreads: Mapping[str, float | None], question_count: int) -> str:
    """Return a sentence on two rows whose seeds spread differently, "" for others.

    `spreads` are row -> standard deviation of accuracy over its seeds; less than that of one answer
    counts as that.
    """
    known = {name: max(one, 1 / question_count) for name, one in spreads.items() if one is not None}
    if len(spreads) != 2 or len(known) != 2:
        return ""
    calm, restless = sorted(known, key=known.__getitem__)
    ratio = known[restless] / known[calm]
    if ratio < NOTABLE_RATIO:
        return ""
    return (
        f"Seeds of {restless} spread {ratio:.1f} times as far as those of {calm}. If that is no "
        f"chance, two equal rows are called different in {FALSE_ALARMS} comparisons instead of 5, "
        "and rows that differ are found less often than is said; more seeds or further rows tell "
        "more."
    )
