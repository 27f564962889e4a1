"""Compare the orders that README.md expects with those of a report: Kendall's tau, and reversals.

python docs/studies/connectors_tiny/check_orders.py runs/connectors_tiny/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MLP, SHUFFLE, POOL_16, POOL_4 = "llava_mlp", "pixel_shuffle", "avgpool pool=2", "avgpool pool=4"
RESAMPLER, CROSS = "resampler", "cross_attention"
EXPECTED = {  # family -> pairs of rows, the better one first
    "glyphs": [
        *((MLP, POOL_16), (MLP, POOL_4), (SHUFFLE, POOL_16), (SHUFFLE, POOL_4)),
        (POOL_16, POOL_4),
    ],
    "crowd": [(MLP, POOL_16), (MLP, POOL_4), (POOL_16, POOL_4)],
    "place": [(MLP, RESAMPLER), (POOL_16, RESAMPLER)],
    "fine": [(SHUFFLE, POOL_16)],
    "many": [(CROSS, MLP)],  # for each FLOP of the prefill
}
LEAST_TAU = 0.7
FLAT = ("gist", 0.02)
"""The family in which all rows are expected to be alike, and how far apart they may be."""


def main(report_file: str) -> None:
    """Print a line for each family, with the pairs that are the other way round."""
    report = json.loads(Path(report_file).read_text(encoding="utf-8"))
    families = {one["name"]: one for one in report["kinds"] if one["kind"] == "family"}
    flops = {row["name"]: row["budget"]["flops"] for row in report["rows"]}
    for name, pairs in EXPECTED.items():
        scores = _accuracies(families[name])
        if name == "many":
            scores = {row: accuracy / flops[row] for row, accuracy in scores.items()}
        reversed_pairs = [(high, low) for high, low in pairs if scores[high] < scores[low]]
        tau = 1 - 2 * len(reversed_pairs) / len(pairs)
        # a pair may be the other way round for each FLOP alone
        corrected = {
            frozenset((p["worse"], p["better"])): p["p_corrected"] for p in families[name]["pairs"]
        }
        told = [
            f"{low} over {high}, p = {corrected[frozenset((high, low))]:.3g}"
            for high, low in reversed_pairs
        ]
        verdict = "held" if tau >= LEAST_TAU else "not held"
        print(f"{name}: tau {tau:.2f}, {verdict}; reversed: {'; '.join(told) or 'none'}")
    accuracies = _accuracies(families[FLAT[0]])
    spread = max(accuracies.values()) - min(accuracies.values())
    lowest = min(accuracies, key=lambda row: accuracies[row])
    others = [value for row, value in accuracies.items() if row != lowest]
    print(
        f"{FLAT[0]}: {spread:.3f} between all rows, {'held' if spread <= FLAT[1] else 'not held'}; "
        f"{max(others) - min(others):.3f} without {lowest}"
    )


def _accuracies(family: dict[str, Any]) -> dict[str, float]:
    return {row: float(one["accuracy"]) for row, one in family["rows"].items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
