"""A model with its processor, ready to train or to answer: what is built, loaded and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.connector.levels import Levels
from vlbench.core_sharing import share_cores
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.packing import PackedBatch
from vlbench.data.square_images import open_whole
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.decoder_families import DecoderModel
from vlbench.model.generation.answer_text import AnswerStream
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.generate import TokenCallback, generate
from vlbench.model.generation.kv_cache import PrefixCache
from vlbench.model.generation.sampling_options import (
    CHAT_OPTIONS,
    GENERATE_OPTIONS,
    refuse_unknown_options,
)
from vlbench.model.shown_answer import ShownAnswer
from vlbench.model.view_tokens import check_native_aspect
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.vlm import VLM, VLMOutput
from vlbench.model.weights.weight_origin import WeightOrigin
from vlbench.processor import ChatMessage, Processor, holds_conversations, sample_from_messages

ImageInput = str | Path | Image.Image


class LoadedVLM:
    """A vision-language model and its processor: `model` computes, `processor` makes its inputs.

    Several threads may call it, `generate` and `chat` at once. What changes the model (`train`,
    `to`, `set_image_size`) is for one thread.
    """

    def __init__(self, model: VLM, processor: Processor) -> None:
        """Join a model and the processor that makes its inputs."""
        self.model, self.processor = model, processor
        self.release_files: dict[str, bytes] = {}
        """Small files of the released model that this one began as."""
        self.weight_origins: dict[str, WeightOrigin] = {}
        """What the parts began as, by name of the part."""
        self.decode_step = CompiledDecodeStep()
        """The compiled step of `generate(compiled=True)`."""

    @property
    def vision(self) -> VisionEncoder:
        """The vision encoder."""
        return self.model.vision

    @property
    def connector(self) -> Connector:
        """The connector."""
        return self.model.connector

    @property
    def language(self) -> DecoderModel:
        """The language model."""
        return self.model.language

    @property
    def tokenizer(self) -> Tokenizer:
        """The language model's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the language model's embeddings."""
        return self.model.device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's parameters."""
        return self.model.parameters()

    def train(self, mode: bool = True) -> LoadedVLM:
        """Set the model's training mode; a frozen vision encoder stays in evaluation mode."""
        self.model.train(mode)
        return self

    def eval(self) -> LoadedVLM:
        """Set the model's evaluation mode."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> LoadedVLM:
        """Move or cast the model, as `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    def set_image_size(self, image_size: int) -> None:
        """Change the image size in pixels of the model and of the processor."""
        self.model.set_image_size(image_size)
        self.processor = self.processor.with_image_inputs(
            self.model.vision.transform,
            self.model.connector.tokens_per_image,
            self.model.connector.question_length,
            self.model.connector.token_grid,
        )

    def prompt(self, messages: list[ChatMessage]) -> str:
        """Return the exact text that a conversation in the chat-message format becomes."""
        return self.processor.prompt(messages)

    def prepare(self, messages: list[ChatMessage] | list[list[ChatMessage]]) -> PackedBatch:
        """Return the batch of one conversation, or of several, ready for `generate`."""
        return self.processor.prepare(messages).to(self.device)

    def features(self, batch: PackedBatch) -> Levels:
        """Return the vision encoder's features `[images, patches, vision_width]`.

        They are a tuple where the connector reads several blocks (`Connector.vision_layers`).
        """
        with share_cores(self.device):
            return self.model.extract_features(batch)

    def visual(self, batch: PackedBatch) -> Levels:
        """Return the visual tokens `[images, tokens, width]`, or the connector's levels of them."""
        with share_cores(self.device):
            return self.model.encode_images(batch)

    def __call__(self, batch: PackedBatch) -> VLMOutput:
        """Return the model's logits for a batch without labels, otherwise its losses."""
        with share_cores(self.device):
            output: VLMOutput = self.model(batch)
        return output

    def generate(
        self,
        batch: PackedBatch,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: TokenCallback | None = None,
        past: PrefixCache | None = None,
        compiled: bool = False,
        **unknown_options: Any,
    ) -> list[list[int]]:
        """Return the new ids of every row; for the options see `model.generation.generate`."""
        refuse_unknown_options("generate", unknown_options, GENERATE_OPTIONS)
        with share_cores(self.device):
            return generate(
                self.model,
                self.processor,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_token=on_token,
                past=past,
                compiled=compiled,
                decode_step=self.decode_step,
            )

    def chat(
        self,
        messages: list[ChatMessage],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stream: Callable[[str], None] | bool = False,
        seed: int = 0,
        past: PrefixCache | None = None,
        compiled: bool = False,
        **unknown_options: Any,
    ) -> str:
        """Answer a conversation in the Hugging Face chat-message format.

        Args:
            messages: The conversation; its last message is the user's.
            max_new_tokens: Tokens of the answer at most.
            temperature: 0 for the likeliest token; otherwise one is drawn.
            top_p: A token is drawn from the likeliest that together have this probability.
            stream: Called with each new piece of the answer's text; True prints the pieces.
            seed: Of the random generator of this call.
            past: The cache of the conversation, the same at every turn, so that earlier turns are
                not computed again.
            compiled: Compile the decoding step; excludes `past`.
        """
        refuse_unknown_options("chat", unknown_options, CHAT_OPTIONS)
        if holds_conversations(messages):
            raise UserError(
                f"chat answers one conversation, given are {len(messages)}; "
                "generate(prepare(...)) takes several"
            )
        on_text = partial(print, end="", flush=True) if stream is True else stream
        answer_stream = AnswerStream(self.processor, on_text or (lambda text: None))
        new_ids = self.generate(
            self.prepare(messages),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=answer_stream if on_text else None,
            past=past,
            compiled=compiled,
        )
        return answer_stream.finish_answer(new_ids[0])

    def ask(
        self,
        images: ImageInput | Sequence[ImageInput] | None,
        question: str,
        **chat_options: Any,
    ) -> ShownAnswer:
        """Answer one question; `str()` of the result is the text, and a notebook shows it whole.

        Args:
            images: A path or a PIL image, several, or None.
            question: The text that follows the images.
            chat_options: Those of `chat`.
        """
        if images is None:
            images = []
        several = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in several]
        content.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": content}]
        shown = sample_from_messages(messages).images
        opened = tuple(open_whole(image, self.processor.transform.exif) for image in shown)
        return ShownAnswer(question, self.chat(messages, **chat_options), opened)


def assemble_vlm(
    vision: VisionEncoder,
    connector_class: type[Connector],
    connector_options: dict[str, Any],
    language: DecoderModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    view_settings: ViewSettings | None = None,
) -> LoadedVLM:
    """Build the connector between two parts, and the processor: the one way to a whole model.

    Args:
        vision: The vision encoder, at its image size.
        connector_class: The connector, built with `connector_options` for the parts' shapes.
        connector_options: Keyword arguments of the connector's class.
        language: The language model.
        tokenizer: Its tokenizer.
        template: The chat template, not yet bound to the tokenizer's end of text.
        max_length: Length in tokens at which samples of a training are cut.
        view_settings: How images become views; None: each is one.

    Raises:
        UserError: when the connector's options do not fit the shapes.
    """
    has_newline = view_settings is not None and view_settings.has_newline
    try:
        model = VLM(vision, connector_class, connector_options, language, has_newline)
    except ValueError as error:
        raise UserError(str(error)) from error
    except Exception as error:
        registry.blame_connector_file(error)
        raise
    check_native_aspect(vision, model.connector, view_settings)
    tokenizer.limit_embeddings(language.config.vocab_size)
    processor = Processor(
        tokenizer=tokenizer,
        template=template.bind_eos(tokenizer.eos_token),
        transform=vision.transform,
        tokens_per_image=model.connector.tokens_per_image,
        max_length=max_length,
        max_positions=language.config.max_position_embeddings,
        question_length=model.connector.question_length,
        token_grid=model.connector.token_grid,
        view_settings=view_settings,
    )
    return LoadedVLM(model, processor)
