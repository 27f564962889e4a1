"""A sample: turns and images, before tokenization. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from vlbench.errors import BadSample, SampleOrigin, escape_to_one_line

if TYPE_CHECKING:
    from PIL import Image

IMAGE_PLACEHOLDER = "<image_placeholder>"  # in the text of a turn: the next image belongs here


class LazyImage(Protocol):
    """An image that is opened on demand: small, hashable and picklable."""

    @property
    def name(self) -> str:
        """Name it for reports."""
        ...

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a UserError that names it."""
        ...


@dataclass(frozen=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    """`system`, `human` or `assistant`."""
    text: str
    """The text of a human may contain IMAGE_PLACEHOLDER."""


@dataclass(frozen=True)
class Sample:
    """A conversation with its images, in the order of their placeholders."""

    id: str
    turns: tuple[ChatTurn, ...]
    images: tuple[LazyImage, ...] = ()
    language: str = ""  # "en", "zh", or empty for unknown
    unread_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its record, and of the record's turns, that have a value and were not used."""
    is_untagged: bool = field(default=False, compare=False)
    """Whether its only image has no tag in the record and was put first."""
    origin: SampleOrigin | None = field(default=None, compare=False)
    """Source and record number; None where they are unknown."""

    @property
    def unique_name(self) -> str:
        """A name, in one line, that no other sample of the stage has; ids may repeat."""
        if self.origin is None:
            return escape_to_one_line(self.id)
        source = f" of source {self.origin.source_index + 1}" if self.origin.source_index else ""
        return escape_to_one_line(f"{self.id} (record {self.origin.record_number}{source})")

    @property
    def caption_text(self) -> str:
        """The answer to the first turn that shows an image: the target of a caption stage.

        Of a sample without images it is the first answer. Empty without such an answer.
        """
        shows_image = (IMAGE_PLACEHOLDER in turn.text for turn in self.turns)
        first = next((number for number, shows in enumerate(shows_image) if shows), 0)
        answers = (turn.text for turn in self.turns[first:] if turn.role == "assistant")
        return next(answers, "").strip()

    @property
    def beyond_caption(self) -> tuple[int, int]:
        """How many answers and images it has beside the caption and its image, which are learned.

        A sample without images has no caption, and so nothing beside it.
        """
        answers = sum(turn.role == "assistant" for turn in self.turns)
        return (max(0, answers - 1), len(self.images) - 1) if self.images else (0, 0)


def read_questions(turns: Sequence[ChatTurn]) -> list[tuple[str, int]]:
    """Return the text of each turn that shows images, and how many, in their order.

    Placeholders are no text: what stands between them is joined by spaces. It is "" for a turn of
    images alone. System prompts and answers are no questions.
    """
    shown = [turn.text.split(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "human"]
    return [
        (" ".join(part.strip() for part in parts if part.strip()), len(parts) - 1)
        for parts in shown
        if len(parts) > 1
    ]


class SampleSource(Protocol):
    """A collection of samples with random access by index."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, or raise BadSample."""
        ...


def sample_at(
    source: SampleSource, index: int, source_index: int = 0, pass_number: int = 0
) -> Sample:
    """Return sample `index` (from 0) of a source with its origin set, or raise BadSample with it.

    `source_index` is the position of the source among those that a stage mixes, and `pass_number`
    (from 0) tells which of several questions are asked, where a source has several.
    """
    in_pass = getattr(source, "sample_in_pass", None)
    number = record_number(source, index)
    try:
        sample: Sample = in_pass(index, pass_number) if in_pass else source[index]
    except BadSample as bad:
        raise bad.with_origin(source.name, number) from bad.__cause__
    return replace(sample, origin=SampleOrigin(source.name, source_index, number))


def record_number(source: SampleSource, index: int) -> int:
    """Return the number (from 1) of the record of sample `index` (from 0), for reports."""
    base_index = getattr(source, "base_index", None)
    return int(base_index(index) if base_index else index) + 1


def check_sample(sample: Sample) -> None:
    """Raise BadSample when a sample cannot be trained on; images are not opened."""
    check_turns(sample)
    if all(turn.role != "assistant" for turn in sample.turns):
        raise BadSample(sample.id, "no assistant turn, so there is nothing to learn")


def check_turns(sample: Sample) -> None:
    """Raise BadSample for a wrong order of turns or wrong image placeholders.

    A system turn may come first; then human and assistant alternate. Only human turns may contain
    images.
    """
    turns = sample.turns
    for number, turn in enumerate(turns, start=1):
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            where = f"turn {number}: character {error.start + 1}"
            raise BadSample(sample.id, f"{where} is half a character, not UTF-8 text") from error
    first = int(bool(turns) and turns[0].role == "system")
    if not turns[first:]:
        raise BadSample(sample.id, "the conversation is empty")
    _check_alternation(sample.id, turns, first)
    _check_image_placeholders(sample)


def _check_alternation(sample_id: str, turns: Sequence[ChatTurn], first: int) -> None:
    """Check the turns from number `first` (from 0) on."""
    for number, turn in enumerate(turns[first:]):
        expected = ("human", "assistant")[number % 2]
        if turn.role != expected:
            begins = "the conversation begins with"
            where = f"turn {first + number + 1} is" if number else begins
            raise BadSample(
                sample_id, f"{where} {turn.role!r} where {expected!r} is expected (turns alternate)"
            )


def _check_image_placeholders(sample: Sample) -> None:
    for turn in sample.turns:
        if turn.role != "human" and IMAGE_PLACEHOLDER in turn.text:
            raise BadSample(
                sample.id,
                f"{IMAGE_PLACEHOLDER} in a turn of {turn.role!r}; only 'human' may show images",
            )
    tag_count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns)
    image_count = len(sample.images)
    if tag_count != image_count:
        counts = f"{_pluralize(tag_count, 'image tag')} in the text but "
        counts += _pluralize(image_count, "image")
        missing_image = "every <image> needs one entry of 'image'"
        missing_tag = "write <image> in a human turn where each image belongs"
        remedy = missing_image if tag_count > image_count else missing_tag
        raise BadSample(sample.id, f"{counts}; {remedy}")


def _pluralize(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
