"""What `check` finds: written down as it is found, so that a million findings take no memory."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TextIO

from vlbench.data.sample import Sample
from vlbench.errors import BadSample
from vlbench.text_files import format_json_lines

REFUSED, CUT, TWICE, ODD = "refused", "cut", "twice", "odd"
KIND_MEANINGS = {
    REFUSED: "training leaves it out",
    CUT: "it is too long; training uses its beginning",
    TWICE: "it is repeated",
    ODD: "it can be learned from, but probably not as intended",
}
MAX_FINDINGS_PRINTED = 5  # of each kind; all are in findings.jsonl


@dataclass(frozen=True)
class DataFinding:
    """One problem of a sample or a source."""

    kind: str
    """One of the keys of `KIND_MEANINGS`."""
    source: str
    sample: str
    what: str
    """The problem, as a clause."""
    stage: str = ""
    """The stage that has the problem; empty for all stages."""
    record: int | None = None
    """Number of the record in the source, from 1."""

    def as_bad_sample(self) -> BadSample:
        """Return it as the error with which training names it."""
        return BadSample(self.sample, self.what).with_origin(self.source, self.record)


def make_finding(
    sample: Sample, kind: str, source_name: str, description: str, stage: str = ""
) -> DataFinding:
    """Return a finding about a sample."""
    return DataFinding(
        kind,
        source_name,
        sample.id,
        description,
        stage,
        sample.origin and sample.origin.record_number,
    )


class FindingLog:
    """All findings in a file of JSON lines, and in memory what the summary needs."""

    def __init__(self, lines: TextIO) -> None:
        """Write findings to `lines` as they are added."""
        self._lines = lines
        self.counts: Counter[str] = Counter()
        """Number of findings of each kind."""
        self.first_ones: defaultdict[str, list[DataFinding]] = defaultdict(list)
        """The first findings of each kind."""

    def add(self, finding: DataFinding) -> None:
        """Write a finding down."""
        self._lines.write(format_json_lines([asdict(finding)]))
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= MAX_FINDINGS_PRINTED:
            self.first_ones[finding.kind].append(finding)


@dataclass
class RefusedSamples:
    """The samples of a source that stages refuse: their numbers, and the first ones."""

    _first: dict[str, BadSample] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def note(self, finding: DataFinding) -> None:
        """Count a finding, if it is of a refused sample."""
        if finding.kind == REFUSED:
            self._counts[finding.stage] += 1
            self._first.setdefault(finding.stage, finding.as_bad_sample())

    def of_stage(self, stage: str) -> tuple[list[BadSample], int]:
        """Return the first of the samples that a stage refuses, and their number."""
        first = [self._first[key] for key in ("", stage) if key in self._first]
        first.sort(key=lambda bad: bad.record_number or 0)
        return first[:1], self._counts[""] + self._counts[stage]
