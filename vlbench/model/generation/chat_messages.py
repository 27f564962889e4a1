"""Conversations as people write them (the Hugging Face chat format) made into prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vlbench.data.image_processing import ImageFile, to_rgb_image
from vlbench.data.packing import PackedBatch, assign_image_index, stack_pixels
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage, Sample, check_turns
from vlbench.data.sample_encoding import tokenize_pieces
from vlbench.errors import BadSample, UserError

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

MESSAGE_FORMAT = "{'role': 'user', 'content': a text or a list of parts}"
TURN_ROLES = {"system": "system", "user": "human", "assistant": "assistant"}


class ConversationTooLong(UserError):
    """A conversation that the language model has no room for."""


@dataclass(frozen=True)
class InMemoryImage:
    """A picture that is already in memory."""

    image: Image.Image
    name: str = "image"

    def open(self) -> Image.Image:
        """Return the picture in RGB, as if it came from a file."""
        return to_rgb_image(self.image, self.name)


def sample_from_messages(messages: list[dict[str, Any]]) -> Sample:
    """Turn messages into a sample.

    Each message has a `role` (system, user, assistant) and a `content`: a text, or a list of
    `{"type": "text", "text": ...}` and `{"type": "image", "image": a PIL image or a path}`. Between
    an image and a text stands a newline, as the reference writes it, between two images nothing.
    """
    turns: list[ChatTurn] = []
    pictures: list[LazyImage] = []
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages are a list of {MESSAGE_FORMAT}, given {messages!r:.200}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str | list):
            raise UserError(f"message {number} is {message!r:.200}; wanted is {MESSAGE_FORMAT}")
        if message.get("role") not in TURN_ROLES:
            raise UserError(
                f"message {number}: role is {message.get('role')!r}; allowed are "
                f"{', '.join(TURN_ROLES)}"
            )
        texts: list[str] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            text, image = _parse_content_part(part, number)
            if texts and not (image and texts[-1].endswith(IMAGE_PLACEHOLDER)):
                texts.append("\n")
            texts.append(text)
            pictures += [image] if image else []
        turns.append(ChatTurn(TURN_ROLES[message["role"]], "".join(texts)))
    sample = Sample("chat", tuple(turns), tuple(pictures))
    try:
        check_turns(sample)
    except BadSample as bad:
        raise UserError(f"messages: {bad.reason}") from bad
    return sample


def _parse_content_part(part: Any, message_number: int) -> tuple[str, LazyImage | None]:
    """Return the text that a part of message `number` becomes, and its picture."""
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if kind else None
    if kind == "text" and isinstance(value, str):
        return value, None
    if kind == "image" and isinstance(value, str) and _is_url(value):
        raise UserError(
            f"message {message_number}: image {value:.100} is a URL, and pictures come from files: "
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


def encode_prompt(vlm: VLM, sample: Sample) -> list[int]:
    """Return the ids of a sample's prompt, `tokens_per_image` places per image.

    The text is cut at the placeholders and each piece tokenised on its own, as the reference does.
    """
    text = vlm.template.render_prompt(sample.turns)
    if text.count(IMAGE_PLACEHOLDER) != len(sample.images):
        raise UserError(
            f"{text.count(IMAGE_PLACEHOLDER)} image places for {len(sample.images)} images"
        )
    pieces = tokenize_pieces([(text, False)], vlm.tokenizer, vlm.connector.tokens_per_image)
    ids = [token for chunk, _ in pieces for token in chunk]
    most = vlm.language.config.max_position_embeddings
    if len(ids) >= most:
        raise ConversationTooLong(
            f"the conversation has {len(ids)} tokens with its images; the language model reads "
            f"fewer than {most}"
        )
    vlm.tokenizer.check_token_ids(ids)
    return ids


def collate_prompts(vlm: VLM, samples: Sequence[Sample]) -> PackedBatch:
    """Return prompts as one batch, padded on the left, one sample per row."""
    rows = [encode_prompt(vlm, sample) for sample in samples]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    sample_index = torch.full_like(ids, -1)
    image_index = torch.full_like(ids, -1)
    first = 0
    for row, tokens in enumerate(rows):
        start = length - len(tokens)
        ids[row, start:] = torch.tensor(tokens)
        sample_index[row, start:] = row
        image_index[row, start:] = assign_image_index(
            ids[row, start:], vlm.connector.tokens_per_image, first
        )
        first += len(samples[row].images)
    positions = (sample_index >= 0).long().cumsum(1).sub(1).clamp(min=0)
    return PackedBatch(
        input_ids=ids,
        labels=None,
        position_ids=positions,
        sample_index=sample_index,
        image_index=image_index,
        pixels=stack_pixels([vlm.transform.load_pixels(p) for one in samples for p in one.images]),
        sample_ids=[sample.id for sample in samples],
        # padding counts as a sample of its own, so that no position of a prompt sees it
        sample_lengths=[[n for n in (length - len(row), len(row)) if n] for row in rows],
        supervised_token_count=0,
    ).to(vlm.device)
