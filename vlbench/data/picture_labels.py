"""What is known of a picture, and which of it the answer to a question rests on.

A picture of the embedded world has exact labels. Information probes learn to read them from what a
model computes of the picture. A family of questions takes part in that with two things of its own:
`labels` of its pictures, and `evidence` of its questions. Where a picture shows many small things,
`regions` say which labels are of which place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class LabelledRegion(NamedTuple):
    """One of the things that a picture shows, with a place of its own."""

    name: str
    """What a picture's label calls it."""
    x: float
    """Its middle, from 0 at the left of the picture to 1."""
    y: float
    attributes: Mapping[str, str]
    """Name of an attribute -> its value; all regions of pictures of a kind have the same names."""
    labels: Mapping[str, str]
    """Name of an attribute -> the label of the picture that has its value."""
    named_by: Mapping[str, str] = {}
    """An attribute that is asked for -> the other one by which questions name the region."""
    marks: Mapping[str, bool] = {}
    """A label of the picture that names one of its regions, the marked one -> is it this one?"""


@runtime_checkable
class LabelledPicture(Protocol):
    """A picture whose content is known."""

    @property
    def kind(self) -> str:
        """What pictures of the same sort are called: they have labels of the same names."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """Name of a label -> its value.

        A label has few values, each in many pictures: a probe is a classifier.
        """
        ...

    @property
    def regions(self) -> Sequence[LabelledRegion]:
        """The small things that it shows, () where it has labels as a whole alone."""
        ...


class Evidence(NamedTuple):
    """A label that must be read from a picture, or else the answer can only be guessed."""

    label: str
    values: frozenset[str]
    """Values that lead to the right answer: the true one, or several that are as good."""
    picture: int = 0
    """Which of the question's pictures has the label, from 0."""
