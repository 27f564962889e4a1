"""The vision-language model: a vision encoder, a connector and a language model, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from vlbench.compat.transformers_internals import (
    decoder_layer_input,
    passed_through_mask,
    replace_decoder_layer_input,
)
from vlbench.config.key_types import PART_NAMES
from vlbench.connector.base import Connector, ImagePlaces, Shapes, zero_like_loss
from vlbench.connector.bounded_building import NewTensorLimit, build_connector
from vlbench.connector.declared_attributes import check_injected, check_levels, check_losses
from vlbench.connector.levels import Levels, first_level, unstack_levels
from vlbench.connector.question import Question
from vlbench.data.packing import PackedBatch, number_image_tokens, number_image_views
from vlbench.errors import UserError
from vlbench.model.activation_checkpointing import checkpoint_blocks
from vlbench.model.connector_adaptation import load_adapted_state
from vlbench.model.contrastive_loss import add_own_contrast_pool, is_contrastive
from vlbench.model.decoder_families import DecoderConfig, DecoderModel, logit_divisor
from vlbench.model.frozen_modes import set_frozen_modes
from vlbench.model.language_loss import summed_loss
from vlbench.model.packed_attention import OpaqueLengths, sample_bounds
from vlbench.model.replicated_parameters import GradientAverager
from vlbench.model.view_tokens import add_newline, arrange_tokens, mark_newlines, newline_of
from vlbench.model.vision_encoder import VisionEncoder, has_trained_parameters
from vlbench.model.weights.tensor_groups import move_and_cast


@dataclass
class VLMOutput:
    """Output of a forward pass: logits for a batch without labels, otherwise sums of losses."""

    logits: Tensor | None = None
    """`[rows, length, vocabulary]`, or None when the batch has labels."""
    loss_sum: Tensor | None = None
    """Sum of the cross entropy over supervised positions."""
    tokens: int = 0
    """Number of supervised positions."""
    extra: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The connector's own losses, `{name: (sum, count)}`."""
    features: Levels | None = None
    """Features of the vision encoder; only with `embed_pairs`."""
    contrast_embeddings: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings of image-caption pairs, see `Connector.contrast_embeddings`; only with
    `embed_pairs`."""


class VLM(nn.Module):
    """A vision-language model: `vision`, `connector` and `language`.

    Several threads may call `forward` of one model at once: it changes nothing about the model.
    What does (`train`, `set_image_size`, `set_objective`, `enable_activation_checkpointing`) is for
    one thread.
    """

    language: DecoderModel
    gradient_averager: GradientAverager | None = None
    """Of the parameters that FSDP2 does not shard, once it shards the others."""

    def __init__(
        self,
        vision: VisionEncoder,
        connector_class: type[Connector],
        connector_options: dict[str, Any],
        language: DecoderModel,
        has_newline: bool = False,
    ) -> None:
        """Build a connector of `connector_class` between `vision` and `language`.

        With `has_newline` it has the parameter NEWLINE_NAME, for rows of tiled images.
        """
        super().__init__()
        self.vision, self.language = vision, language
        # once: transformers looks an attribute of a configuration up slowly, for each token
        self._logit_divisor = logit_divisor(language.config)
        if len(vision.encoders()) > 1:
            self.second_vision = vision.encoders()[1]
        self._connector_class, self.connector_options = connector_class, connector_options
        self.has_newline = has_newline
        self.objective = "language"
        self.connector = self._build_connector()
        self.enable_activation_checkpointing("none")
        layers = self.language.model.layers
        self._inject_hooks = [
            layers[index].register_forward_pre_hook(
                partial(_inject_before_layer, self, index), with_kwargs=True
            )
            for index in self.connector.inject_layers
        ]

    @property
    def shapes(self) -> Shapes:
        """What the connector has to fit, at the current image size."""
        return connector_shapes(self.vision, self.language.config)

    @property
    def device(self) -> torch.device:
        """Device of the language model's embeddings."""
        return self.token_embedding.weight.device

    @property
    def token_embedding(self) -> nn.Embedding:
        """The language model's embedding of token ids."""
        embedding: nn.Embedding = self.language.model.embed_tokens
        return embedding

    def _build_connector(self) -> Connector:
        connector = build_connector(self._connector_class, self.shapes, self.connector_options)
        if self.has_newline:
            add_newline(connector, self.shapes.lm_width)
        self.vision.read_blocks(connector.vision_layers, connector.class_token)
        return connector

    def set_image_size(self, image_size: int) -> None:
        """Resize the vision encoder to `image_size` pixels; rebuild and adapt the connector.

        It is done on the host: on a GPU numbers would be rounded otherwise, and a run that is
        resumed, whose weights come from files, would go on with others.
        """
        device = self.device
        if device.type not in ("cpu", "meta"):
            for encoder in self.vision.encoders():
                encoder.cpu()
            self.connector.cpu()
        old_shapes, old_state = self.shapes, self.connector.state_dict()
        self.vision.set_image_size(image_size)
        if self.shapes != old_shapes:
            connector = self._build_connector()
            with NewTensorLimit(type(connector)):
                connector.prepare_objective(self.objective)
            load_adapted_state(connector, old_state, old_shapes, self.shapes)
            self.connector = connector
        if device.type not in ("cpu", "meta"):
            for encoder in self.vision.encoders():
                encoder.to(device)
            self.connector.to(device)

    def set_objective(self, objective: str, fresh: bool = False) -> None:
        """Prepare the connector for a stage of `objective`; see `Connector.prepare_objective`."""
        self.objective = objective
        parameter = next(self.connector.parameters(), None)
        with NewTensorLimit(type(self.connector)):
            self.connector.prepare_objective(objective, fresh)
        if parameter is not None:
            move_and_cast(self.connector, parameter.dtype, parameter.device)

    def train(self, mode: bool = True) -> VLM:
        """Set training mode; parts without trained parameters stay out of it (`frozen_modes`)."""
        super().train(mode)
        set_frozen_modes([*self.vision.encoders(), self.connector], self.language)
        return self

    def is_vision_trained(self) -> bool:
        """Tell whether any weight of a vision encoder is trained."""
        return any(has_trained_parameters(encoder) for encoder in self.vision.encoders())

    def encoder_blocks(self) -> list[nn.Module]:
        """Return the transformer blocks of all vision encoders."""
        return [block for encoder in self.vision.encoders() for block in encoder.blocks()]

    def extract_features(self, batch: PackedBatch) -> Levels:
        """Return the vision encoder's features `[images, patches, vision_width]`.

        They are a tuple with an entry for each of the connector's `vision_layers`, if it names any.
        They carry no gradient while the encoder is frozen. A batch without images gives the
        features of one blank image, so that every part runs and every gradient exists.
        """
        if batch.features is not None:
            return unstack_levels(batch.features)
        pixels = batch.normalized_pixels()
        if not len(pixels):
            pixels = pixels.new_zeros(1, *self.vision.pixel_shape)
        grids = (batch.patch_grids,) if batch.patch_grids else ()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_vision_trained()):
            features: Levels = self.vision(pixels.to(self.vision.dtype), *grids)
            return features

    def connector_inputs(self, batch: PackedBatch, features: Levels) -> tuple[Any, ...]:
        """Return the arguments of the connector's forward: features, and what it reads beside.

        Raises:
            UserError: when it reads questions, and the batch was made without.
        """
        if not self.connector.question_length:
            return (features,)
        return features, self._embed_questions(batch, first_level(features).dtype)

    @torch.no_grad()
    def _embed_questions(self, batch: PackedBatch, dtype: torch.dtype) -> Question:
        """Return the question of each image in the language model's embeddings.

        They carry no gradient: as in InstructBLIP, what the connector makes of a text is learned in
        the connector, and the language model's embeddings learn from what it reads itself. So the
        connector computes the same whether the language model is trained or frozen. A batch without
        images gives the empty question of one blank image.
        """
        ids = batch.question_ids
        if not len(batch.pixels):
            ids = batch.input_ids.new_full((1, 1), -1)
        if ids is None or len(ids) != max(1, len(batch.pixels)):
            raise UserError(
                f"connector {type(self.connector).__name__} reads the question of each image, and "
                "this batch has none: prepare() or the model's processor makes it of a conversation"
            )
        return Question(self.token_embedding(ids.clamp(min=0)).to(dtype), (ids >= 0).sum(1))

    def encode_images(self, batch: PackedBatch) -> Levels:
        """Return the visual tokens `[images, tokens, width]` of a batch, or their levels."""
        features = self.extract_features(batch)
        visual: Levels = self.connector(*self.connector_inputs(batch, features))
        check_levels(self.connector, visual)
        return visual

    def image_places(self, batch: PackedBatch) -> ImagePlaces | None:
        """Return image and visual token of each position; None if the connector never injects."""
        if not self.connector.inject_layers:
            return None
        tokens = self.connector.tokens_per_image
        token_index = number_image_tokens(batch, tokens)
        view_index = number_image_views(batch, tokens)
        # the blank image of a batch without images is one view, which nothing looks at
        bounds = batch.view_bounds if len(batch.pixels) else None
        return ImagePlaces(batch.image_index, token_index, view_index, bounds)

    def merge_embeddings(self, batch: PackedBatch, visual: Levels) -> Tensor:
        """Return embeddings `[rows, length, lm_width]`, visual tokens at the image positions."""
        embeds: Tensor = self.token_embedding(batch.input_ids.clamp(min=0))
        if not len(batch.pixels):
            unused = (
                [visual]
                if self.connector.replaces_image_tokens
                else [visual, self.connector.image_embedding]
            )
            unused += [newline_of(self.connector)] if self.has_newline else []
            for tensor in unused:
                embeds = embeds + zero_like_loss(tensor).to(embeds.dtype)
            return embeds
        positions = batch.find_image_positions()
        if self.connector.replaces_image_tokens:
            self.connector.check_output(visual, len(batch.pixels), embeds.shape[-1])
            values = first_level(visual).flatten(0, 1)
        else:
            values = self.connector.image_embedding.expand(len(positions), -1)
        if batch.visual_index is not None:
            newline = newline_of(self.connector) if self.has_newline else None
            arrange = arrange_tokens if self.connector.replaces_image_tokens else mark_newlines
            values = arrange(values, batch.visual_index, newline)
        if len(values) != len(positions):
            raise AssertionError(f"{len(positions)} image positions for {len(values)} tokens")
        length = embeds.shape[1]
        places = (positions.div(length, rounding_mode="floor"), positions.remainder(length))
        # no view of another tensor: compiled decoder layers would need a graph of its own for it
        return embeds.index_put(places, values.to(embeds.dtype))

    def run_decoder(
        self, embeds: Tensor, visual: Levels | None, where: ImagePlaces | None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """Run the decoder layers over `embeds`; `kwargs` go to the language model's forward.

        `where` are the `image_places` of the positions; without them `visual` is not read.
        """
        if where is not None:
            kwargs |= {"visual": visual, **where.tensors()}
        output: BaseModelOutputWithPast = self.language.model(inputs_embeds=embeds, **kwargs)
        return output

    def hidden_states(self, batch: PackedBatch, visual: Levels, for_loss: bool = False) -> Tensor:
        """Return the last hidden states `[rows, length, lm_width]` of a batch, without KV cache.

        With `for_loss` those of the supervised positions alone are right.
        """
        device = first_level(visual).device
        hidden = self.run_decoder(
            self.merge_embeddings(batch, visual),
            visual,
            self.image_places(batch),
            position_ids=batch.position_ids,
            attention_mask=passed_through_mask(device),
            lengths=OpaqueLengths(batch.sample_lengths),
            bounds=sample_bounds(batch.sample_lengths, batch.input_ids.shape[1], device),
            use_cache=False,
            supervised_positions=batch.supervised_positions if for_loss else None,
        ).last_hidden_state
        assert hidden is not None
        return hidden

    def language_loss(
        self, hidden: Tensor, labels: Tensor, supervised_positions: Tensor | None = None
    ) -> Tensor:
        """Return the cross entropy of `labels`, summed over the supervised positions."""
        hidden = self._divide_logits(hidden)
        return summed_loss(self.language.lm_head, hidden, labels, supervised_positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[..., vocabulary]` of last hidden states `[..., lm_width]`."""
        logits: Tensor = self.language.lm_head(self._divide_logits(hidden))
        return logits

    def _divide_logits(self, hidden: Tensor) -> Tensor:
        """Return what `lm_head` makes the logits of, which some families divide by a number."""
        return hidden if self._logit_divisor == 1 else hidden / self._logit_divisor

    def enable_activation_checkpointing(self, mode: str) -> None:
        """Recompute activations in the backward pass instead of keeping them in memory.

        `mode` is one of `model.activation_checkpointing.CHECKPOINTING_MODES`.
        """
        self._uses_checkpointing = mode != "none"
        checkpoint_blocks(self.language.model.layers, self.encoder_blocks(), mode)

    def _with_checkpointing(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `function`, or under activation checkpointing one that keeps its inputs alone.

        The hooks of a layer, which inject, run outside of what the layer recomputes.
        """
        if not (self._uses_checkpointing and torch.is_grad_enabled()):
            return function
        return partial(checkpoint, function, use_reentrant=False)

    def forward(self, batch: PackedBatch, embed_pairs: bool = False) -> VLMOutput:
        """Return all logits of a batch without labels, otherwise the summed loss of its labels.

        With an objective of the connector's own (`set_objective`) a batch with labels gives the
        losses of that objective, and the language model is left out. With `embed_pairs` it gives
        the embeddings by which image-caption pairs are compared; a batch without a contrast pool
        (`model.contrastive_loss.add_contrast_pools`) is then compared as if it were a whole step.
        Training must go through here: DDP and FSDP hook `forward` alone.
        """
        features = self.extract_features(batch)
        if embed_pairs:
            rows = self.connector.contrast_embeddings(self.objective, features, batch)
            return VLMOutput(features=features, contrast_embeddings=rows)
        if self.objective != "language" and batch.labels is not None:
            if batch.contrast_pool is None and is_contrastive(self):
                batch = add_own_contrast_pool(self, batch, features)
            losses = self.connector.objective(self.objective, features, batch)
            return VLMOutput(extra=check_losses(self.connector, losses))
        inputs = self.connector_inputs(batch, features)
        visual = self._with_checkpointing(self.connector)(*inputs)
        check_levels(self.connector, visual)
        hidden = self.hidden_states(batch, visual, for_loss=batch.labels is not None)
        if batch.labels is None:
            return VLMOutput(logits=self.logits(hidden))
        loss = self.language_loss(hidden, batch.labels, batch.supervised_positions)
        extra = check_losses(self.connector, self.connector.losses(features, visual, batch))
        return VLMOutput(loss_sum=loss, tokens=batch.supervised_token_count, extra=extra)

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the parts of this model with their names."""
        for name in PART_NAMES:
            if hasattr(self, name):
                yield name, getattr(self, name)


def _inject_before_layer(
    vlm: VLM,
    layer_index: int,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of decoder layer `layer_index`: the connector changes its input.

    The visual tokens arrive among the keyword arguments of the language model's forward.
    """
    hidden = decoder_layer_input(args, kwargs)
    inject = vlm._with_checkpointing(vlm.connector.inject)
    where = ImagePlaces.from_tensors(kwargs)
    injected = inject(layer_index, hidden, kwargs["visual"], where)
    check_injected(vlm.connector, layer_index, hidden, injected)
    return replace_decoder_layer_input(args, kwargs, injected)


def connector_shapes(vision_encoder: VisionEncoder, lm_config: DecoderConfig) -> Shapes:
    """Return the shapes between a vision encoder and a language model of a configuration."""
    rows, columns = vision_encoder.grid
    return Shapes(
        patches=rows * columns,
        grid=(rows, columns),
        vision_width=vision_encoder.feature_width,
        lm_width=lm_config.hidden_size,
        lm_layers=lm_config.num_hidden_layers,
        has_class_token=vision_encoder.has_class_token,
        vision_blocks=len(vision_encoder.blocks()),
        vision_layer=vision_encoder.block_index,
    )
