"""Sample encoding: a sample becomes token ids and next-token labels. Imports no torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vlbench.config.stage_schema import SampleFormat
from vlbench.data.chat_template import ChatTemplate, TextPiece
from vlbench.data.image_tiling import count_views
from vlbench.data.sample import (
    IMAGE_PLACEHOLDER,
    ChatTurn,
    LazyImage,
    Sample,
    check_sample,
    read_questions,
)
from vlbench.data.view_layout import TiledSample, ViewLayout
from vlbench.errors import BadSample, UserError

IMAGE_TOKEN_INDEX = -200  # the id at image positions; no text is tokenized to it
IGNORE_INDEX = -100  # the label of an unsupervised position
CONTEXT_LENGTH = 32  # characters before a piece with which it is tokenized

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
    visual_index: list[int] | None = None
    """For each image position the number of its visual token, counted over the sample's views
    `[views x tokens_per_image]`, or NEWLINE_INDEX. None: untiled, they are in order. The images of
    a tiled sample are `TiledImage`s."""
    image_lengths: list[int] | None = None
    """The image positions of each image; None: untiled, each has `tokens_per_image`."""
    is_reduced: bool = False
    """Whether its images have fewer tiles than they could, for `vision.max_visual_tokens`."""

    @property
    def image_position_count(self) -> int:
        """Number of image positions in `input_ids`."""
        if self.image_lengths is not None:
            return sum(self.image_lengths)
        return len(self.sample.images) * self.tokens_per_image

    @property
    def view_count(self) -> int:
        """Number of views of its images: squares that the vision encoder sees."""
        return sum(map(count_views, self.sample.images))

    @property
    def supervised_token_count(self) -> int:
        """Number of positions with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class SampleEncoder:
    """Turns samples into token ids and next-token labels, as one stage trains on them.

    Text is cut at image placeholders and around every answer, and the pieces are tokenized one by
    one, each as it is in the text before it. `chat` supervises every answer of the conversation.
    `caption` takes the first image and the answer behind it alone: image positions, then the answer
    and a newline, which are supervised.
    """

    tokenizer: TokenEncoder
    chat_template: ChatTemplate
    tokens_per_image: int
    """Image positions that one image takes; of a tiled one, visual tokens of a view."""
    max_length: int
    """Tokens, image positions included; what is longer is cut at the end."""
    sample_format: SampleFormat = "chat"
    question_length: int = 0
    """Tokens of an image's question that the connector reads; 0: none."""
    view_layout: ViewLayout | None = None
    """The views of images and the order of their tokens; None: an image has one view."""

    def with_token_cache(self) -> SampleEncoder:
        """Return the encoder with a tokenizer that caches texts."""
        if isinstance(self.tokenizer, CachedTokenizer):
            return self
        return replace(self, tokenizer=CachedTokenizer(self.tokenizer))

    def encode(self, sample: Sample) -> EncodedSample:
        """Return the ids and labels of a sample.

        Raises:
            BadSample: images and placeholders differ in number, no supervised token is left, or
                the cut to `max_length` would fall inside an image, the size of an image cannot be
                read, or its views are too many. In a caption nothing answers the image.
            NoImage: a caption without an image.
        """
        check_sample(sample)
        input_ids: list[int] = []
        supervised: list[bool] = []
        try:
            sample, pieces, has_all_tokens = self._render_pieces(sample)
            tiled, spans = None, None
            if self.view_layout is not None:
                tiled = self.view_layout.tile_sample(sample)
                sample = tiled.sample
                spans = encode_image_spans(tiled, self.view_layout, self.tokenizer)
            for piece_ids, is_answer in tokenize_pieces(
                pieces, self.tokenizer, self.tokens_per_image, has_all_tokens, spans
            ):
                input_ids += piece_ids
                supervised += [is_answer] * len(piece_ids)
            self.tokenizer.check_token_ids(input_ids)
        except BadSample:
            raise
        except UserError as error:
            raise BadSample(sample.id, str(error)) from error
        full_length, lost_tokens = len(input_ids), sum(supervised[self.max_length :])
        input_ids, supervised = input_ids[: self.max_length], supervised[: self.max_length]
        images = self._uncut_images(sample, input_ids, tiled)
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
            **(tiled.encoded_fields(len(images)) if tiled else {}),
        )

    def list_images(self, sample: Sample) -> tuple[LazyImage, ...]:
        """Return the images of a sample that `encode` keeps, tiled as it tiles them, uncut.

        Raises:
            BadSample: their views are too many.
            UserError: the size of an image cannot be read.
        """
        images = sample.images[:1] if self.sample_format == "caption" else sample.images
        if self.view_layout is None:
            return images
        return self.view_layout.tile_sample(replace(sample, images=images)).images

    def _encode_questions(self, sample: Sample, image_count: int) -> Questions | None:
        """Return the questions of the first images; a caption has none: its turn is not read."""
        if not self.question_length:
            return None
        if self.sample_format == "caption":
            return ((),) * image_count
        questions = encode_questions(sample.turns, self.tokenizer, self.question_length)
        return questions[:image_count]

    def _render_pieces(self, sample: Sample) -> tuple[Sample, list[TextPiece], bool]:
        """Return the sample as the stage learns it, its pieces, and whether they have all tokens.

        See `ChatTemplate` for the last.
        """
        if self.sample_format == "caption":
            return *_reduce_to_caption(sample), False
        pieces = self.chat_template.render_pieces(sample.turns)
        return sample, pieces, self.chat_template.has_all_tokens

    def _uncut_images(
        self, sample: Sample, input_ids: list[int], tiled: TiledSample | None
    ) -> tuple[LazyImage, ...]:
        """Return the images whose image positions are left after the cut to `max_length`."""
        rest, count = input_ids.count(IMAGE_TOKEN_INDEX), 0
        lengths = tiled.image_lengths if tiled else [self.tokens_per_image] * len(sample.images)
        while count < len(lengths) and rest >= lengths[count]:
            rest -= lengths[count]
            count += 1
        if rest:
            remedy = "lower vision.max_visual_tokens" if tiled else "shorten the text"
            if self.view_layout is not None and self.view_layout.settings.tiling is None:
                remedy = "lower image_size"
            raise BadSample(
                sample.id,
                f"max_length={self.max_length} cuts through image {count + 1}, which takes "
                f"{lengths[count]} tokens; raise language.max_length or {remedy}",
            )
        return sample.images[:count]


