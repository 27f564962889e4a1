"""Sample encoding: a sample becomes token ids and next-token labels. Imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vlbench.config.key_types import SampleFormat
from vlbench.data.chat_template import ChatTemplate, TextPiece
from vlbench.data.sample import (
    IMAGE_PLACEHOLDER,
    ChatTurn,
    LazyImage,
    Sample,
    check_sample,
    read_questions,
)
from vlbench.errors import BadSample, UserError

IMAGE_TOKEN_INDEX = -200  # the id at image positions; no text is tokenized to it
IGNORE_INDEX = -100  # the label of an unsupervised position


Questions = tuple[tuple[int, ...], ...]
"""For each image the ids of the text of the human turn that shows it."""


class TokenEncoder(Protocol):
    """The part of a tokenizer that encoding needs."""

    @property
    def bos_token_id(self) -> int: ...

    def encode(self, text: str, add_bos: bool = True) -> Sequence[int]: ...

    def check_token_ids(self, ids: Sequence[int]) -> None: ...


class CachedTokenizer:
    """A tokenizer that caches the ids of texts: every conversation has the same system prompt."""

    def __init__(self, tokenizer: TokenEncoder) -> None:
        """Cache what `tokenizer` returns for the last 4096 different texts."""
        self.tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id
        self._cached_encode = functools.lru_cache(maxsize=4096)(self._encode_tuple)

    def encode(self, text: str, add_bos: bool = True) -> Sequence[int]:
        """Return the ids of a text."""
        return self._cached_encode(text, add_bos)

    def check_token_ids(self, ids: Sequence[int]) -> None:
        """Raise a UserError for an id that the model has no embedding for."""
        self.tokenizer.check_token_ids(ids)

    def _encode_tuple(self, text: str, add_bos: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_bos))

    def __reduce__(self) -> tuple[Any, ...]:  # the cache itself cannot be pickled for a worker
        return CachedTokenizer, (self.tokenizer,)


class NoImage(BadSample):
    """A sample without an image in a caption stage: skipped and counted, not an error."""


@dataclass(frozen=True)
class EncodedSample:
    """A sample as token ids and labels."""

    input_ids: list[int]
    """Token ids, IMAGE_TOKEN_INDEX at image positions."""
    labels: list[int]
    """`labels[t]` is the token to predict at position t (already shifted), or IGNORE_INDEX."""
    sample: Sample
    """Its `images` are exactly those whose image positions are in `input_ids`, in that order."""
    tokens_per_image: int
    is_truncated: bool = False
    """Whether it was longer than `max_length`, and its end is cut off."""
    lost_supervised_tokens: int = 0
    """Supervised tokens of that end."""
    questions: Questions | None = None
    """For each image the ids of its question; None where the connector reads none."""

    @property
    def image_position_count(self) -> int:
        """Number of image positions in `input_ids`."""
        return len(self.sample.images) * self.tokens_per_image

    @property
    def supervised_token_count(self) -> int:
        """Number of positions with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class SampleEncoder:
    """Turns samples into token ids and next-token labels, as one stage trains on them.

    Text is cut at image placeholders and around every answer, and the pieces are tokenized one by
    one. `chat` supervises every answer of the conversation. `caption` takes the first image and
    the first answer alone: image positions, then the answer and a newline, which are supervised.
    """

    tokenizer: TokenEncoder
    chat_template: ChatTemplate
    tokens_per_image: int
    """Image positions that one image takes."""
    max_length: int
    """Tokens, image positions included; what is longer is cut at the end."""
    sample_format: SampleFormat = "chat"
    question_length: int = 0
    """Tokens of an image's question that the connector reads; 0: none."""

    def with_token_cache(self) -> SampleEncoder:
        """Return the encoder with a tokenizer that caches texts."""
        if isinstance(self.tokenizer, CachedTokenizer):
            return self
        return replace(self, tokenizer=CachedTokenizer(self.tokenizer))

    def encode(self, sample: Sample) -> EncodedSample:
        """Return the ids and labels of a sample.

        Raises:
            BadSample: images and placeholders differ in number, no supervised token is left, or
                the cut to `max_length` would fall inside an image.
            NoImage: a caption without an image.
        """
        check_sample(sample)
        input_ids: list[int] = []
        supervised: list[bool] = []
        try:
            sample, pieces = self._render_pieces(sample)
            for piece_ids, is_answer in pieces:
                input_ids += piece_ids
                supervised += [is_answer] * len(piece_ids)
            self.tokenizer.check_token_ids(input_ids)
        except BadSample:
            raise
        except UserError as error:
            raise BadSample(sample.id, str(error)) from error
        full_length, lost_tokens = len(input_ids), sum(supervised[self.max_length :])
        input_ids, supervised = input_ids[: self.max_length], supervised[: self.max_length]
        images = self._uncut_images(sample, input_ids)
        labels = _next_token_labels(input_ids, supervised)
        if all(label == IGNORE_INDEX for label in labels):
            is_cut = full_length > len(input_ids)
            limit = f" within max_length={self.max_length} of its {full_length} tokens"
            reason = f"has nothing to learn{limit if is_cut else ''}: no token of an answer"
            raise BadSample(sample.id, reason)
        return EncodedSample(
            input_ids,
            labels,
            replace(sample, images=images),
            self.tokens_per_image,
            is_truncated=full_length > len(input_ids),
            lost_supervised_tokens=lost_tokens,
            questions=self._encode_questions(sample, len(images)),
        )

    def _encode_questions(self, sample: Sample, image_count: int) -> Questions | None:
        """Return the questions of the first images; a caption has none: its turn is not read."""
        if not self.question_length:
            return None
        if self.sample_format == "caption":
            return ((),) * image_count
        questions = encode_questions(sample.turns, self.tokenizer, self.question_length)
        return questions[:image_count]

    def _render_pieces(self, sample: Sample) -> tuple[Sample, Iterator[tuple[list[int], bool]]]:
        """Return the sample as the stage learns it, and its (ids, supervised) pieces."""
        if self.sample_format == "caption":
            sample, pieces = _reduce_to_caption(sample)
            has_all_tokens = False
        else:
            pieces = self.chat_template.render_pieces(sample.turns)
            has_all_tokens = self.chat_template.has_all_tokens
        return sample, tokenize_pieces(
            pieces, self.tokenizer, self.tokens_per_image, has_all_tokens
        )

    def _uncut_images(self, sample: Sample, input_ids: list[int]) -> tuple[LazyImage, ...]:
        """Return the images whose image positions are left after the cut to `max_length`."""
        count, rest = divmod(input_ids.count(IMAGE_TOKEN_INDEX), self.tokens_per_image)
        if rest:
            raise BadSample(
                sample.id,
                f"max_length={self.max_length} cuts through image {count + 1}, which takes "
                f"{self.tokens_per_image} tokens; raise language.max_length or shorten the text",
            )
        return sample.images[:count]


