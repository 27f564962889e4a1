"""A sample (turns and pictures) and how it becomes token ids and labels. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from vlbench.errors import BadSample, SampleOrigin, UserError, escape_to_one_line

if TYPE_CHECKING:
    from PIL import Image

    from vlbench.data.chat_template import ChatTemplate

IMAGE_TOKEN_INDEX = -200  # the id of a place; no text can produce it
IGNORE_INDEX = -100  # the label of an unsupervised position
IMAGE_PLACEHOLDER = "<image_placeholder>"  # in the text of a turn: here stands the next image

SampleFormat = Literal["chat", "caption"]


class LazyImage(Protocol):
    """Something that can be opened: small, hashable, picklable."""

    @property
    def name(self) -> str:
        """Name it for reports."""
        ...

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names it."""
        ...


@dataclass(frozen=True)
class ChatTurn:
    """One message; `role` is system, human or assistant; a human's text may hold PLACEHOLDER."""

    role: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation with its pictures, in the order of the placeholders."""

    id: str
    turns: tuple[ChatTurn, ...]
    images: tuple[LazyImage, ...] = ()
    language: str = ""  # "en", "zh", or empty for unknown
    unread_keys: tuple[str, ...] = field(default=(), compare=False)
    """Keys of its record, and of the record's turns, that have a value and were not used."""
    is_untagged: bool = field(default=False, compare=False)
    """Whether its only picture has no tag in the record and was put first."""
    origin: SampleOrigin | None = field(default=None, compare=False)
    """Where it is from; None where nobody said so."""

    @property
    def unique_name(self) -> str:
        """What no other sample of a stage is called: an id is a label, there may be equal ones.

        It fits in a line.
        """
        if self.origin is None:
            return escape_to_one_line(self.id)
        of = f" of source {self.origin.source_index + 1}" if self.origin.source_index else ""
        return escape_to_one_line(f"{self.id} (record {self.origin.record_number}{of})")

    @property
    def caption_text(self) -> str:
        """The first answer, which a stage of captions learns; empty when there is none."""
        return next((turn.text.strip() for turn in self.turns if turn.role == "assistant"), "")


class SampleSource(Protocol):
    """A set of samples that can be reached by number."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`, or raise BadSample."""
        ...


def sample_at(source: SampleSource, index: int, source_number: int = 0) -> Sample:
    """Return sample `index` (from 0) of a source with its place, or raise BadSample with its own.

    `number` is that of the source among those that are mixed.
    """
    try:
        sample = source[index]
    except BadSample as bad:
        raise bad.with_origin(source.name, index + 1) from bad.__cause__
    return replace(sample, origin=SampleOrigin(source.name, source_number, index + 1))


class TokenEncoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    @property
    def bos_token_id(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def check_token_ids(self, ids: Sequence[int]) -> None: ...


class NoImage(BadSample):
    """A sample without an image in a stage of captions: skipped and counted, no error."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as numbers.

    `labels[t]` is the token to be predicted at position t, already shifted, or IGNORE.
    `sample.pictures` are exactly the pictures whose places are in `ids`, in that order.
    """

    input_ids: list[int]
    labels: list[int]
    sample: Sample
    tokens_per_image: int


def encode_sample(
    sample: Sample,
    chat_template: ChatTemplate,
    tokenizer: TokenEncoder,
    tokens_per_image: int,
    max_length: int,
    sample_format: SampleFormat = "chat",
) -> EncodedSample:
    """Turn a sample into ids and next-token labels.

    Text is cut at image places and around every answer, and the pieces are tokenised one by one.
    `chat` supervises every answer of the conversation. `caption` takes the first image and the
    first answer alone: places, then the answer and a newline, which are supervised. What is longer
    than `max_length` is cut at the end.

    Raises BadSample when images and placeholders differ in number, when no supervised token is
    left, or when the cut would fall inside an image; NoImage for a caption without an image.
    """
    check_sample(sample)
    if sample_format == "caption":
        sample, pieces = _reduce_to_caption(sample)
    else:
        pieces = chat_template.render_pieces(sample.turns)
    ids: list[int] = []
    supervised: list[bool] = []
    for chunk, learn in tokenize_pieces(pieces, tokenizer, tokens_per_image):
        ids += chunk
        supervised += [learn] * len(chunk)
    try:
        tokenizer.check_token_ids(ids)
    except UserError as mistake:
        raise BadSample(sample.id, str(mistake)) from mistake
    whole = len(ids)
    ids, supervised = ids[:max_length], supervised[:max_length]
    images = _images_left(sample, ids, tokens_per_image, max_length)
    labels = [t if s else IGNORE_INDEX for t, s in zip(ids[1:], supervised[1:], strict=True)]
    labels += [IGNORE_INDEX] * (len(ids) - len(labels))
    if all(label == IGNORE_INDEX for label in labels):
        cut = f" within max_length={max_length} of its {whole} tokens" if whole > len(ids) else ""
        raise BadSample(sample.id, f"has nothing to learn{cut}: no token of an answer")
    return EncodedSample(ids, labels, replace(sample, images=images), tokens_per_image)


def tokenize_pieces(
    pieces: Sequence[tuple[str, bool]], tokenizer: TokenEncoder, tokens_per_image: int
) -> Iterator[tuple[list[int], bool]]:
    """Tokenise (text, supervised) pieces one by one; a PLACEHOLDER becomes its places.

    A tokenizer that opens every text with its BOS is allowed to do so once, at the very beginning.
    """
    first, opened = True, False
    for text, supervised in pieces:
        chunks = [text] if supervised else text.split(IMAGE_PLACEHOLDER)
        for number, chunk in enumerate(chunks):
            if number:
                yield [IMAGE_TOKEN_INDEX] * tokens_per_image, False
            ids = list(tokenizer.encode(chunk))
            bos = bool(ids) and ids[0] == tokenizer.bos_token_id
            yield (ids[1:] if bos and opened else ids), supervised
            opened = bos if first else opened
            first = False


def check_sample(sample: Sample) -> None:
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
    _check_image_tags(sample)


def _check_image_tags(sample: Sample) -> None:
    for turn in sample.turns:
        if turn.role != "human" and IMAGE_PLACEHOLDER in turn.text:
            raise BadSample(
                sample.id,
                f"{IMAGE_PLACEHOLDER} in a turn of {turn.role!r}; only 'human' may show images",
            )
    tags = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in sample.turns)
    if tags != len(sample.images):
        told = (
            f"{_count_phrase(tags, 'image tag')} in the text but "
            f"{_count_phrase(len(sample.images), 'image')}"
        )
        few = "every <image> shows one of 'image'"
        many = "write <image> in a human turn where each picture stands"
        raise BadSample(sample.id, f"{told}; {few if tags > len(sample.images) else many}")


def _count_phrase(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _reduce_to_caption(sample: Sample) -> tuple[Sample, list[tuple[str, bool]]]:
    """Reduce a sample to its first image and first answer: the sample, and its pieces."""
    if not sample.images:
        raise NoImage(sample.id, "has no image, and the stage learns captions")
    one = replace(sample, images=sample.images[:1])
    return one, [(IMAGE_PLACEHOLDER, False), (f"{sample.caption_text}\n", True)]


def _images_left(
    sample: Sample, input_ids: list[int], tokens_per_image: int, max_length: int
) -> tuple[LazyImage, ...]:
    """Return the pictures whose places survived the cut to `max_length`."""
    images, rest = divmod(input_ids.count(IMAGE_TOKEN_INDEX), tokens_per_image)
    if rest:
        raise BadSample(
            sample.id,
            f"max_length={max_length} cuts through image {images + 1}, which takes "
            f"{tokens_per_image} tokens; raise language.max_length or shorten the text",
        )
    return sample.images[:images]
