"""What finished runs say about each other, computed once: Markdown and page only show it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlbench.compare.cautions import cautions
from vlbench.compare.runs import Arm, Finished, arms, differing, matrix, shared
from vlbench.compare.statistics import Difference, Right, bootstrap, compare, holm, interval

NAMED = 4  # rows that a sentence names, at most
CLEAR = 0.05  # largest p, after Holm's correction, that is called a difference


@dataclass(frozen=True)
class Row:
    """A row of the comparison: the runs of the seeds that all rows have, and their accuracy."""

    name: str
    runs: tuple[Finished, ...]
    right: Right
    accuracy: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    @property
    def spread(self) -> float | None:
        """Standard deviation of the accuracies of seeds; None for one seed."""
        by_seed = self.right.mean(axis=1)
        return float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None

    @property
    def budget(self) -> dict[str, Any]:
        """What the row costs, {} if its runs do not say."""
        return self.runs[0].results.get("budget") or {}

    def mean(self, key: str) -> float | None:
        """Return the mean of a figure of results.json over the runs that have it."""
        values = [run.results.get(key) for run in self.runs]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Pair:
    """Two rows of a comparison, the better one first, and what is known of their difference."""

    better: str
    worse: str
    difference: Difference
    p: float
    """After Holm's correction over all pairs."""
    pairs: int
    """How many these are."""
    check: tuple[float, float]
    """The interval of a bootstrap, for comparison."""

    @property
    def clear(self) -> bool:
        """Say whether chance alone hardly makes such a difference."""
        return self.difference.low > 0 and self.p <= CLEAR

    @property
    def p_text(self) -> str:
        """Give p with its sign: "= 0.012" or "< 0.001"."""
        return f"= {self.p:.3f}" if self.p >= 0.001 else "< 0.001"

    def short(self) -> str:
        """Say it in plain words."""
        chance = ", so this may be chance" if self.difference.low > 0 and self.p > CLEAR else ""
        return (
            f"{self.difference.sentence(self.better, self.worse)}; p {self.p_text} after Holm's "
            f"correction over {counted(self.pairs, 'pair')}{chance}."
        )

    def sentence(self) -> str:
        """Say it in plain words, with what this design could have found."""
        low, high = (100 * end for end in self.check)
        if not self.difference.error:
            return f"{self.short()} Nothing varies: what else would have been found is not known."
        return (
            f"{self.short()} Smallest difference that this design would have found: "
            f"{100 * self.difference.detectable:.1f} points. Bootstrap: {low:.1f} to {high:.1f}."
        )


class Kind(NamedTuple):
    """Questions of one type or in one language, and how well each row answers them."""

    name: str
    language: bool
    """True for a language, False for a type."""
    number: int
    """How many they are."""
    found: list[tuple[float, float, float]]
    """Accuracy of each row and the ends of its interval, in the order of the rows."""


