"""What scored answers add up to, by subject, domain and type; the files and tables that show it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from vlbench.evaluate.tasks.benchmark_types import (
    SUBJECT_DOMAINS,
    UNKNOWN_SUBJECT,
    ScoredItem,
    SubjectDomains,
)
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import format_json, format_json_lines, read_text, write_atomically
from vlbench.text_tables import format_table

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")
PUBLISHED_COLUMNS = 7  # all questions, and six domains


@dataclass(frozen=True)
class GroupAccuracy:
    """How many of `n` answers are right; `accuracy` in the benchmark's own arithmetic."""

    n: int
    correct: int
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of scores.json, with its interval."""
        interval = wilson_interval(self.correct, self.n)
        return {**vars(self), "interval": [round(bound, 4) for bound in interval]}


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of `correct` out of `n`; (0, 1) for n = 0."""
    if not n:
        return 0.0, 1.0
    from scipy.stats import binomtest  # half a second, which most of this module's users spare

    interval = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def summarize_scores(task: str, scored_items: Sequence[ScoredItem]) -> dict[str, Any]:
    """Return the figures of scores.json: n, accuracy and its parts.

    `fallback` counts answers that were drawn at random, `unread` those that could not be parsed.
    """
    domains = SUBJECT_DOMAINS[task]
    by_subject = accuracy_by_group(
        scored_items, lambda scored: scored.item.subject or UNKNOWN_SUBJECT
    )
    by_type = accuracy_by_group(scored_items, lambda scored: scored.item.type)
    return {
        **pool_accuracies(by_subject.values(), domains).to_dict(),
        "fallback": sum(scored.fallback for scored in scored_items),
        "unread": sum(scored.prediction is None for scored in scored_items),
        "by_subject": _groups_to_dict(by_subject),
        "by_domain": _groups_to_dict(accuracy_by_domain(by_subject, domains)),
        "by_type": _groups_to_dict(by_type),
    }


def accuracy_by_group(
    scored_items: Iterable[ScoredItem], group_of: Callable[[ScoredItem], str]
) -> dict[str, GroupAccuracy]:
    """Return the accuracy of every group, sorted by name."""
    verdicts: dict[str, list[bool]] = {}
    for scored in scored_items:
        verdicts.setdefault(group_of(scored), []).append(scored.correct)
    return {
        name: accuracy_from_counts(sum(correct), len(correct))
        for name, correct in sorted(verdicts.items())
    }


def accuracy_from_counts(correct: int, n: int) -> GroupAccuracy:
    """Return the accuracy of a group by its counts; 0 of 0 is 0, as in the benchmarks' code."""
    return GroupAccuracy(n, correct, correct / n if n else 0.0)


def accuracy_by_domain(
    by_subject: dict[str, GroupAccuracy], subject_domains: SubjectDomains
) -> dict[str, GroupAccuracy]:
    """Return the accuracy of every domain, also without questions; "unknown" if needed."""
    grouped: dict[str, list[GroupAccuracy]] = {}
    for domain, subjects in subject_domains.domains.items():
        grouped[domain] = [by_subject[name] for name in (domain, *subjects) if name in by_subject]
    unknown = [
        group
        for name, group in by_subject.items()
        if subject_domains.domain_of(name) == UNKNOWN_SUBJECT
    ]
    if unknown:
        grouped[UNKNOWN_SUBJECT] = unknown
    return {name: pool_accuracies(parts, subject_domains) for name, parts in grouped.items()}


def pool_accuracies(
    parts: Iterable[GroupAccuracy], subject_domains: SubjectDomains
) -> GroupAccuracy:
    """Return the accuracy of several subjects together; every question weighs the same."""
    parts = list(parts)
    pooled = accuracy_from_counts(
        sum(part.correct for part in parts), sum(part.n for part in parts)
    )
    if not subject_domains.pools_accuracies or not pooled.n:
        return pooled
    accuracy = sum(part.accuracy * part.n for part in parts) / pooled.n
    return GroupAccuracy(pooled.n, pooled.correct, accuracy)


