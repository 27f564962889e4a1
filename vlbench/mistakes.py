"""Mistakes of the user: what is wrong, what was given, what is allowed, said in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Mistake(ValueError):
    """Something that the user can put right; one line of text per mistake, no stack trace."""


class Trouble(RuntimeError):
    """What went wrong on the machine and not in the command: one line, but exit code 1."""


class BadSample(Mistake):
    """One sample that cannot be learned from; it is named, and left out or stops the run."""

    def __init__(self, sample_id: str, reason: str) -> None:
        """Say in one line, `reason`, what is wrong with the sample `sample_id`."""
        super().__init__(sample_id, reason)  # both, so that it survives the way out of a worker
        self.sample_id = sample_id
        self.reason = reason

    def __str__(self) -> str:
        """Return the line for the user."""
        return f"sample {self.sample_id}: {self.reason}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name in `known` that is most like `name`, else ""."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[found[0]]}'?" if found else ""
