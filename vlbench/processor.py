"""The processor of a model: tokenizer, chat template and image transform make its batches.

It belongs to a model as a processor of transformers does, and it knows of the model only what it
needs: the image positions per image, and how many positions the language model has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlbench.config.stage_schema import SampleFormat
from vlbench.data.batch_images import (
    assign_image_index,
    join_views,
    repeat_by_view,
    stack_pixels,
    stack_questions,
)
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.image_decoding import to_rgb_image
from vlbench.data.image_processing import ImageFile, ImageTransform
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage, Sample, check_turns
from vlbench.data.sample_encoding import (
    Questions,
    SampleEncoder,
    encode_image_spans,
    encode_questions,
    tokenize_pieces,
)
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import TiledSample, ViewLayout, ViewSettings, view_fields
from vlbench.errors import BadSample, UserError

ChatMessage = dict[str, Any]
"""A message in the Hugging Face chat format: a role and a content."""
MESSAGE_FORMAT = "{'role': 'user', 'content': a text or a list of parts}"
TURN_ROLES = {"system": "system", "user": "human", "assistant": "assistant"}


def holds_conversations(messages: object) -> bool:
    """Return whether `messages` is a list of conversations, and not one conversation's messages."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], list)


class ConversationTooLong(UserError):
    """A conversation with more tokens than the language model has positions."""


@dataclass(frozen=True)
class InMemoryImage:
    """An image that is already in memory."""

    image: Image.Image
    name: str = "image"

    def open(self) -> Image.Image:
        """Return the image in RGB, as if it came from a file."""
        return to_rgb_image(self.image, self.name)


