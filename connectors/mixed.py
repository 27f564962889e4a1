"""Another connector's visual tokens in the sequence, and cross-attention to them as well.

`tokens` names a connector whose output replaces image tokens; before every `every`-th decoder layer
a gated block as in Flamingo (Alayrac et al. 2022, arXiv:2204.14198) lets the text attend to its
output. The gates are zero at first, so that training starts from the other connector alone. NVLM-H
(Dai et al. 2024, arXiv:2409.11402) is of this kind.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlbench.connector import registry
from vlbench.connector.base import Connector, ImagePlaces, Shapes
from vlbench.connector.levels import Levels
from vlbench.connector.question import Question
from vlbench.errors import suggest_name
from vlbench.strict_values import RawText


class MixedConnector(Connector):
    """The connector `tokens`, and gated cross-attention to its visual tokens."""

    size_options = {
        "every": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
        "heads": (1, 2, 4, 8, 16, 32, 64),
        "ff_mult": range(1, 9),
    }

    def __init__(
        self,
        shapes: Shapes,
        tokens: str = "llava_mlp",
        options: tuple[str, ...] = (),
        every: int = 4,
        heads: int = 8,
        head_width: int = 64,
        ff_mult: int = 4,
    ) -> None:
        """Build both connectors.

        Args:
            shapes: Sizes of vision encoder and language model.
            tokens: Name of the other connector.
            options: Its options, as in options=[depth=2,norm=false].
            every: A gated block is before every `every`-th decoder layer.
            heads: Attention heads of the gated blocks.
            head_width: Width of a head.
            ff_mult: Width of the feed-forward layer, as a multiple of the language model's.
        """
        super().__init__()
        self.inner = _load_token_connector(tokens)(shapes, **_parse_options(tokens, options))
        if self.inner.inject_layers or not self.inner.replaces_image_tokens:
            what = "feeds decoder layers" if self.inner.inject_layers else "fills no image position"
            raise ValueError(
                f"connector mixed: tokens is '{tokens}', which {what} itself; wanted is one whose "
                "tokens stand in the text alone, as llava_mlp, qformer or avgpool"
            )
        for name, value, most in (
            ("every", every, shapes.lm_layers),
            ("heads", heads, 1024),
            ("head_width", head_width, 1024),
            ("ff_mult", ff_mult, 64),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"connector mixed: {name} is {value}; allowed are 1 to {most}")
        self.tokens_per_image = self.inner.tokens_per_image
        self.token_grid = self.inner.token_grid
        self.class_token = self.inner.class_token
        self.vision_layers = self.inner.vision_layers
        self.question_length = self.inner.question_length
        self.inject_layers = tuple(i for i in range(shapes.lm_layers) if (i + 1) % every == 0)
        block = registry.connector_module("flamingo").GatedBlock
        width = shapes.lm_width
        self.blocks = nn.ModuleDict(
            {str(i): block(width, width, heads, head_width, ff_mult) for i in self.inject_layers}
        )

    def forward(self, features: Levels, *question: Question) -> Tensor:
        """Return the tokens `[images, tokens, lm_width]` of the other connector."""
        return self.inner(features, *question)

    def inject(self, layer: int, hidden: Tensor, visual: Tensor, where: ImagePlaces) -> Tensor:
        """Add gated cross-attention to the nearest image before decoder layer `layer`."""
        return self.blocks[str(layer)](hidden, visual, where.image_index, where.view_bounds)

    def metrics(self) -> dict[str, float]:
        """Return the other connector's metrics, and tanh of every gate."""
        return self.inner.metrics() | registry.connector_module("flamingo").gate_openings(
            self.blocks
        )

    def patch_attention(self, features: Levels, *question: Question) -> Tensor | None:
        """Return the attention weights of the other connector."""
        return self.inner.patch_attention(features, *question)

    def losses(self, features: Levels, visual: Any, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the other connector's own losses."""
        return self.inner.losses(features, visual, batch)

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        """Return the counts of the other connector's losses."""
        return self.inner.loss_counts(batch, objective)

    def objectives(self) -> tuple[str, ...]:
        """Name the objectives of the other connector."""
        return self.inner.objectives()

    def prepare_objective(self, objective: str, fresh: bool = False) -> None:
        """Prepare the other connector for an objective."""
        self.inner.prepare_objective(objective, fresh)

    def objective(
        self, name: str, features: Levels, batch: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the losses of the other connector's objective."""
        return self.inner.objective(name, features, batch)

    def contrast_embeddings(self, name: str, features: Levels, batch: Any) -> dict[str, Tensor]:
        """Return the embeddings that the other connector's objective contrasts."""
        return self.inner.contrast_embeddings(name, features, batch)

    def adapt(self, old_state: Mapping[str, Tensor], old_shapes: Shapes) -> Mapping[str, Tensor]:
        """Adapt the other connector's part of the state dict."""
        prefix = "inner."
        inner = {k.removeprefix(prefix): v for k, v in old_state.items() if k.startswith(prefix)}
        rest = {k: v for k, v in old_state.items() if not k.startswith(prefix)}
        return rest | {prefix + k: v for k, v in self.inner.adapt(inner, old_shapes).items()}


def _load_token_connector(name: str) -> type[Connector]:
    known = [known for known in registry.connector_locations() if known != "mixed"]
    if name not in known:
        raise ValueError(
            f"connector mixed: tokens is '{name}'; known: "
            f"{', '.join(known)}.{suggest_name(name, known)}"
        )
    return registry.load_connector(name)


def _parse_options(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the options of connector `name` that KEY=VALUE words give."""
    given = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"connector mixed: options: '{word}' is not KEY=VALUE")
        given[key] = RawText(value)
    values, errors = registry.resolve_options(name, given)
    if errors:
        raise ValueError("; ".join(errors))
    return values
