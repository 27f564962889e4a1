"""What a learning-rate sweep found, as its comparison's folder tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.text_files import read_json

SWEEP_FILE = "sweep.json"  # in the folder of a comparison: losses of the learning rates tried
SWEEP_FOLDER = "sweep"  # where the runs that tried them are
SWEEP_SEED = 4_000_000_000  # of all trials: far from the seeds that anybody counts up
TIE_TOLERANCE = 0.01
"""Relative difference of two held-out losses of 64 samples that one seed cannot tell apart."""
SEVERAL_PARTS = "learning rates"


def describe_factors(factors: Mapping[str, float]) -> str:
    """Return "x 0.3", or "connector x 0.3, language x 1" where other parts are tried, too."""
    if list(factors) == ["connector"]:
        return f"x {factors['connector']:g}"
    return ", ".join(f"{part} x {factor:g}" for part, factor in factors.items())


def describe_sweep(folder: Path) -> list[str]:
    """Return sentences on the learning rates that were tried and chosen; [] without a sweep.

    The first one has all losses; then come ties, and choices at the edge of what was tried.
    """
    file = folder / SWEEP_FILE
    if not file.is_file():
        return []
    sweep = read_json(file)
    try:
        rows = {name: (row["trials"], row["chosen"]) for name, row in sweep["rows"].items()}
        factors: dict[str, list[float]] = sweep["factors"]
        told = [_tell_losses(name, *row) for name, row in rows.items()]
        further = [
            sentence
            for name, (trials, chosen) in rows.items()
            if chosen
            for sentence in (*_tell_ties(name, trials, chosen), *_tell_edges(name, factors, chosen))
        ]
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{file}: is no record of a sweep") from error
    parts = "connector's learning rate" if list(factors) == ["connector"] else SEVERAL_PARTS
    first = (
        f"Every row tried its {parts} times some factors, with seed {sweep['seed']}; the lowest "
        f"held-out loss decides. {'; '.join(told)}."
    )
    return [first, *further]


def _tell_losses(
    name: str, trials: Sequence[dict[str, Any]], chosen: Mapping[str, float] | None
) -> str:
    losses = "; ".join(
        f"{describe_factors(trial['factors'])} "
        f"{'failed' if trial['loss'] is None else format(trial['loss'], '.4f')}"
        for trial in trials
    ).replace("; x", ", x")
    taken = "none" if chosen is None else describe_factors(chosen)
    return f"{name} {losses}: {taken} is taken"


def _tell_ties(
    name: str, trials: Sequence[dict[str, Any]], chosen: Mapping[str, float]
) -> list[str]:
    """Return a sentence if other trials were as good as the chosen one, else []."""
    best = next(trial["loss"] for trial in trials if trial["factors"] == chosen)
    tied = [
        describe_factors(trial["factors"])
        for trial in trials
        if trial["factors"] != chosen
        and trial["loss"] is not None
        and trial["loss"] <= best * (1 + TIE_TOLERANCE)
    ]
    if not tied:
        return []
    return [
        f"Tie in the sweep of {name}: {' and '.join(tied)} came within {TIE_TOLERANCE:.0%} of "
        f"{describe_factors(chosen)}."
    ]


def _tell_edges(
    name: str, factors: Mapping[str, Sequence[float]], chosen: Mapping[str, float]
) -> list[str]:
    """Return a sentence for every part whose best factor was the smallest or the largest tried."""
    sentences = []
    for part, tried in factors.items():
        ordered, best = sorted(tried), chosen[part]
        if best not in (ordered[0], ordered[-1]):
            continue
        neighbour = ordered[1] if best == ordered[0] else ordered[-2]
        wider = sorted({*ordered, float(f"{best * best / neighbour:.1g}")})
        key = "sweep" if part == "connector" else f"sweep.{part}"
        sentences.append(
            f"The best rate of {name} is at the edge of what was tried ({part} x {best:g}): a "
            f"better one may lie beyond; widen it, as {key}={','.join(f'{f:g}' for f in wider)}."
        )
    return sentences
