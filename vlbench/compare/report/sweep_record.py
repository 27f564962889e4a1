"""sweep.json: the learning rates that rows tried, and those that their runs were trained with."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from vlbench.errors import UserError
from vlbench.strict_values import FileRecord
from vlbench.text_files import read_json, write_atomically

SWEEP_FILE = "sweep.json"  # in the folder of a comparison


class TrialRecord(FileRecord):
    """A trial: the factor of each part's learning rate, and what it came to."""

    factors: dict[str, float]
    loss: float | None
    """The last held-out loss; None for a trial that failed."""


class RowSweep(FileRecord):
    """The trials of a row, and the factors that its runs have."""

    trials: list[TrialRecord]
    chosen: dict[str, float] | None
    """Those of one of the trials that did not fail; None: the recipe's own rates."""

    def loss_of(self, factors: dict[str, float] | None) -> float | None:
        """Return the loss of a trial, None where there is none."""
        return next((trial.loss for trial in self.trials if trial.factors == factors), None)


class SweepRecord(FileRecord):
    """The file's content."""

    seed: int | None = None
    """Of all trials; None where there are none."""
    rows: dict[str, RowSweep] = {}
    """Name of the row -> its sweep."""


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record in the folder of a comparison; one without rows where there is none."""
    file = folder / SWEEP_FILE
    if not file.is_file():
        return SweepRecord()
    try:
        record = SweepRecord.model_validate(read_json(file))
    except ValidationError as error:
        raise UserError(f"{file}: is no record of a sweep") from error
    rows = record.rows.values()
    if any(row.chosen is not None and row.loss_of(row.chosen) is None for row in rows):
        raise UserError(f"{file}: is no record of a sweep")
    return record


def write_sweep(folder: Path, record: SweepRecord) -> None:
    """Write the record into the folder of a comparison."""
    write_atomically(folder / SWEEP_FILE, record.model_dump_json(indent=1))
