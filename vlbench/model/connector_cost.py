"""What a connector costs at a size, counted on shapes alone: no weight takes memory.

`count_connector_cost` counts a whole model; `ConnectorCostCounter` counts one figure of a connector
without the rest of the model, which is fast enough for hundreds of connectors. If images are tiled,
the image is that of `data.reference_image`, with all of its views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from vlbench.compat.transformers_internals import passed_through_mask
from vlbench.connector import registry
from vlbench.connector.base import Connector
from vlbench.connector.blank_inputs import QUESTION_TOKENS, blank_inputs
from vlbench.connector.bounded_building import build_connector
from vlbench.connector.declared_attributes import check_injected, check_levels
from vlbench.connector.levels import Levels, as_levels
from vlbench.data.reference_image import REFERENCE_NAME, tile_reference
from vlbench.data.view_layout import ViewLayout, ViewSettings
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.language_model import build_random_language
from vlbench.model.train_flops import counted_flops, head_width, temporarily_frozen, text_places
from vlbench.model.view_tokens import connector_layout
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.vlm import VLM, connector_shapes


class ImageCost(NamedTuple):
    """What one image takes."""

    views: int
    """Squares that the vision encoder sees."""
    positions: int
    """Image positions in the text."""


class ConnectorCost(NamedTuple):
    """The cost of one image and a question of QUESTION_TOKENS tokens."""

    parameters: int
    """Of the connector."""
    tokens: int
    """Image positions that the image takes in the text."""
    latents: int
    """Visual tokens that decoder layers attend to; 0 when the image positions hold all there is."""
    flops: int
    """Floating-point operations of connector and language model up to the first answer token."""
    cache: int
    """Bytes of the KV cache that the image takes in 16 bits, latents included."""


def count_connector_cost(vlm: VLM, layout: ViewLayout | None = None) -> ConnectorCost:
    """Count the cost of a model's connector at its image size; on `meta` nothing is computed.

    `layout` is that of the model's processor: how images become views.
    """
    connector, config = vlm.connector, vlm.language.config
    image = _image_cost(connector, layout)
    length = image.positions + QUESTION_TOKENS
    inputs = blank_inputs(connector, vlm.shapes, vlm.vision.dtype, vlm.device, image.views)
    with vlm.device:
        embeds = torch.zeros(1, length, config.hidden_size, dtype=vlm.token_embedding.weight.dtype)
        positions = torch.arange(length)[None]
    where = text_places(length, vlm.device, image.views) if connector.inject_layers else None
    with temporarily_frozen(vlm), torch.no_grad(), counted_flops() as counter:
        visual: Levels = connector(*inputs)
        hidden = vlm.run_decoder(
            embeds,
            visual,
            where,
            position_ids=positions,
            attention_mask=passed_through_mask(vlm.device),
            lengths=[[length]],
            use_cache=False,
        ).last_hidden_state
        assert hidden is not None
        vlm.logits(hidden[:, -1])
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    numbers_per_token = 2 * kv_heads * head_width(config) * config.num_hidden_layers
    latents = image.views * connector.count_latents(visual)
    latent_width = sum(level.shape[2] for level in as_levels(visual))
    return ConnectorCost(
        parameters=sum(parameter.numel() for parameter in connector.parameters()),
        tokens=image.positions,
        latents=latents,
        flops=counter.get_total_flops(),
        cache=2 * (numbers_per_token * image.positions + latents * latent_width),
    )


def _image_cost(connector: Connector, layout: ViewLayout | None) -> ImageCost:
    """Return what an image takes; if it is tiled, the reference image."""
    if layout is None:
        return ImageCost(1, connector.tokens_per_image)
    tiled = tile_reference(layout)
    return ImageCost(len(tiled.images[0].views), len(tiled.visual_index))


class ConnectorCostCounter:
    """Counts single figures of connectors between a vision encoder and a language model."""

    def __init__(
        self,
        encoder: VisionEncoder,
        lm_config: DecoderConfig,
        max_length: int,
        view_settings: ViewSettings | None,
        image_sizes: Sequence[int],
    ) -> None:
        """Find the connector's shapes at the image size of every stage, the last one last.

        Args:
            encoder: The vision encoder, or the pair of both, on `meta`.
            lm_config: Of the language model.
            max_length: Length in tokens at which samples of a training are cut.
            view_settings: How images become views; None: each is one.
            image_sizes: Of the stages, in pixels.
        """
        self.encoder, self.lm_config, self.max_length = encoder, lm_config, max_length
        self.view_settings, self.side = view_settings, image_sizes[-1]
        self.stage_shapes = []
        for image_size in image_sizes:
            self.encoder.set_image_size(image_size)
            self.stage_shapes.append(connector_shapes(self.encoder, self.lm_config))

    def build_connector(
        self, connector_class: type[Connector], options: dict[str, Any]
    ) -> Connector:
        """Return the connector on `meta` at the last stage's image size.

        Raises:
            ValueError: when the options or blocks that are read do not fit, an image fills the
                whole text, or the connector's own code fails.
        """
        with torch.device("meta"), registry.blame_connector_errors(left_alone=ValueError):
            built = build_connector(connector_class, self.stage_shapes[-1], options)
        self.encoder.read_blocks(built.vision_layers, built.class_token)
        positions = self._image_cost(built).positions
        if positions >= self.max_length:
            image = "an image" if self.view_settings is None else REFERENCE_NAME
            raise ValueError(
                f"{image} takes {positions} tokens of the text, and "
                f"language.max_length={self.max_length} leaves no room for them"
            )
        return built.requires_grad_(False)  # FlopCounterMode fails on views of trained parameters

    def fits_all_stages(self, connector_class: type[Connector], options: dict[str, Any]) -> bool:
        """Tell whether the connector can be built at the image size of every stage."""
        try:
            with torch.device("meta"):
                for shapes in dict.fromkeys(self.stage_shapes):
                    build_connector(connector_class, shapes, options)
        except ValueError:
            return False
        return True

    def count_parameters(self, connector: Connector) -> int:
        """Count the connector's parameters, and the newline of rows of tiles beside them."""
        has_newline = self.view_settings is not None and self.view_settings.has_newline
        own = sum(parameter.numel() for parameter in connector.parameters())
        return own + has_newline * self.lm_config.hidden_size

    def count_visual_tokens(self, connector: Connector) -> int:
        """Count what the language model can attend to of an image.

        That is the image positions, where visual tokens replace them, and the latents that decoder
        layers attend to: 64 for Flamingo's 64 latents. Tokens that are both in the text and
        attended to, as in `mixed`, count twice.
        """
        positions = self._image_cost(connector).positions
        return positions * connector.replaces_image_tokens + self.count_latents(connector)

    def count_latents(self, connector: Connector) -> int:
        """Count the visual tokens of an image that decoder layers attend to."""
        if not connector.inject_layers:
            return 0
        with torch.no_grad(), registry.blame_connector_errors():
            visual: Levels = connector(*self._blank_inputs(connector))
            check_levels(connector, visual)
        return self._image_cost(connector).views * connector.count_latents(visual)

    def count_flops(self, connector: Connector) -> int:
        """Count the operations of connector and language model, as `count_connector_cost` does."""
        first, second, third = self._language_flops
        # a polynomial of degree 2 in the length, from its values at 1, 2 and 3: exact, in integers
        steps = self._image_cost(connector).positions + QUESTION_TOKENS - 1
        growth = second - first
        curvature = third - second - growth
        language_flops = first + steps * growth + steps * (steps - 1) // 2 * curvature
        return self._connector_flops(connector) + language_flops

    @cached_property
    def _language_flops(self) -> list[int]:
        """Operations of the language model alone for texts of 1, 2 and 3 tokens."""
        counts = []
        with torch.device("meta"), torch.no_grad():
            language = build_random_language(self.lm_config)
            for length in (1, 2, 3):
                embeds = torch.zeros(1, length, self.lm_config.hidden_size)
                with counted_flops() as counter:
                    hidden = language.model(
                        inputs_embeds=embeds,
                        position_ids=torch.arange(length)[None],
                        attention_mask=passed_through_mask(embeds.device),
                        lengths=[[length]],
                        use_cache=False,
                    ).last_hidden_state
                    language.lm_head(hidden[:, -1])
                counts.append(counter.get_total_flops())
        return counts

    def _connector_flops(self, connector: Connector) -> int:
        image = self._image_cost(connector)
        length = image.positions + QUESTION_TOKENS
        hidden = torch.zeros(1, length, self.lm_config.hidden_size, device="meta")
        where = text_places(length, hidden.device, image.views)
        with torch.no_grad(), counted_flops() as counter, registry.blame_connector_errors():
            visual = connector(*self._blank_inputs(connector, image.views))
            check_levels(connector, visual)
            for layer in connector.inject_layers:
                check_injected(
                    connector, layer, hidden, connector.inject(layer, hidden, visual, where)
                )
        return counter.get_total_flops()

    def _image_cost(self, connector: Connector) -> ImageCost:
        """Return what an image takes at the last stage's image size."""
        layout = connector_layout(connector, self.view_settings, self.side)
        return _image_cost(connector, layout)

    def _blank_inputs(self, connector: Connector, views: int = 1) -> tuple[Any, ...]:
        """Return what `connector` reads of the views of one image, on `meta`."""
        return blank_inputs(connector, self.stage_shapes[-1], views=views)


BUDGET_COUNTS: dict[str, Callable[[ConnectorCostCounter, Connector], int]] = {
    "params": ConnectorCostCounter.count_parameters,
    "visual_tokens": ConnectorCostCounter.count_visual_tokens,
    "flops": ConnectorCostCounter.count_flops,
}
"""What rows of a comparison can be matched by, and how it is counted."""