@dataclass(frozen=True)
class Findings:
    """The whole comparison."""

    arms: tuple[Arm, ...]
    """As they were given, with all of their seeds."""
    rows: tuple[Row, ...]
    """The best first."""
    seeds: list[int]
    questions: list[str]
    """Their ids."""
    asked_of: str
    pairs: list[Pair]
    kinds: list[Kind]
    warnings: list[str]
    notes: list[str]
    """Sentences about what all rows have in common, or how they came to be."""
    failed: Mapping[Path, str]
    """Folder of a run that failed -> why."""

    @property
    def differing(self) -> list[tuple[str, list[str]]]:
        """Each key in which recipes differ, learning rates first, and its values arm by arm."""
        keys = differing(self.arms)
        return [(key, [str(arm.runs[0].recipe.get(key, "")) for arm in self.arms]) for key in keys]

    @property
    def heading(self) -> str:
        """Say what was compared on what."""
        return (
            f"Rows: {len(self.rows)}; seeds: {', '.join(map(str, self.seeds))}; questions about "
            f"{self.asked_of}: {len(self.questions)}. Intervals are of 95 %, over seeds and "
            "questions."
        )

    @property
    def question(self) -> str:
        """Say in a sentence what is asked of whom."""
        seeds = counted(len(self.seeds), "seed")
        questions = f"{counted(len(self.questions), 'question')} about {self.asked_of}"
        if len(self.rows) == 1:
            return f"How well does {self.rows[0].name}, trained with {seeds}, answer {questions}?"
        if len(self.rows) > NAMED:
            rows = f"{len(self.rows)} rows, each trained with {seeds}"
            return f"Which of {rows}, answers {questions} best?"
        names = listed([row.name for row in self.rows], "or")
        return f"Which answers {questions} best, each trained with {seeds}: {names}?"

    @property
    def verdict(self) -> str:
        """Say in plain words which row is best, and of which others that is known."""
        best, *others = self.rows
        text = f"{best.name} answers {100 * best.accuracy:.1f} % of the questions right"
        if not others:
            return f"{text}. There is no other row to compare it with."
        against = [pair for pair in self.pairs if pair.better == best.name]
        clear = [pair.worse for pair in against if pair.clear]
        open_ = [pair.worse for pair in against if not pair.clear]
        alone = best.accuracy > others[0].accuracy
        text += ", the most of all rows." if alone else f", as does {others[0].name}."
        if clear:
            text += f" That it is better than {listed(clear, 'and')} is more than chance."
        if open_:
            text += (
                f" Whether it is better than {listed(open_, 'or')}, this comparison cannot tell."
            )
        return text


def find(
    runs: Sequence[Finished],
    failed: Mapping[Path, str] | None = None,
    notes: Sequence[str] = (),
) -> Findings:
    """Compare finished runs; `failed` are the folders of others, with the reason.

    `notes` are sentences about how the runs came to be.
    """
    given = arms(runs)
    seeds, questions = shared(given)
    rows = sorted((_row(arm, seeds, questions) for arm in given), key=lambda row: -row.accuracy)
    failed = failed or {}
    return Findings(
        arms=tuple(given),
        rows=tuple(rows),
        seeds=seeds,
        questions=questions,
        asked_of=rows[0].runs[0].results.get("asked_of", "the data of the recipe"),
        pairs=pairs(rows),
        kinds=_kinds(rows, questions),
        warnings=cautions(given, seeds, questions, failed),
        notes=[*_frozen(given), *notes],
        failed=failed,
    )


def _frozen(given: Sequence[Arm]) -> list[str]:
    """Say that the tower learned nothing in any run, if that is so."""
    keys = [key for arm in given for key, value in arm.runs[0].recipe.items() if value is not None]
    trained = any(key.startswith("stages.") and ".train.vision" in key for key in keys)
    return [] if trained else ["The vision tower is frozen in every stage of every row."]


def _row(arm: Arm, seeds: Sequence[int], questions: Sequence[str]) -> Row:
    right = matrix(arm, seeds, questions)
    used = tuple(run for run in arm.runs if run.seed in seeds)
    return Row(arm.name, used, right, *interval(right))


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Return all pairs of rows, best rows first, their p-values corrected for their number."""
    both = list(itertools.combinations(rows, 2))
    found = [compare(one.right, other.right) for one, other in both]
    corrected = holm([one.p for one in found])
    return [
        Pair(one.name, other.name, difference, p, len(both), bootstrap(one.right, other.right))
        for (one, other), difference, p in zip(both, found, corrected, strict=True)
    ]


def _kinds(rows: Sequence[Row], questions: Sequence[str]) -> list[Kind]:
    """Group the questions by type, then by language; what has no name is in no group."""
    kinds = rows[0].runs[0].kinds
    groups: dict[tuple[int, str], list[int]] = {}
    for index, one in enumerate(questions):
        for axis, kind in enumerate(kinds[one]):
            if kind:
                groups.setdefault((axis, kind), []).append(index)
    return [
        Kind(kind, axis == 1, len(columns), [interval(row.right[:, columns]) for row in rows])
        for (axis, kind), columns in sorted(groups.items())
    ]


def counted(count: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], word: str) -> str:
    """Return "a, b and c"; the number of them, if they are too many to be read."""
    if len(names) > NAMED:
        return f"{len(names)} others"
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
