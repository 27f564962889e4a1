"""One figure of a connector's cost, counted without the rest of the model: fit for hundreds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlbench.compat.transformers_internals import passed_through_mask
from vlbench.config.schema import Recipe
from vlbench.connector.base import Connector
from vlbench.model.connector_cost import QUESTION_TOKENS
from vlbench.model.language_model import (
    build_random_language,
    named_language_config,
    read_language_config,
)
from vlbench.model.vision_encoder import build_vision_encoder
from vlbench.model.vlm import connector_shapes


class ConnectorFrame:
    """Tower and language model of a recipe, without weights: connectors are built between them.

    A folder in `language.weights` brings its own architecture; a hub id has that of
    `language.name`, so that nothing has to be fetched.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Note the shapes at the image size of every stage."""
        vision, language = recipe.vision, recipe.language
        folder = Path(language.weights).expanduser()
        self.lm_config = (
            read_language_config(folder)
            if folder.is_dir()
            else named_language_config(language.name)
        )
        self.max_length = language.max_length
        with torch.device("meta"):
            tower = build_vision_encoder(vision.name, "random", vision.layer, vision.norm)
        self.stage_shapes = []
        for stage in recipe.stages.values():
            tower.set_image_size(stage.image_size)
            self.stage_shapes.append(connector_shapes(tower, self.lm_config))

    def build_connector(
        self, connector_class: type[Connector], options: dict[str, Any]
    ) -> Connector:
        """Return `connector` on `meta` at the last stage's image size; a ValueError if unfit."""
        with torch.device("meta"):
            built = connector_class(self.stage_shapes[-1], **options)
        if built.tokens_per_image >= self.max_length:
            raise ValueError(
                f"a picture takes {built.tokens_per_image} tokens of the text, and "
                f"language.max_length={self.max_length} leaves no room for them"
            )
        return built.requires_grad_(False)  # torch's counter stumbles over views of what is trained

    def fits_all_stages(self, connector_class: type[Connector], options: dict[str, Any]) -> bool:
        """Tell whether `connector` can be built at the image size of every stage."""
        try:
            with torch.device("meta"):
                for shapes in dict.fromkeys(self.stage_shapes):
                    connector_class(shapes, **options)
        except ValueError:
            return False
        return True

    def count_parameters(self, connector: Connector) -> int:
        """Count the connector's parameters."""
        return sum(parameter.numel() for parameter in connector.parameters())

    def count_visual_tokens(self, connector: Connector) -> int:
        """Count what the language model can attend to of a picture.

        That is the places, where visual tokens fill them, and the latents that decoder layers
        attend to: 64 for Flamingo's 64 latents and its empty place; tokens that stand in the text
        and are looked at again, as in `mixed`, count twice.
        """
        places = connector.tokens_per_image if connector.replaces_image_tokens else 0
        if not connector.inject_layers:
            return places
        with torch.no_grad():
            return places + connector(self._empty_features(connector)).shape[1]

    def count_flops(self, connector: Connector) -> int:
        """Count the operations of connector and language model, as `cost` does."""
        own, (one, two, three) = self._connector_flops(connector), self._language_flops
        # a polynomial of degree 2 in the length, from its values at 1, 2 and 3: exact, in integers
        more, steps = connector.tokens_per_image + QUESTION_TOKENS - 1, two - one
        return own + one + more * steps + more * (more - 1) // 2 * (three - two - steps)

    @cached_property
    def _language_flops(self) -> list[int]:
        """Operations of the language model alone for texts of 1, 2 and 3 tokens."""
        counts = []
        with torch.device("meta"), torch.no_grad():
            model: Any = build_random_language(self.lm_config)
            for length in (1, 2, 3):
                embeds = torch.zeros(1, length, self.lm_config.hidden_size)
                positions = torch.arange(length)[None]
                counter: Any = FlopCounterMode(display=False)
                with counter:
                    hidden = model.model(
                        inputs_embeds=embeds,
                        position_ids=positions,
                        attention_mask=passed_through_mask(embeds.device),
                        lengths=[[length]],
                        use_cache=False,
                    )
                    model.lm_head(hidden.last_hidden_state[:, -1])
                counts.append(counter.get_total_flops())
        return counts

    def _connector_flops(self, connector: Connector) -> int:
        length = connector.tokens_per_image + QUESTION_TOKENS
        hidden = torch.zeros(1, length, self.lm_config.hidden_size, device="meta")
        sees = torch.zeros(1, length, dtype=torch.long)  # real: the text is sorted by what it sees
        counter: Any = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            visual = connector(self._empty_features(connector))
            for layer in connector.inject_layers:
                connector.inject(layer, hidden, visual, sees)
        return int(counter.get_total_flops())

    def _empty_features(self, connector: Connector) -> Tensor:
        """Return features of one picture `[1, patches, vision_width]`, on `meta`."""
        shapes = self.stage_shapes[-1]
        patches = shapes.patches + connector.class_token
        return torch.zeros(1, patches, shapes.vision_width, device="meta")


BUDGET_COUNTS: dict[str, Callable[[ConnectorFrame, Connector], int]] = {
    "params": ConnectorFrame.count_parameters,
    "visual_tokens": ConnectorFrame.count_visual_tokens,
    "flops": ConnectorFrame.count_flops,
}
"""What rows of a comparison can be matched by, and how it is counted."""
