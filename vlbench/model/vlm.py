"""Where the parts meet: the tower sees, the connector carries, the language model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlbench.compat.transformers_internals import (
    decoder_layer_input,
    passed_through_mask,
    replace_decoder_layer_input,
)
from vlbench.connector.base import Connector, Shapes, zero_like_loss
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.activation_checkpointing import enable_activation_checkpointing
from vlbench.model.contrastive_loss import add_own_contrast_pool, is_contrastive
from vlbench.model.generation.chat_messages import collate_prompts, sample_from_messages
from vlbench.model.generation.generate import AnswerStream, generate
from vlbench.model.generation.prefix_cache import PrefixCache
from vlbench.model.generation.sampling_options import CHAT_OPTIONS, refuse_unknown_options
from vlbench.model.generation.static_cache import CompiledDecodeStep
from vlbench.model.language_loss import summed_loss
from vlbench.model.packed_attention import OpaqueLengths, sample_bounds
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights.tensor_groups import move_and_cast
from vlbench.model.weights.weight_origin import WeightOrigin

MODEL_PARTS = ("vision", "connector", "language")


@dataclass
class VLMOutput:
    """What a forward pass gives: logits for a batch without labels, otherwise sums of losses."""

    logits: Tensor | None = None
    """`[rows, length, vocabulary]`, or None when the batch has labels."""
    loss_sum: Tensor | None = None
    """Sum of the cross entropy over supervised positions."""
    tokens: int = 0
    """Number of supervised positions."""
    extra: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The connector's own losses, `{name: (sum, count)}`."""
    features: Tensor | None = None
    """What the tower gave, when it was asked for what pairs are compared by."""
    contrast_embeddings: dict[str, Tensor] = field(default_factory=dict)
    """What pairs are compared by, see `Connector.embed`."""


