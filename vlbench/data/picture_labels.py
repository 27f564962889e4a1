"""What is known of a picture, and which of it the answer to a question rests on.

A picture of the embedded world has exact labels. Information probes learn to read them from what a
model computes of the picture. A family of questions takes part in that with two things of its own:
`labels` of its pictures, and `evidence` of its questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class LabelledPicture(Protocol):
    """A picture whose content is known."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Name of a label -> its value; the pictures of a family have the same names.

        A label has few values, each in many pictures: a probe is a classifier.
        """
        ...


class Evidence(NamedTuple):
    """A label that must be read from a picture, or else the answer can only be guessed."""

    label: str
    values: frozenset[str]
    """Values that lead to the right answer: the true one, or several that are as good."""
    picture: int = 0
    """Which of the question's pictures has the label, from 0."""