@dataclass(frozen=True)
class Processor:
    """What turns conversations and images into the inputs of one model."""

    tokenizer: Tokenizer
    template: ChatTemplate
    transform: ImageTransform
    """The one image transform of training, evaluation and chat, at the model's image size."""
    tokens_per_image: int
    """Image positions that one image takes; of a tiled one, visual tokens of a view."""
    max_length: int
    """Length in tokens at which samples of a training are cut."""
    max_positions: int
    """Positions of the language model: a prompt has fewer."""
    question_length: int = 0
    """Tokens of an image's question that the connector reads; 0: none."""
    token_grid: tuple[int, int] | None = None
    """Rows and columns in which the visual tokens lie over a view; see `Connector.token_grid`."""
    view_settings: ViewSettings | None = None
    """How images become views; None: each is one."""

    def __post_init__(self) -> None:
        transform = replace(self.transform, **view_fields(self.view_settings))
        if transform != self.transform:
            object.__setattr__(self, "transform", transform)  # the class is frozen

    @property
    def view_layout(self) -> ViewLayout | None:
        """The views of images at this image size, and the order of their tokens."""
        if self.view_settings is None:
            return None
        return ViewLayout(
            self.view_settings,
            self.transform.crop,
            self.tokens_per_image,
            self.token_grid,
            self.transform.exif,
        )

    def with_image_inputs(
        self,
        transform: ImageTransform,
        tokens_per_image: int,
        question_length: int,
        token_grid: tuple[int, int] | None = None,
    ) -> Processor:
        """Return the processor for another image size; how images are decoded and tiled stays."""
        transform = replace(transform, draft=self.transform.draft, exif=self.transform.exif)
        return replace(
            self,
            transform=transform,
            tokens_per_image=tokens_per_image,
            question_length=question_length,
            token_grid=token_grid,
        )

    def with_decoding(self, draft: bool, exif: bool) -> Processor:
        """Return the processor that decodes large JPEGs at a reduced size if `draft`.

        With `exif` it turns photographs as their EXIF orientation says.
        """
        return replace(self, transform=replace(self.transform, draft=draft, exif=exif))

    def prompt(self, messages: list[ChatMessage]) -> str:
        """Return the exact text that a conversation in the chat-message format becomes."""
        return self.template.render_prompt(sample_from_messages(messages).turns)

    def prepare(self, messages: list[ChatMessage] | list[list[ChatMessage]]) -> PackedBatch:
        """Return the prompts of one conversation, or of several, as one batch on the CPU."""
        conversations: Any = messages if holds_conversations(messages) else [messages]
        return self.collate_prompts([sample_from_messages(chat) for chat in conversations])

    def sample_encoder(self, sample_format: SampleFormat = "chat") -> SampleEncoder:
        """Return what encodes samples of a training."""
        return SampleEncoder(
            self.tokenizer,
            self.template,
            self.tokens_per_image,
            self.max_length,
            sample_format,
            self.question_length,
            self.view_layout,
        )

    def encode_prompt(self, sample: Sample) -> list[int]:
        """Return the token ids of a sample's prompt, with the image positions of its images."""
        return self._encode_prompt(sample, self._tile(sample))

    def _tile(self, sample: Sample) -> TiledSample | None:
        """Return the sample with the views of its images; None where images are not tiled."""
        layout = self.view_layout
        try:
            return layout.tile_sample(sample) if layout else None
        except BadSample as bad:
            raise UserError(f"the conversation {bad.reason}") from bad

    def _encode_prompt(self, sample: Sample, tiled: TiledSample | None) -> list[int]:
        """Return the token ids of a sample's prompt, whose images may be tiled.

        The text is cut at the image placeholders and each piece is tokenised on its own, as in the
        reference implementation of Yi-VL.
        """
        text, layout = self.template.render_prompt(sample.turns), self.view_layout
        if text.count(IMAGE_PLACEHOLDER) != len(sample.images):
            raise UserError(
                f"{text.count(IMAGE_PLACEHOLDER)} image placeholders for {len(sample.images)} "
                "images"
            )
        pieces = tokenize_pieces(
            [(text, False)],
            self.tokenizer,
            self.tokens_per_image,
            self.template.has_all_tokens,
            encode_image_spans(tiled, layout, self.tokenizer) if tiled and layout else None,
        )
        input_ids = [token_id for piece_ids, _ in pieces for token_id in piece_ids]
        if len(input_ids) >= self.max_positions:
            raise ConversationTooLong(
                f"the conversation has {len(input_ids)} tokens with its images; the language model "
                f"reads fewer than {self.max_positions}"
            )
        self.tokenizer.check_token_ids(input_ids)
        return input_ids

    def collate_prompts(self, samples: Sequence[Sample]) -> PackedBatch:
        """Return prompts as one batch on the CPU, padded on the left, one sample per row."""
        tiled_samples = [self._tile(sample) for sample in samples]
        prompts = [
            self._encode_prompt(sample, tiled)
            for sample, tiled in zip(samples, tiled_samples, strict=True)
        ]
        samples = [
            tiled.sample if tiled else sample
            for sample, tiled in zip(samples, tiled_samples, strict=True)
        ]
        length = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
        sample_index = torch.full_like(input_ids, -1)
        image_index = torch.full_like(input_ids, -1)
        image_lengths = [tiled.image_lengths if tiled else None for tiled in tiled_samples]
        first_image = 0
        for row, token_ids in enumerate(prompts):
            start = length - len(token_ids)
            input_ids[row, start:] = torch.tensor(token_ids)
            sample_index[row, start:] = row
            image_index[row, start:] = assign_image_index(
                input_ids[row, start:], image_lengths[row] or self.tokens_per_image, first_image
            )
            first_image += len(samples[row].images)
        images = [image for sample in samples for image in sample.images]
        return PackedBatch(
            input_ids=input_ids,
            labels=None,
            position_ids=(sample_index >= 0).long().cumsum(1).sub(1).clamp(min=0),
            sample_index=sample_index,
            image_index=image_index,
            pixels=stack_pixels([self.transform.load_pixels(image) for image in images]),
            sample_ids=[sample.id for sample in samples],
            # padding counts as a sample of its own, so that no position of a prompt attends to it
            sample_lengths=[
                [count for count in (length - len(token_ids), len(token_ids)) if count]
                for token_ids in prompts
            ],
            supervised_token_count=0,
            question_ids=stack_questions(
                [repeat_by_view(self._encode_questions(one), one.images) for one in samples]
            ),
            **join_views(
                [
                    (sample.images, tiled.visual_index if tiled else None)
                    for sample, tiled in zip(samples, tiled_samples, strict=True)
                ],
                self.tokens_per_image,
            ),
        )

    def _encode_questions(self, sample: Sample) -> Questions | None:
        """Return the question of each image of a sample; None where the connector reads none."""
        if not self.question_length:
            return None
        return encode_questions(sample.turns, self.tokenizer, self.question_length)


