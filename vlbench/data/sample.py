"""A sample (turns and pictures) and how it becomes token ids and labels. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from vlbench.mistakes import BadSample, Mistake, Place, one_line

if TYPE_CHECKING:
    from PIL import Image

    from vlbench.data.template import Template

IMAGE = -200  # the id of a place; no text can produce it
IGNORE = -100  # the label of an unsupervised position
PLACEHOLDER = "<image_placeholder>"  # in the text of a turn: here stands the next image

Form = Literal["chat", "caption"]


class Picture(Protocol):
    """Something that can be opened: small, hashable, picklable."""

    @property
    def name(self) -> str:
        """Name it for reports."""
        ...

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names it."""
        ...


@dataclass(frozen=True)
class Turn:
    """One message; `role` is system, human or assistant; a human's text may hold PLACEHOLDER."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures, in the order of the placeholders."""

    id: str
    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    language: str = ""  # "en", "zh", or empty for unknown
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its record, and of the record's turns, that have a value and were not used."""
    untagged: bool = field(default=False, compare=False)
    """Whether its only picture has no tag in the record and was put first."""
    place: Place | None = field(default=None, compare=False)
    """Where it is from; None where nobody said so."""

    @property
    def identity(self) -> str:
        """What no other sample of a stage is called: an id is a label, there may be equal ones.

        It fits in a line.
        """
        if self.place is None:
            return one_line(self.id)
        of = f" of source {self.place.number + 1}" if self.place.number else ""
        return one_line(f"{self.id} (record {self.place.record}{of})")

    @property
    def caption(self) -> str:
        """The first answer, which a stage of captions learns; empty when there is none."""
        return next((turn.text.strip() for turn in self.turns if turn.role == "assistant"), "")


class Source(Protocol):
    """A set of samples that can be reached by number."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, or raise BadSample."""
        ...


def sample_at(source: Source, index: int, number: int = 0) -> Sample:
    """Return sample `index` (from 0) of a source with its place, or raise BadSample with its own.

    `number` is that of the source among those that are mixed.
    """
    try:
        sample = source[index]
    except BadSample as bad:
        raise bad.at(source.name, index + 1) from bad.__cause__
    return replace(sample, place=Place(source.name, number, index + 1))


class Encoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    @property
    def bos(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def check(self, ids: Sequence[int]) -> None: ...


class NoImage(BadSample):
    """A sample without an image in a stage of captions: skipped and counted, no error."""


@dataclass(frozen=True)
class Encoded:
    """A sample as numbers.

    `labels[t]` is the token to be predicted at position t, already shifted, or IGNORE.
    `sample.pictures` are exactly the pictures whose places are in `ids`, in that order.
    """

    ids: list[int]
    labels: list[int]
    sample: Sample
    tokens_per_image: int


def encode(
    sample: Sample,
    template: Template,
    tokenizer: Encoder,
    tokens_per_image: int,
    max_length: int,
    form: Form = "chat",
) -> Encoded:
    """Turn a sample into ids and next-token labels.

    Text is cut at image places and around every answer, and the pieces are tokenised one by one.
    `chat` supervises every answer of the conversation. `caption` takes the first image and the
    first answer alone: places, then the answer and a newline, which are supervised. What is longer
    than `max_length` is cut at the end.

    Raises BadSample when images and placeholders differ in number, when no supervised token is
    left, or when the cut would fall inside an image; NoImage for a caption without an image.
    """
    check(sample)
    if form == "caption":
        sample, pieces = _caption(sample)
    else:
        pieces = template.pieces(sample.turns)
    ids: list[int] = []
    supervised: list[bool] = []
    for chunk, learn in place_tokens(pieces, tokenizer, tokens_per_image):
        ids += chunk
        supervised += [learn] * len(chunk)
    try:
        tokenizer.check(ids)
    except Mistake as mistake:
        raise BadSample(sample.id, str(mistake)) from mistake
    whole = len(ids)
    ids, supervised = ids[:max_length], supervised[:max_length]
    images = _images_left(sample, ids, tokens_per_image, max_length)
    labels = [t if s else IGNORE for t, s in zip(ids[1:], supervised[1:], strict=True)]
    labels += [IGNORE] * (len(ids) - len(labels))
    if all(label == IGNORE for label in labels):
        cut = f" within max_length={max_length} of its {whole} tokens" if whole > len(ids) else ""
        raise BadSample(sample.id, f"has nothing to learn{cut}: no token of an answer")
    return Encoded(ids, labels, replace(sample, pictures=images), tokens_per_image)


def place_tokens(
    pieces: Sequence[tuple[str, bool]], tokenizer: Encoder, tokens_per_image: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokenise (text, supervised) pieces one by one; a PLACEHOLDER becomes its places.

    A tokenizer that opens every text with its BOS is allowed to do so once, at the very beginning.
    """
    first, opened = True, False
    for text, supervised in pieces:
        chunks = [text] if supervised else text.split(PLACEHOLDER)
        for number, chunk in enumerate(chunks):
            if number:
                yield [IMAGE] * tokens_per_image, False
            ids = list(tokenizer.encode(chunk))
            bos = bool(ids) and ids[0] == tokenizer.bos
            yield (ids[1:] if bos and opened else ids), supervised
            opened = bos if first else opened
            first = False


def check(sample: Sample) -> None:
    """Raise BadSample when a sample cannot be learned from; pictures are not opened."""
    check_turns(sample)
    if all(turn.role != "assistant" for turn in sample.turns):
        raise BadSample(sample.id, "no assistant turn, so there is nothing to learn")


def check_turns(sample: Sample) -> None:
    """Raise BadSample when turns or image tags are not where they may be.

    A system turn may come first; then human and assistant alternate, and humans alone show images.
    """
    turns = sample.turns
    for number, turn in enumerate(turns, start=1):
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            where = f"turn {number}: character {error.start + 1}"
            raise BadSample(sample.id, f"{where} is half a character, not UTF-8 text") from error
    if turns and turns[0].role == "system":
        turns = turns[1:]
    if not turns:
        raise BadSample(sample.id, "the conversation is empty")
    for number, turn in enumerate(turns):
        expected = ("human", "assistant")[number % 2]
        if turn.role != expected:
            where = "the conversation begins with" if number == 0 else f"turn {number + 1} is"
            raise BadSample(
                sample.id, f"{where} {turn.role!r} where {expected!r} is expected (turns alternate)"
            )
    _check_images(sample)


def _check_images(sample: Sample) -> None:
    for turn in sample.turns:
        if turn.role != "human" and PLACEHOLDER in turn.text:
            raise BadSample(
                sample.id, f"{PLACEHOLDER} in a turn of {turn.role!r}; only 'human' may show images"
            )
    tags = sum(turn.text.count(PLACEHOLDER) for turn in sample.turns)
    if tags != len(sample.pictures):
        told = (
            f"{_count(tags, 'image tag')} in the text but {_count(len(sample.pictures), 'image')}"
        )
        few = "every <image> shows one of 'image'"
        many = "write <image> in a human turn where each picture stands"
        raise BadSample(sample.id, f"{told}; {few if tags > len(sample.pictures) else many}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _caption(sample: Sample) -> tuple[Sample, list[tuple[str, bool]]]:
    """Reduce a sample to its first image and first answer: the sample, and its pieces."""
    if not sample.pictures:
        raise NoImage(sample.id, "has no image, and the stage learns captions")
    one = replace(sample, pictures=sample.pictures[:1])
    return one, [(PLACEHOLDER, False), (f"{sample.caption}\n", True)]


def _images_left(
    sample: Sample, ids: list[int], tokens_per_image: int, max_length: int
) -> tuple[Picture, ...]:
    """Return the pictures whose places survived the cut to `max_length`."""
    images, rest = divmod(ids.count(IMAGE), tokens_per_image)
    if rest:
        raise BadSample(
            sample.id,
            f"max_length={max_length} cuts through image {images + 1}, which takes "
            f"{tokens_per_image} tokens; raise language.max_length or shorten the text",
        )
    return sample.pictures[:images]
