"""Answers of rows whose true accuracies are known, for `simulate_comparison.py`.

Nothing here is shared with the statistics that are put to the test. An answer is right with the
probability expit(question + picture + row's own question and picture effects + seed + run's own
picture effect); the level of a row is solved for so that its mean over all of these is the accuracy
that is asked for.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

Floats = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(61)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
KINDS = ("plain", "bimodal", "pictures", "noisy", "shared", "few")
"""What a cell's answers are like: see `effects_of`."""
MAX_TURNS = 8  # questions about a picture
FAR = 3.0  # logits: how far easy and hard questions lie apart from the middle where bimodal


@dataclass(frozen=True)
class Cell:
    """A design and a world: one line of the table."""

    kind: str
    rows: int
    seeds: int
    accuracy: float
    """Of every row, where none differs."""
    seed_sd: float
    """Standard deviation of a run's effect, in logits."""
    questions: int = 1200

    @property
    def name(self) -> str:
        """The words by which `only=` selects the cell."""
        return (
            f"{self.kind} rows={self.rows} seeds={self.seeds} acc={self.accuracy:g} "
            f"sd={self.seed_sd:g} questions={self.questions}"
        )

    def generator(self, purpose: str) -> np.random.Generator:
        """Return the generator of this cell's trials, the same each time."""
        return np.random.default_rng(zlib.crc32(f"{self.name} {purpose}".encode()))


@dataclass(frozen=True)
class Effects:
    """Standard deviations in logits."""

    question: float = 1.0
    picture: float = 0.0
    row_question: float = 0.7
    row_picture: float = 0.0
    run_picture: float = 0.0
    shared_seed: float = 0.0
    """Share of a seed's variance that all rows have in common."""


def effects_of(kind: str) -> Effects:
    """Return the effects of a kind of cell; in `noisy`, seeds of the last row spread threefold."""
    if kind == "pictures":
        return Effects(question=0.7, picture=0.8, row_picture=0.8, run_picture=0.8)
    if kind == "bimodal":
        return Effects(question=0.3, row_question=0.5)
    if kind == "shared":
        return Effects(shared_seed=0.5)
    return Effects()


class Population:
    """All questions and seeds of a cell; `draw` takes a sample of them."""

    def __init__(
        self, cell: Cell, difference: float = 0.0, accuracies: Sequence[float] | None = None
    ):
        """Let the first two rows differ, around the accuracy of the others.

        Each has half of the difference, but the one that would come nearer to 0 or 1 than half of
        the way has less of it. `accuracies` of all rows may be given instead.
        """
        self.cell, self.effects = cell, effects_of(cell.kind)
        self.true = np.full(cell.rows, cell.accuracy)
        half = min(difference / 2, min(cell.accuracy, 1 - cell.accuracy) / 2)
        up = half if cell.accuracy > 0.5 else difference - half
        self.true[0] += up
        self.true[1] -= difference - up
        if accuracies is not None:
            self.true = np.array(accuracies)
        self.sds = np.full(cell.rows, cell.seed_sd)
        if cell.kind == "noisy":
            self.sds[-1] *= 3
        self.easy = np.array([1.0])
        self.modes = np.array([0.0])
        if cell.kind == "bimodal":
            self.easy = np.array([cell.accuracy, 1 - cell.accuracy])
            self.modes = np.array([FAR, -FAR]) - logit(cell.accuracy)
        effects = self.effects
        self.spread = np.sqrt(
            effects.question**2 + effects.picture**2 + effects.row_question**2
            + effects.row_picture**2 + effects.run_picture**2
        )  # fmt: skip
        self.levels = np.array(
            [
                brentq(lambda level, s=s, t=t: self.mean(level, s) - t, -15, 20)
                for s, t in zip(self.sds, self.true, strict=True)
            ]
        )

    def mean(self, level: float, seed_sd: float) -> float:
        """Return the accuracy at a level, over questions, pictures and seeds."""
        total = np.hypot(self.spread, seed_sd)
        inside = level + self.modes[:, None] + total * NODES
        return float((expit(inside) @ WEIGHTS) @ self.easy)

    def draw(self, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64], Floats]:
        """Return answers `[rows, seeds, questions]`, a picture's number per question, and truths.

        The truths `[rows]` are over all seeds; with one seed, they are those of the runs drawn.
        """
        cell, effects = self.cell, self.effects
        pictures = np.arange(cell.questions)
        if effects.picture:
            turns = rng.integers(1, MAX_TURNS + 1, cell.questions)
            pictures = np.repeat(np.arange(cell.questions), turns)[: cell.questions]
        count = pictures[-1] + 1

        def normal(sd: float, *shape: int) -> NDArray[np.float32]:
            drawn = rng.standard_normal(shape, dtype=np.float32)
            drawn *= np.float32(sd)
            return drawn

        rows, seeds = cell.rows, cell.seeds
        common = np.sqrt(effects.shared_seed) * rng.standard_normal((1, seeds))
        own = np.sqrt(1 - effects.shared_seed) * rng.standard_normal((rows, seeds))
        of_run = self.levels[:, None] + self.sds[:, None] * (common + own)
        base = normal(effects.question, 1, cell.questions)
        base = base + self.modes[rng.choice(len(self.easy), cell.questions, p=self.easy)]
        base = base + normal(effects.row_question, rows, cell.questions)
        if effects.picture:
            base += normal(effects.picture, 1, count)[:, pictures]
            base += normal(effects.row_picture, rows, count)[:, pictures]
        inside = (base[:, None] + of_run[:, :, None]).astype(np.float32)
        if effects.run_picture:
            inside += normal(effects.run_picture, rows, seeds, count)[:, :, pictures]
        chance = 1 / (1 + np.exp(-inside))
        correct = (rng.random(inside.shape, dtype=np.float32) < chance).astype(float)
        truths = self.true
        if seeds == 1:
            truths = np.array([self.mean(level, 0.0) for level in of_run[:, 0]])
        return correct, pictures, truths


class NamedCell(Protocol):
    """A line of a table that `only=` can select."""

    @property
    def name(self) -> str:
        """The words by which it is selected."""


ChosenCell = TypeVar("ChosenCell", bound=NamedCell)


def choose_cells(
    list_cells: Callable[[bool], list[ChosenCell]], short_trials: int, trials: int
) -> tuple[list[ChosenCell], int]:
    """Return the cells and the number of trials that `short=`, `only=` and `trials=` ask for."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    is_short = words.get("short") == "true"
    wanted = set(words.get("only", "").split())
    cells = [cell for cell in list_cells(is_short) if wanted <= set(cell.name.split())]
    if not cells:
        sys.exit(
            f"only='{words['only']}' selects no cell; names are as '{list_cells(True)[0].name}'"
        )
    return cells, int(words.get("trials", short_trials if is_short else trials))
