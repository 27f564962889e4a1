"""What scored answers add up to: by subject, domain and type, and overall, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

from vlbench.evaluate.tasks.items import Scored
from vlbench.evaluate.tasks.subjects import SUBJECTS, UNKNOWN, Subjects

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """How many of `n` answers are right; `accuracy` in the benchmark's own arithmetic."""

    n: int
    correct: int
    accuracy: float

    def told(self) -> dict[str, Any]:
        """Return the share as it stands in scores.json, with its interval."""
        interval = wilson(self.correct, self.n)
        return {**vars(self), "interval": [round(end, 4) for end in interval]}


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of `correct` out of `n`; everything for n = 0."""
    if not n:
        return 0.0, 1.0
    share, weight = correct / n, Z * Z / n
    middle = (share + weight / 2) / (1 + weight)
    reach = sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def summary(task: str, scored: Sequence[Scored]) -> dict[str, Any]:
    """Return what stands in scores.json: n, accuracy and its parts.

    `fallback` counts answers that were drawn at random, `unread` those in which nothing was found.
    """
    subjects = SUBJECTS[task]
    by_subject = shares(scored, lambda one: one.item.subject or UNKNOWN)
    return {
        **pooled(by_subject.values(), subjects).told(),
        "fallback": sum(one.fallback for one in scored),
        "unread": sum(one.prediction is None for one in scored),
        "by_subject": _told(by_subject),
        "by_domain": _told(domains(by_subject, subjects)),
        "by_type": _told(shares(scored, lambda one: one.item.type)),
    }


def shares(scored: Iterable[Scored], group: Callable[[Scored], str]) -> dict[str, Share]:
    """Return the share of every group, in the order of their names."""
    verdicts: dict[str, list[bool]] = {}
    for one in scored:
        verdicts.setdefault(group(one), []).append(one.correct)
    return {name: share(sum(right), len(right)) for name, right in sorted(verdicts.items())}


def share(correct: int, n: int) -> Share:
    """Return the share of a group that is counted as one; 0 of 0 is 0, as the benchmarks say."""
    return Share(n, correct, correct / n if n else 0.0)


def domains(by_subject: dict[str, Share], subjects: Subjects) -> dict[str, Share]:
    """Return the share of every domain, also of those without questions; "unknown" if needed."""
    grouped: dict[str, list[Share]] = {}
    for domain, known in subjects.domains.items():
        grouped[domain] = [by_subject[one] for one in (domain, *known) if one in by_subject]
    others = [s for name, s in by_subject.items() if subjects.domain(name) == UNKNOWN]
    if others:
        grouped[UNKNOWN] = others
    return {name: pooled(parts, subjects) for name, parts in grouped.items()}


def pooled(parts: Iterable[Share], subjects: Subjects) -> Share:
    """Return the share of several subjects together; every question weighs the same."""
    parts = list(parts)
    whole = share(sum(part.correct for part in parts), sum(part.n for part in parts))
    if not subjects.by_accuracy or not whole.n:
        return whole
    accuracy = sum(part.accuracy * part.n for part in parts) / whole.n
    return Share(whole.n, whole.correct, accuracy)


def _told(groups: dict[str, Share]) -> dict[str, dict[str, Any]]:
    return {name: group.told() for name, group in groups.items()}