def encode_image_spans(
    tiled: TiledSample, layout: ViewLayout, tokenizer: TokenEncoder
) -> list[list[int]]:
    """Return the ids that stand for each image: its image positions, and the texts of its views."""
    spans = []
    for image, length in zip(tiled.images, tiled.image_lengths, strict=True):
        tags = layout.view_tags(image)
        view = [IMAGE_TOKEN_INDEX] * layout.tokens_per_view
        tagged = [token for tag in tags for token in (*tokenizer.encode(tag, False), *view)]
        spans.append(tagged or [IMAGE_TOKEN_INDEX] * length)
    return spans


def tokenize_pieces(
    pieces: Sequence[TextPiece],
    tokenizer: TokenEncoder,
    tokens_per_image: int,
    has_all_tokens: bool = False,
    image_spans: Sequence[list[int]] | None = None,
) -> Iterator[tuple[list[int], bool]]:
    """Tokenize (text, supervised) pieces one by one; a placeholder becomes its image positions.

    Those of a tiled sample are in `image_spans`, for each image. Joined, the ids are those of the
    whole text, which is cut at images alone: so a model is asked as it was trained.

    A BOS that the tokenizer puts before every text is kept at the very beginning only, and not
    there either with `has_all_tokens`, see `ChatTemplate`.
    """
    spans = iter(image_spans or itertools.repeat([IMAGE_TOKEN_INDEX] * tokens_per_image))
    is_first, starts_with_bos = True, False
    before = ""
    for text, supervised in pieces:
        chunks = [text] if supervised else text.split(IMAGE_PLACEHOLDER)
        for number, chunk in enumerate(chunks):
            if number:
                yield next(spans), False
                before = ""
            context, before = before, (before + chunk)[-CONTEXT_LENGTH:]
            if context:
                yield _encode_behind(context, chunk, tokenizer), supervised
                continue
            if has_all_tokens:
                yield list(tokenizer.encode(chunk, False)), supervised
                continue
            ids = list(tokenizer.encode(chunk))
            has_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
            yield (ids[1:] if has_bos and starts_with_bos else ids), supervised
            starts_with_bos = has_bos if is_first else starts_with_bos
            is_first = False


def _encode_behind(context: str, text: str, tokenizer: TokenEncoder) -> list[int]:
    """Return the ids of a text that goes on behind `context`, as they are in both together.

    Many tokenizers (Llama 2's, Mistral's) put a space before every text; an answer in the middle
    of a text has none. Where both together have other ids at their border, each is on its own.
    """
    known = list(tokenizer.encode(context, False))
    both = list(tokenizer.encode(context + text, False))
    is_kept = both[: len(known)] == known
    return both[len(known) :] if is_kept else list(tokenizer.encode(text, False))


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
    if not sample.caption_text:
        reason = "no answer follows its first image, and the stage learns captions"
        raise BadSample(sample.id, reason)
    single = replace(sample, images=sample.images[:1])
    return single, [(IMAGE_PLACEHOLDER, False), (f"{sample.caption_text}\n", True)]