def sample_from_messages(messages: list[ChatMessage]) -> Sample:
    """Turn messages into a sample.

    Each message has a `role` (system, user, assistant) and a `content`: a text, or a list of
    `{"type": "text", "text": ...}` and `{"type": "image", "image": a PIL image or a path}`. Between
    an image and a text stands a newline, as the reference writes it, between two images nothing.
    """
    turns: list[ChatTurn] = []
    images: list[LazyImage] = []
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages are a list of {MESSAGE_FORMAT}, given {messages!r:.200}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
            raise UserError(f"message {number} is {message!r:.200}; wanted is {MESSAGE_FORMAT}")
        role = message.get("role")
        if not isinstance(role, str) or role not in TURN_ROLES:
            raise UserError(
                f"message {number}: role is {role!r:.200}; allowed are {', '.join(TURN_ROLES)}"
            )
        texts: list[str] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            text, image = _parse_content_part(part, number, message["role"])
            if texts and not (image and texts[-1].endswith(IMAGE_PLACEHOLDER)):
                texts.append("\n")
            texts.append(text)
            images += [image] if image else []
        turns.append(ChatTurn(TURN_ROLES[message["role"]], "".join(texts)))
    _check_order([message["role"] for message in messages])
    sample = Sample("chat", tuple(turns), tuple(images))
    try:
        check_turns(sample)
    except BadSample as bad:
        raise UserError(f"messages: {bad.reason}") from bad
    return sample


def _check_order(roles: Sequence[str]) -> None:
    """Raise a UserError unless user and assistant alternate, behind one system message at most."""
    first = int(roles[:1] == ["system"])
    for number, role in enumerate(roles[first:], first):
        expected = ("user", "assistant")[(number - first) % 2]
        if role != expected:
            raise UserError(
                f"message {number} is of '{role}' where '{expected}' is expected: after at most "
                "one of 'system' the messages of 'user' and 'assistant' alternate"
            )
    if roles[first:] and roles[-1] != "user":
        raise UserError(
            f"message {len(roles) - 1}, the last one, is of '{roles[-1]}'; 'user' asks for answers"
        )


def _parse_content_part(part: Any, message_number: int, role: str) -> tuple[str, LazyImage | None]:
    """Return the text that a part of a message becomes, and its image if it is one."""
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind == "text" and isinstance(value, str):
        if IMAGE_PLACEHOLDER in value:
            raise UserError(
                f"message {message_number}: the text has '{IMAGE_PLACEHOLDER}', for which no image "
                "would stand; an image is a part of its own"
            )
        return value, None
    if kind == "image" and role != "user":
        raise UserError(f"message {message_number}: an image of '{role}'; only 'user' shows images")
    if kind == "image" and isinstance(value, str) and _is_url(value):
        raise UserError(
            f"message {message_number}: image {value:.100} is a URL, and images come from files: "
            "download it, and give its path or a PIL image"
        )
    if kind == "image" and isinstance(value, str | Path):
        return IMAGE_PLACEHOLDER, ImageFile(Path(value))
    if kind == "image" and isinstance(value, Image.Image):
        return IMAGE_PLACEHOLDER, InMemoryImage(value)
    raise UserError(
        f"message {message_number}: a part is {part!r:.200}; allowed are "
        "{'type': 'text', 'text': TEXT} and {'type': 'image', 'image': a PIL image or a path}"
    )


def _is_url(name: str) -> bool:
    return "://" in name or name.startswith("data:")
