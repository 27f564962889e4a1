"""What a learning-rate sweep found, as its comparison's folder tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlbench.compare.report.nested_files import files_below
from vlbench.compare.report.row_pairs import join_words
from vlbench.compare.report.sweep_record import RowSweep, read_sweep

SWEEP_FOLDER = "sweep"  # in the folder of a comparison: the runs that tried learning rates
SWEEP_SEED = 4_000_000_000  # of all trials: far from the seeds that anybody counts up
TIE_TOLERANCE = 0.01
"""Relative difference of two held-out losses of 64 samples that one seed cannot tell apart."""
SEVERAL_PARTS = "learning rates"


def describe_factors(factors: Mapping[str, float]) -> str:
    """Return "x 0.3", or "connector x 0.3, language x 1" where other parts are tried, too."""
    if list(factors) == ["connector"]:
        return f"x {factors['connector']:g}"
    return ", ".join(f"{part} x {factor:g}" for part, factor in factors.items())


def describe_sweep(folder: Path, row_names: Sequence[str] | None = None) -> list[str]:
    """Return sentences on the learning rates that rows tried and took; [] if none did.

    The rows are those of a comparison, by default those of the finished runs in its folder. The
    first sentence has all losses; then come rows that tried nothing, ties, choices at the edge of
    what was tried, and rows that keep other rates than the best, as their runs were begun.
    """
    record = read_sweep(folder)
    if not record.rows:
        return []
    names = _finished_rows(folder) if row_names is None else row_names
    rows = {name: record.rows[name] for name in names if name in record.rows}
    if not rows:
        return []
    untried = [name for name in names if name not in rows]
    parts = {tuple(trial.factors) for row in rows.values() for trial in row.trials}
    tried = "connector's learning rate" if parts == {("connector",)} else SEVERAL_PARTS
    subject = f"{join_words(list(rows), 'and')} tried {'its' if len(rows) == 1 else 'their'}"
    sentences = [
        f"{subject if untried else 'Every row tried its'} {tried} times some factors, with seed "
        f"{record.seed}; the lowest held-out loss decides. "
        f"{'; '.join(_tell_losses(name, row) for name, row in rows.items())}."
    ]
    if untried:
        sentences.append(
            f"No learning rate was tuned for {join_words(untried, 'and')}: a rate that suits one "
            "connector may cost another several points."
        )
    for name, row in rows.items():
        kept = _tell_kept(name, row)
        sentences += kept or [*_tell_ties(name, row), *_tell_edges(name, row)]
    return sentences


def _finished_rows(folder: Path) -> list[str]:
    """Return the names of rows that have finished runs: their folders, within the comparison's."""
    runs = [file.parent for file in files_below(folder, "results.json")]
    rows = [run.parent for run in runs if run.name.startswith("seed") and run != folder]
    return list(dict.fromkeys(row.relative_to(folder).as_posix() for row in rows))


def _describe_choice(chosen: Mapping[str, float] | None) -> str:
    return "the recipe's rates" if chosen is None else describe_factors(chosen)


def _tell_losses(name: str, row: RowSweep) -> str:
    losses = "; ".join(
        f"{describe_factors(trial.factors)} "
        f"{'failed' if trial.loss is None else format(trial.loss, '.4f')}"
        for trial in row.trials
    ).replace("; x", ", x")
    taken = "none" if row.chosen is None else describe_factors(row.chosen)
    return f"{name} {losses}: {taken} is taken"


def _tell_kept(name: str, row: RowSweep) -> list[str]:
    """Return a sentence if a trial is better than the one whose rates the row's runs have."""
    losses = [(trial.loss, trial.factors) for trial in row.trials if trial.loss is not None]
    if not losses:
        return []
    best_loss, best = min(losses, key=lambda one: one[0])
    chosen_loss = row.loss_of(row.chosen)
    if chosen_loss is not None and chosen_loss <= best_loss:
        return []
    own = "" if chosen_loss is None else f", not {chosen_loss:.4f}"
    return [
        f"{name} keeps {_describe_choice(row.chosen)}, with which its runs were begun; by now "
        f"{describe_factors(best)} has a lower held-out loss ({best_loss:.4f}{own}). Only a "
        "comparison in a new folder, run=DIR, would take it."
    ]


def _tell_ties(name: str, row: RowSweep) -> list[str]:
    """Return a sentence if other trials were as good as the chosen one, else []."""
    best = row.loss_of(row.chosen)
    if row.chosen is None or best is None:
        return []
    tied = [
        describe_factors(trial.factors)
        for trial in row.trials
        if trial.factors != row.chosen
        and trial.loss is not None
        and trial.loss <= best * (1 + TIE_TOLERANCE)
    ]
    if not tied:
        return []
    return [
        f"Tie in the sweep of {name}: {' and '.join(tied)} came within {TIE_TOLERANCE:.0%} of "
        f"{describe_factors(row.chosen)}."
    ]


def _tell_edges(name: str, row: RowSweep) -> list[str]:
    """Return a sentence for every part whose best factor was the smallest or the largest tried."""
    sentences = []
    chosen = row.chosen or {}
    alike = [trial.factors for trial in row.trials if trial.factors.keys() == chosen.keys()]
    for part, best in chosen.items():
        ordered = sorted({factors[part] for factors in alike})
        if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
            continue
        neighbour = ordered[1] if best == ordered[0] else ordered[-2]
        wider = sorted({*ordered, float(f"{best * best / neighbour:.1g}")})
        key = "sweep" if part == "connector" else f"sweep.{part}"
        sentences.append(
            f"The best rate of {name} is at the edge of what was tried ({part} x {best:g}): a "
            f"better one may lie beyond; widen it, as {key}={','.join(f'{f:g}' for f in wider)}."
        )
    return sentences