def _groups_to_dict(groups: dict[str, GroupAccuracy]) -> dict[str, dict[str, Any]]:
    return {name: group.to_dict() for name, group in groups.items()}


def write_score_files(
    folder: Path,
    scores: dict[str, Any],
    records: list[dict[str, Any]],
    scored_items: list[ScoredItem],
) -> None:
    """Write scores.json, and scored.jsonl: every record with its prediction and verdict."""
    lines = format_json_lines(
        {
            **record,
            "prediction": to_json_value(scored.prediction),
            "correct": scored.correct,
            "fallback": scored.fallback,
        }
        for record, scored in zip(records, scored_items, strict=True)
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "scored.jsonl", lines)
        write_atomically(folder / "scores.json", format_json(scores, indent=1) + "\n")
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error


def to_json_value(prediction: Any) -> Any:
    """Return a prediction as JSON can hold it: nan and inf, which it cannot, as texts."""
    if isinstance(prediction, list):
        return [to_json_value(value) for value in prediction]
    is_finite = not isinstance(prediction, float) or math.isfinite(prediction)
    return prediction if is_finite else str(prediction)


def number_equal_ids(ids: Iterable[object]) -> list[str]:
    """Return a name for each question: its id, `ID#2` for the second with that id, and so on.

    A name that is the id of another question is passed over, so that no two are named alike.
    """
    words = [str(one) for one in ids]
    known, counts, names = set(words), Counter[str](), []
    for word in words:
        counts[word] += 1
        name = word
        while counts[word] > 1 and (name := f"{word}#{counts[word]}") in known:
            counts[word] += 1
        known.add(name)
        names.append(name)
    return names


def report_equal_ids(ids: Sequence[object]) -> list[str]:
    """Return a line on ids that several questions have, [] if there are none."""
    counts = {name: count for name, count in Counter(map(str, ids)).items() if count > 1}
    if not counts:
        return []
    name, count = next(iter(counts.items()))
    total = sum(counts.values())
    return [f"{total} questions share {len(counts)} ids ({name}: {count}); each counts by itself"]


def format_score_table(scores: dict[str, Any], accuracy_format: str) -> Iterator[str]:
    """Return lines on all answers, types, domains and subjects, as the protocol prints them."""
    drawn, unread = scores["fallback"], scores["unread"]
    yield (
        f"{scores['task']}, protocol {scores['protocol']}, seed {scores['seed']}: "
        f"{drawn} answers drawn at random, {unread} more unreadable; "
        f"{(drawn + unread) / scores['n']:.1%} could not be read"
    )
    rows: list[tuple[str, ...]] = [("n", "correct", "accuracy", "95 % interval", "")]
    groups = chain.from_iterable(
        scores[f"by_{kind}"].items() for kind in ("type", "domain", "subject")
    )
    for name, group in [("all", scores), *groups]:
        if group["n"]:
            low, high = group["interval"]
            accuracy = format(group["accuracy"], accuracy_format)
            interval = f"{low:.3f} to {high:.3f}"
            rows.append((str(group["n"]), str(group["correct"]), accuracy, interval, name))
    yield from format_table(rows, ">>>><")


def format_published(scores: dict[str, Any]) -> Iterator[str]:
    """Return lines of published accuracies in percent: all, and the domains; these answers first.

    Published models were prompted in other ways, and on the whole split that the line names.
    """
    domains = SUBJECT_DOMAINS[scores["task"]].domains
    groups = [scores, *(scores["by_domain"][domain] for domain in domains)]
    percentages = [100 * group["accuracy"] if group["n"] else None for group in groups]
    yield f"percent: all, {', '.join(domains)}"
    yield _format_row(percentages, "these answers")
    published = yaml.safe_load(read_text(PUBLISHED_FILE))[scores["task"]]
    for split, table in published.items():
        yield f"published, {split} ({table['source']})"
        for model, row in table["rows"].items():
            yield _format_row(row, model)


def _format_row(percentages: list[float | None], row_name: str) -> str:
    cells = [*percentages, *[None] * (PUBLISHED_COLUMNS - len(percentages))]
    return "".join("     -" if cell is None else f"{cell:6.1f}" for cell in cells) + f"  {row_name}"