def tokenize_pieces(
    pieces: Sequence[TextPiece],
    tokenizer: TokenEncoder,
    tokens_per_image: int,
    has_all_tokens: bool = False,
) -> Iterator[tuple[list[int], bool]]:
    """Tokenize (text, supervised) pieces one by one; a placeholder becomes its image positions.

    A BOS that the tokenizer puts before every text is kept at the very beginning only, and not
    there either with `has_all_tokens`, see `ChatTemplate`.
    """
    is_first, starts_with_bos = True, False
    for text, supervised in pieces:
        chunks = [text] if supervised else text.split(IMAGE_PLACEHOLDER)
        for number, chunk in enumerate(chunks):
            if number:
                yield [IMAGE_TOKEN_INDEX] * tokens_per_image, False
            if has_all_tokens:
                yield list(tokenizer.encode(chunk, False)), supervised
                continue
            ids = list(tokenizer.encode(chunk))
            has_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
            yield (ids[1:] if has_bos and starts_with_bos else ids), supervised
            starts_with_bos = has_bos if is_first else starts_with_bos
            is_first = False


def encode_questions(
    turns: Sequence[ChatTurn], tokenizer: TokenEncoder, max_length: int
) -> Questions:
    """Return for each image of a conversation the first ids of its question, without BOS."""
    questions: list[tuple[int, ...]] = []
    for text, image_count in read_questions(turns):
        ids = tuple(tokenizer.encode(text, False)[:max_length]) if text else ()
        questions += [ids] * image_count
    return tuple(questions)


def _next_token_labels(input_ids: list[int], supervised: list[bool]) -> list[int]:
    """Return the next token at every position where that token is supervised."""
    next_tokens = zip(input_ids[1:], supervised[1:], strict=True)
    labels = [token if learned else IGNORE_INDEX for token, learned in next_tokens]
    return labels + [IGNORE_INDEX] * (len(input_ids) - len(labels))


def _reduce_to_caption(sample: Sample) -> tuple[Sample, list[TextPiece]]:
    """Return the sample with its first image alone, and the pieces of a caption."""
    if not sample.images:
        raise NoImage(sample.id, "has no image, and the stage learns captions")
    single = replace(sample, images=sample.images[:1])
    return single, [(IMAGE_PLACEHOLDER, False), (f"{sample.caption_text}\n", True)]
