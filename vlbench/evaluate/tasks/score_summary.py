"""What scored answers add up to: by subject, domain and type, and overall, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

from vlbench.evaluate.tasks.scored_items import ScoredItem
from vlbench.evaluate.tasks.subject_domains import SUBJECT_DOMAINS, UNKNOWN_SUBJECT, SubjectDomains

WILSON_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class GroupAccuracy:
    """How many of `n` answers are right; `accuracy` in the benchmark's own arithmetic."""

    n: int
    correct: int
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Return the share as it stands in scores.json, with its interval."""
        interval = wilson_interval(self.correct, self.n)
        return {**vars(self), "interval": [round(end, 4) for end in interval]}


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of `correct` out of `n`; everything for n = 0."""
    if not n:
        return 0.0, 1.0
    share, weight = correct / n, WILSON_Z * WILSON_Z / n
    middle = (share + weight / 2) / (1 + weight)
    reach = sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def summarize_scores(task: str, scored_items: Sequence[ScoredItem]) -> dict[str, Any]:
    """Return what stands in scores.json: n, accuracy and its parts.

    `fallback` counts answers that were drawn at random, `unread` those in which nothing was found.
    """
    subjects = SUBJECT_DOMAINS[task]
    by_subject = accuracy_by_group(scored_items, lambda one: one.item.subject or UNKNOWN_SUBJECT)
    return {
        **pool_accuracies(by_subject.values(), subjects).to_dict(),
        "fallback": sum(one.fallback for one in scored_items),
        "unread": sum(one.prediction is None for one in scored_items),
        "by_subject": _groups_to_dict(by_subject),
        "by_domain": _groups_to_dict(accuracy_by_domain(by_subject, subjects)),
        "by_type": _groups_to_dict(accuracy_by_group(scored_items, lambda one: one.item.type)),
    }


def accuracy_by_group(
    scored_items: Iterable[ScoredItem], group_of: Callable[[ScoredItem], str]
) -> dict[str, GroupAccuracy]:
    """Return the share of every group, in the order of their names."""
    verdicts: dict[str, list[bool]] = {}
    for one in scored_items:
        verdicts.setdefault(group_of(one), []).append(one.correct)
    return {
        name: accuracy_from_counts(sum(right), len(right))
        for name, right in sorted(verdicts.items())
    }


def accuracy_from_counts(correct: int, n: int) -> GroupAccuracy:
    """Return the share of a group that is counted as one; 0 of 0 is 0, as the benchmarks say."""
    return GroupAccuracy(n, correct, correct / n if n else 0.0)


def accuracy_by_domain(
    by_subject: dict[str, GroupAccuracy], subject_domains: SubjectDomains
) -> dict[str, GroupAccuracy]:
    """Return the share of every domain, also of those without questions; "unknown" if needed."""
    grouped: dict[str, list[GroupAccuracy]] = {}
    for domain, known in subject_domains.domains.items():
        grouped[domain] = [by_subject[one] for one in (domain, *known) if one in by_subject]
    others = [
        s for name, s in by_subject.items() if subject_domains.domain_of(name) == UNKNOWN_SUBJECT
    ]
    if others:
        grouped[UNKNOWN_SUBJECT] = others
    return {name: pool_accuracies(parts, subject_domains) for name, parts in grouped.items()}


def pool_accuracies(
    parts: Iterable[GroupAccuracy], subject_domains: SubjectDomains
) -> GroupAccuracy:
    """Return the share of several subjects together; every question weighs the same."""
    parts = list(parts)
    whole = accuracy_from_counts(sum(part.correct for part in parts), sum(part.n for part in parts))
    if not subject_domains.pools_accuracies or not whole.n:
        return whole
    accuracy = sum(part.accuracy * part.n for part in parts) / whole.n
    return GroupAccuracy(whole.n, whole.correct, accuracy)


def _groups_to_dict(groups: dict[str, GroupAccuracy]) -> dict[str, dict[str, Any]]:
    return {name: group.to_dict() for name, group in groups.items()}
