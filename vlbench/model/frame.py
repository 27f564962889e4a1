"""One figure of a connector's cost, counted without the rest of the model: fit for hundreds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlbench.connector import Connector
from vlbench.model.attention import no_mask
from vlbench.model.cost import TEXT
from vlbench.model.language import config_in, config_of, random_language
from vlbench.model.vision import build_tower
from vlbench.model.vlm import shapes_of
from vlbench.schema import Recipe


class Frame:
    """Tower and language model of a recipe, without weights: connectors are built between them.

    A folder in `language.weights` brings its own architecture; a hub id has that of
    `language.name`, so that nothing has to be fetched.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Note the shapes at the image size of every stage."""
        vision, language = recipe.vision, recipe.language
        folder = Path(language.weights).expanduser()
        self.config = config_in(folder) if folder.is_dir() else config_of(language.name)
        self.max_length = language.max_length
        with torch.device("meta"):
            tower = build_tower(vision.name, "random", vision.layer, vision.norm)
        self.shapes = []
        for stage in recipe.stages.values():
            tower.resize(stage.image_size)
            self.shapes.append(shapes_of(tower, self.config))

    def build(self, connector: type[Connector], options: dict[str, Any]) -> Connector:
        """Return `connector` on `meta` at the last stage's image size; a ValueError if unfit."""
        with torch.device("meta"):
            built = connector(self.shapes[-1], **options)
        if built.tokens_per_image >= self.max_length:
            raise ValueError(
                f"a picture takes {built.tokens_per_image} tokens of the text, and "
                f"language.max_length={self.max_length} leaves no room for them"
            )
        return built.requires_grad_(False)  # torch's counter stumbles over views of what is trained

    def suits(self, connector: type[Connector], options: dict[str, Any]) -> bool:
        """Tell whether `connector` can be built at the image size of every stage."""
        try:
            with torch.device("meta"):
                for shapes in dict.fromkeys(self.shapes):
                    connector(shapes, **options)
        except ValueError:
            return False
        return True

    def params(self, connector: Connector) -> int:
        """Count the connector's parameters."""
        return sum(parameter.numel() for parameter in connector.parameters())

    def visual_tokens(self, connector: Connector) -> int:
        """Count what the language model can attend to of a picture.

        That is the places, where visual tokens fill them, and the latents that decoder layers
        attend to: 64 for Flamingo's 64 latents and its empty place; tokens that stand in the text
        and are looked at again, as in `mixed`, count twice.
        """
        places = connector.tokens_per_image if connector.fills_sequence else 0
        if not connector.inject_at:
            return places
        with torch.no_grad():
            return places + connector(self._features(connector)).shape[1]

    def flops(self, connector: Connector) -> int:
        """Count the operations of connector and language model, as `cost` does."""
        own, (one, two, three) = self._own_flops(connector), self._language
        # a polynomial of degree 2 in the length, from its values at 1, 2 and 3: exact, in integers
        more, steps = connector.tokens_per_image + TEXT - 1, two - one
        return own + one + more * steps + more * (more - 1) // 2 * (three - two - steps)

    @cached_property
    def _language(self) -> list[int]:
        """Operations of the language model alone for texts of 1, 2 and 3 tokens."""
        counts = []
        with torch.device("meta"), torch.no_grad():
            model: Any = random_language(self.config)
            for length in (1, 2, 3):
                embeds = torch.zeros(1, length, self.config.hidden_size)
                positions = torch.arange(length)[None]
                counter: Any = FlopCounterMode(display=False)
                with counter:
                    hidden = model.model(
                        inputs_embeds=embeds,
                        position_ids=positions,
                        attention_mask=no_mask(embeds.device),
                        lengths=[[length]],
                        use_cache=False,
                    )
                    model.lm_head(hidden.last_hidden_state[:, -1])
                counts.append(counter.get_total_flops())
        return counts

    def _own_flops(self, connector: Connector) -> int:
        length = connector.tokens_per_image + TEXT
        hidden = torch.zeros(1, length, self.config.hidden_size, device="meta")
        sees = torch.zeros(1, length, dtype=torch.long)  # real: the text is sorted by what it sees
        counter: Any = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            visual = connector(self._features(connector))
            for layer in connector.inject_at:
                connector.inject(layer, hidden, visual, sees)
        return int(counter.get_total_flops())

    def _features(self, connector: Connector) -> Tensor:
        """Return features of one picture `[1, patches, vision_width]`, on `meta`."""
        shapes = self.shapes[-1]
        patches = shapes.patches + connector.class_token
        return torch.zeros(1, patches, shapes.vision_width, device="meta")


COUNTS: dict[str, Callable[[Frame, Connector], int]] = {
    "params": Frame.params,
    "visual_tokens": Frame.visual_tokens,
    "flops": Frame.flops,
}
"""What rows of a comparison can be matched by, and how it is counted."""