class VLM(nn.Module):
    """A vision-language model: `vision`, `connector`, `language`, with tokenizer and template.

    Several threads may call `forward`, `generate` and `chat` of one model at once: these change
    nothing about it. What does (`train`, `resize`, `pursue`, `recompute`) is for one thread.
    """

    language: Any  # a causal language model of transformers with Llama's layout

    def __init__(
        self,
        vision: VisionEncoder,
        connector_class: type[Connector],
        connector_options: dict[str, Any],
        language: nn.Module,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_length: int,
    ) -> None:
        """Build `connector` with `options` between `vision` and `language`."""
        super().__init__()
        self.vision, self.language = vision, language
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = template.bind_eos(tokenizer.eos_token)
        tokenizer.limit_embeddings(self.language.config.vocab_size)
        self._connector_class, self.connector_options = connector_class, connector_options
        self.objective, self._uses_checkpointing = "language", False
        self.connector = self._build_connector()
        self.release_files: dict[str, bytes] = {}  # small files of the released model it began as
        self.weight_origins: dict[
            str, WeightOrigin
        ] = {}  # what its parts began as, by name of the part
        self.decode_step = CompiledDecodeStep()  # of compiled answers
        layers = self.language.model.layers
        self._inject_hooks = [
            layers[i].register_forward_pre_hook(
                partial(_inject_before_layer, self, i), with_kwargs=True
            )
            for i in self.connector.inject_layers
        ]

    @property
    def shapes(self) -> Shapes:
        """What the connector has to fit, at the current image size."""
        return connector_shapes(self.vision, self.language.config)

    @property
    def transform(self) -> ImageTransform:
        """The one image transform of training, evaluation and chat."""
        return self.vision.transform

    @property
    def device(self) -> torch.device:
        """Where the language model's embeddings are."""
        return self.language.get_input_embeddings().weight.device

    def _build_connector(self) -> Connector:
        connector = self._connector_class(self.shapes, **self.connector_options)
        self.vision.class_token = connector.class_token
        return connector

    def set_image_size(self, image_size: int) -> None:
        """Change the image size: the tower is resized, the connector built anew and adapted."""
        old_shapes, old_state = self.shapes, self.connector.state_dict()
        self.vision.set_image_size(image_size)
        if self.shapes != old_shapes:
            connector = self._build_connector()
            connector.prepare_objective(self.objective)
            connector.load_state_dict(dict(connector.adapt(old_state, old_shapes)), strict=True)
            before = next(iter(old_state.values()))
            move_and_cast(connector, before.dtype, before.device)
            self.connector = connector

    def set_objective(self, objective: str, fresh: bool = False) -> None:
        """Make the connector ready for a stage of `objective`; see `Connector.prepare`."""
        self.objective = objective
        before = next(self.connector.parameters(), None)
        self.connector.prepare_objective(objective, fresh)
        if before is not None:
            move_and_cast(self.connector, before.dtype, before.device)

    def train(self, mode: bool = True) -> VLM:
        """Set training mode, except for a frozen tower, which always runs in evaluation mode."""
        super().train(mode)
        if not self.is_vision_trained():
            self.vision.eval()
        return self

    def is_vision_trained(self) -> bool:
        """Tell whether any weight of the tower is trained."""
        return any(p.requires_grad for p in self.vision.parameters())

    def features(self, batch: PackedBatch) -> Tensor:
        """Return the tower's features `[images, patches, vision_width]`; no gradient if frozen."""
        if batch.features is not None:
            return batch.features
        pixels = batch.pixels
        if not len(pixels):  # a batch of text alone still runs every part, so gradients exist
            side = self.vision.image_size
            pixels = pixels.new_zeros(1, 3, side, side)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_vision_trained()):
            return self.vision(pixels.to(self.vision.dtype))

    def visual(self, batch: PackedBatch) -> Tensor:
        """Return the visual tokens `[images, tokens, width]`."""
        return self.connector(self.features(batch))

    def merge_embeddings(self, batch: PackedBatch, visual: Tensor) -> Tensor:
        """Return embeddings `[rows, length, lm_width]` with the visual tokens at their places."""
        embeds = self.language.get_input_embeddings()(batch.input_ids.clamp(min=0))
        if not len(batch.pixels):
            unused = (
                [visual]
                if self.connector.replaces_image_tokens
                else [visual, self.connector.image_embedding]
            )
            return embeds + sum(zero_like_loss(one).to(embeds.dtype) for one in unused)
        places = batch.image_positions
        if places is None:
            places = (batch.input_ids.flatten() == IMAGE_TOKEN_INDEX).nonzero()[:, 0]
        if self.connector.replaces_image_tokens:
            self.connector.check_output(visual, len(batch.pixels), embeds.shape[-1])
            values = visual.flatten(0, 1)
        else:
            values = self.connector.image_embedding.expand(len(places), -1)
        if len(values) != len(places):
            raise AssertionError(f"{len(places)} places for {len(values)} visual tokens")
        filled = embeds.flatten(0, 1).index_put((places,), values.to(embeds.dtype))
        return filled.view_as(embeds)

    def run_decoder(
        self, embeds: Tensor, visual: Tensor, image_index: Tensor, **kwargs: Any
    ) -> Any:
        """Run the decoder layers over `embeds`; `kwargs` go to the language model's forward."""
        if self.connector.inject_layers:
            kwargs |= {"visual": visual, "image_index": image_index}
        return self.language.model(inputs_embeds=embeds, **kwargs)

    def hidden_states(self, batch: PackedBatch, visual: Tensor) -> Tensor:
        """Return the last hidden states `[rows, length, lm_width]` of a batch without a cache."""
        return self.run_decoder(
            self.merge_embeddings(batch, visual),
            visual,
            batch.image_index,
            position_ids=batch.position_ids,
            attention_mask=passed_through_mask(visual.device),
            lengths=OpaqueLengths(batch.sample_lengths),
            bounds=sample_bounds(batch.sample_lengths, batch.input_ids.shape[1], visual.device),
            use_cache=False,
        ).last_hidden_state

    def loss(
        self, hidden: Tensor, labels: Tensor, supervised_positions: Tensor | None = None
    ) -> Tensor:
        """Return the cross entropy of `labels`, summed over supervised positions (at `where`)."""
        return summed_loss(self.language.lm_head, hidden, labels, supervised_positions)

    def enable_activation_checkpointing(self, mode: str) -> None:
        """Save memory: compute activations again in the backward pass instead of keeping them.

        `how` is one of `model.activation_checkpointing.CHECKPOINTING_MODES`.
        """
        self._uses_checkpointing = enable_activation_checkpointing(
            self.language, self.vision.visual, mode
        )

    def _with_checkpointing(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `function`, after `recompute` one that keeps its inputs alone for the backward.

        transformers runs hooks of a layer outside of what it recomputes, or inside, by version.
        """
        if not (self._uses_checkpointing and torch.is_grad_enabled()):
            return function
        return partial(checkpoint, function, use_reentrant=False)

    def forward(self, batch: PackedBatch, embed_pairs: bool = False) -> VLMOutput:
        """Give all logits for a batch without labels, otherwise the summed loss of its labels.

        After `pursue` with an objective of the connector's own, labels give the losses of that one
        and the language model is left out; with `embed` they give what its pairs are compared by.
        A batch without a pool (`model.contrastive_loss.add_contrast_pools`) is compared as if it
        were a whole step.
        Training must go through here: DDP and FSDP hook `forward` alone.
        """
        features = self.features(batch)
        if embed_pairs:
            rows = self.connector.contrast_embeddings(self.objective, features, batch)
            return VLMOutput(features=features, contrast_embeddings=rows)
        if self.objective != "language" and batch.labels is not None:
            if batch.contrast_pool is None and is_contrastive(self):
                batch = add_own_contrast_pool(self, batch, features)
            return VLMOutput(extra=self.connector.objective(self.objective, features, batch))
        visual = self._with_checkpointing(self.connector)(features)
        hidden = self.hidden_states(batch, visual)
        if batch.labels is None:
            return VLMOutput(logits=self.language.lm_head(hidden))
        loss = self.loss(hidden, batch.labels, batch.supervised_positions)
        extra = self.connector.losses(features, visual, batch)
        return VLMOutput(loss_sum=loss, tokens=batch.supervised_token_count, extra=extra)

    def prompt(self, messages: list[dict]) -> str:
        """Return the exact text that a conversation in the chat-message format becomes."""
        return self.template.render_prompt(sample_from_messages(messages).turns)

    def prepare(self, messages: list[dict] | list[list[dict]]) -> PackedBatch:
        """Return the batch of one conversation, or of several, ready for `generate`."""
        lists = isinstance(messages, list) and messages and isinstance(messages[0], list)
        several: Any = messages if lists else [messages]
        return collate_prompts(self, [sample_from_messages(one) for one in several])

    def generate(self, batch: PackedBatch, **options: Any) -> list[list[int]]:
        """Return the new ids of every row; options: see `model.generation.generate`."""
        return generate(self, batch, **options)

    def chat(
        self,
        messages: list[dict],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stream: Callable[[str], None] | bool = False,
        seed: int = 0,
        past: PrefixCache | None = None,
        compiled: bool = False,
        **other: Any,
    ) -> str:
        """Answer a conversation in the Hugging Face chat-message format.

        At `temperature` 0 the likeliest token is taken, otherwise one is drawn, with `top_p` from
        the likeliest that together have this probability. `stream` is called with each new piece
        of the answer's text; True prints the pieces. `past`, the same at every turn, spares reading
        the conversation again; `compiled` excludes it, see `generate`.
        """
        refuse_unknown_options("chat", other, CHAT_OPTIONS)
        show = partial(print, end="", flush=True) if stream is True else stream
        if isinstance(messages, list) and messages and isinstance(messages[0], list):
            raise UserError(
                f"chat answers one conversation, given are {len(messages)}; "
                "generate(prepare(...)) takes several"
            )
        writer = AnswerStream(self, show or (lambda text: None))
        new = self.generate(
            self.prepare(messages),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=writer if show else None,
            past=past,
            compiled=compiled,
        )
        return writer.finish_answer(new[0])

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Give the three parts by name."""
        for name in MODEL_PARTS:
            yield name, getattr(self, name)


def _inject_before_layer(
    vlm: VLM, layer_index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict]:
    """Be the hook before decoder layer `layer`: visual tokens arrive as keyword arguments."""
    hidden = decoder_layer_input(args, kwargs)
    inject = vlm._with_checkpointing(vlm.connector.inject)
    hidden = inject(layer_index, hidden, kwargs["visual"], kwargs["image_index"])
    return replace_decoder_layer_input(args, kwargs, hidden)


def connector_shapes(vision_encoder: VisionEncoder, lm_config: Any) -> Shapes:
    """Return what stands between a tower and a language model of the configuration `config`."""
    rows, columns = vision_encoder.grid
    return Shapes(
        patches=rows * columns,
        grid=(rows, columns),
        vision_width=vision_encoder.feature_width,
        lm_width=lm_config.hidden_size,
        lm_layers=lm_config.num_hidden_layers,
    )
