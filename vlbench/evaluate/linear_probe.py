"""Linear probes in closed form: can a label be read linearly from features?

A probe is ridge regression of the one-hot labels on standardised features; it reads the class with
the largest value. How strong the ridge is, leave-one-out cross-validation on the training pictures
decides, which ridge regression has in closed form. All labels share one eigendecomposition of the
pictures' inner products, so that features may be far wider than there are pictures; where they are
narrower, one of the features' inner products, which gives the same probes.

Alain and Bengio 2016 (arXiv:1610.01644) introduced linear probes; a probe on shuffled labels is the
control of what a probe reads without information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE_STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
"""That are tried, in units of the mean eigenvalue: from hardly any ridge to almost nothing else."""
CONSTANT_SPREAD = 1e-5  # a feature that spreads less, relative to its size, is rounding noise

MAX_DOUBLE_WIDTH = 2048  # wider features are multiplied in single precision, which is twice as fast


@dataclass(frozen=True)
class LabelReader:
    """A fitted probe of one label."""

    classes: tuple[str, ...]
    coefficients: Tensor
    """`[width of a similarity, classes]`, float64."""
    intercept: Tensor
    """`[classes]`, float64."""
    ridge: float
    """The strength that cross-validation chose, one of RIDGE_STRENGTHS."""
    training_accuracy: float
    """Share of training pictures that are read right while they are left out."""

    def read(self, similarity: Tensor) -> list[str]:
        """Return the value read from each picture, by its `ProbeSpace.similarity`."""
        scores = similarity @ self.coefficients + self.intercept
        return [self.classes[index] for index in scores.argmax(1).tolist()]

    def scores(self, similarity: Tensor, value: str) -> Tensor:
        """Return how much each picture has one of the `classes`, `[pictures]`."""
        number = self.classes.index(value)
        return similarity @ self.coefficients[:, number] + self.intercept[number]


class ProbeSpace:
    """The features of training pictures, on which probes of several labels are fitted."""

    def __init__(self, features: Tensor) -> None:
        """Take features `[pictures, ...]` of any floating type, all of them finite."""
        flat = self._flatten(features)
        self._mean, spread = flat.mean(0), flat.std(0)
        is_constant = spread <= CONSTANT_SPREAD * flat.abs().amax(0).clamp(min=1e-30)
        width = max(1, int((~is_constant).sum()))
        self._scale = torch.where(is_constant, 0.0, 1 / (spread.clamp(min=1e-30) * width**0.5))
        self._kept = (~is_constant).nonzero()[:, 0] if width > 1 else torch.arange(flat.shape[1])
        self._training = self._standardize(flat)
        count, width = self._training.shape
        if count <= width:
            inner_products = (self._training @ self._training.T).double()
            self._eigenvalues, self._eigenvectors = torch.linalg.eigh(inner_products)
            self._eigenvalues = self._eigenvalues.clamp(min=0)
            self._basis, self._rotation = self._training.T, self._eigenvectors
        else:
            self._decompose_features()

    def _decompose_features(self) -> None:
        """Find the eigenvectors of the pictures' inner products by those of the features'.

        There are fewer of these; the eigenvalues above zero are the same.
        """
        values, directions = torch.linalg.eigh((self._training.T @ self._training).double())
        kept = values > max(float(values[-1]), 1e-30) * 1e-12
        values, directions = values[kept], directions[:, kept]
        self._eigenvalues = values
        self._eigenvectors = self._training.double() @ directions / values.sqrt()
        self._basis = (directions * values.sqrt()).to(self._training.dtype)
        self._rotation = torch.eye(len(values), dtype=torch.float64)

    def similarity(self, features: Tensor) -> Tensor:
        """Return what probes read features by, one row for each picture, float64.

        Inner products with the training pictures or, where features are narrower, their components.
        """
        return (self._standardize(self._flatten(features)) @ self._basis).double()

    def _standardize(self, flat: Tensor) -> Tensor:
        """Return rows in units of the training pictures' spread, without what is constant there."""
        return ((flat - self._mean) * self._scale)[:, self._kept]

    @staticmethod
    def _flatten(features: Tensor) -> Tensor:
        """Return features as rows; narrow ones, which need little ridge, in double precision."""
        flat = features.flatten(1).cpu()
        return flat.double() if flat.shape[1] <= MAX_DOUBLE_WIDTH else flat.float()

    def fit_label(self, values: Sequence[str]) -> LabelReader:
        """Fit a probe of a label that has these values in the training pictures."""
        classes = tuple(sorted(set(values)))
        truth = torch.tensor([classes.index(value) for value in values])
        one_hot = torch.nn.functional.one_hot(truth, len(classes)).double()
        intercept = one_hot.mean(0)
        rotated = self._eigenvectors.T @ (one_hot - intercept)
        best_hits, best_ridge = -1, RIDGE_STRENGTHS[0]
        for ridge in RIDGE_STRENGTHS:
            hits = int((self._left_out(one_hot, rotated, ridge).argmax(1) == truth).sum())
            if hits >= best_hits:  # of equal ones the strongest ridge
                best_hits, best_ridge = hits, ridge
        weights = 1 / (self._eigenvalues + self._strength(best_ridge))
        return LabelReader(
            classes=classes,
            coefficients=self._rotation @ (weights[:, None] * rotated),
            intercept=intercept,
            ridge=best_ridge,
            training_accuracy=best_hits / len(values),
        )

    def _strength(self, ridge: float) -> float:
        mean = float(self._eigenvalues.sum()) / len(self._training)
        return ridge * max(mean, 1e-30)

    def _left_out(self, one_hot: Tensor, rotated: Tensor, ridge: float) -> Tensor:
        """Return the scores of each training picture by a probe fitted on all others.

        For ridge regression with a free intercept: (fit - leverage x truth) / (1 - leverage).
        """
        shrinkage = self._eigenvalues / (self._eigenvalues + self._strength(ridge))
        leverage = self._eigenvectors.square() @ shrinkage + 1 / len(one_hot)
        fit = one_hot.mean(0) + self._eigenvectors @ (shrinkage[:, None] * rotated)
        leverage = leverage[:, None]
        scores: Tensor = (fit - leverage * one_hot) / (1 - leverage).clamp(min=1e-9)
        return scores
