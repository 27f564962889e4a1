"""The connector contract: how image features get from a vision encoder into a language model.

A connector is one file with one subclass of `Connector`. Two families share the contract: those
whose output replaces tokens of the sequence (LLaVA MLP, Q-Former, EVA), and those that change the
input of decoder layers (Flamingo); a connector may also do both (DeepStack). The core uses a
connector through this class alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlbench.connector.levels import Levels, as_levels, first_level
from vlbench.errors import UserError
from vlbench.state_dicts import load_strict


@dataclass(frozen=True)
class Shapes:
    """Sizes of the vision encoder and the language model, which the connector is built for."""

    patches: int
    """Patch features per image at this image size, without the class token."""
    grid: tuple[int, int]
    """Rows and columns of patches; rows x columns = patches."""
    vision_width: int
    """Width of a feature of the vision encoder."""
    lm_width: int
    """Width of the language model's embeddings and hidden states."""
    lm_layers: int
    """Number of decoder layers of the language model."""
    vision_blocks: int = 1
    """Number of blocks of the vision encoder."""
    vision_layer: int = 0
    """The block, counted from 0, that the recipe's `vision.layer` names."""
    has_class_token: bool = True
    """Whether the vision encoder has a class token, which a connector may then ask for."""


@dataclass(frozen=True)
class ImagePlaces:
    """Which image each of some positions belongs to, and which visual token it holds.

    With tiling an image has several views, and what `forward` gives has an entry for each view.
    """

    image_index: Tensor
    """`[rows, length]` int64, the index among the images of the batch of the nearest image before a
    position in the same sample, or of its own image at an image position; -1 for none."""
    token_index: Tensor
    """`[rows, length]` int64, at an image position its number among those of its view, from 0 to
    `tokens_per_image` - 1; -1 at text, newlines and padding."""
    view_index: Tensor | None = None
    """`[rows, length]` int64, at an image position its view, a row of what `forward` returned; -1
    as in `token_index`. None: images are not tiled, and it is `image_index`."""
    view_bounds: Tensor | None = None
    """`[images + 1]` int64: the views of image i are `view_bounds[i]` to `view_bounds[i + 1] - 1`.
    None: each image has one. Text looks at all views of its image (`attend_to_images`)."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any]) -> ImagePlaces:
        """Return the places of which `tensors` has the tensors, among others."""
        optional = (tensors.get(name) for name in ("view_index", "view_bounds"))
        return cls(tensors["image_index"], tensors["token_index"], *optional)

    def select(self, rows: slice, columns: slice) -> ImagePlaces:
        """Return the places of some rows and columns."""
        views = None if self.view_index is None else self.view_index[rows, columns]
        return ImagePlaces(
            self.image_index[rows, columns],
            self.token_index[rows, columns],
            views,
            self.view_bounds,
        )

    def next_text(self) -> ImagePlaces:
        """Return the places `[rows, 1]` of the text that follows the last column."""
        last = self.image_index[:, -1:].clone()
        none = torch.full_like(last, -1)
        views = None if self.view_index is None else none
        return ImagePlaces(last, none, views, self.view_bounds)

    def own_tokens(self, level: Tensor) -> Tensor:
        """Return the token `[rows, length, width]` that each image position holds; elsewhere zero.

        `level` is what `forward` gave, or one level of it, `[views, tokens_per_image, width]`.
        """
        views = self.image_index if self.view_index is None else self.view_index
        tokens = level[views.clamp(min=0), self.token_index.clamp(min=0)]
        return tokens * (self.token_index >= 0)[..., None]


class Connector(nn.Module):
    """Base class of every connector.

    Features and visual tokens, `Any` below, are one tensor, or a tuple of levels (`levels.Levels`)
    where the connector says so: each knows which.

    A subclass takes `Shapes` first and then flat, typed keyword options: its signature is the
    schema of `connector:` in a recipe. The attributes below are set on the class or in `__init__`.
    """

    size_options: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Options that make the connector larger or smaller, each with the values to try.

    `compare match=...` searches them for connectors of equal budget. `__init__` raises a ValueError
    for values that contradict each other or do not fit the shapes.
    """
    tokens_per_image: int = 1
    """Image positions that one image takes in the token sequence; of a tiled image, one view."""
    token_grid: tuple[int, int] | None = None
    """Rows and columns in which the visual tokens lie over the image, row by row, so that those of
    tiles make rows of the whole image, without what is padded; None: they have no places in it."""
    latent_grid: tuple[int, int] | None = None
    """Rows and columns in which what only `inject` uses lies over the image, row by row, where each
    of it belongs to a place (keys and values of every patch); None: it has no places in it."""
    any_grid: bool = False
    """True: it makes each visual token of one patch alone, in the order of the patches, so that
    images may have rows and columns of their own (`vision.aspect=native`). What `forward` is given
    are then patches of some image, filled up to `shapes.patches` with numbers that are not used;
    `tokens_per_image` and `token_grid` are `shapes.patches` and `shapes.grid`."""
    replaces_image_tokens: bool = True
    """What replaces the embeddings at image positions: the visual tokens, or (False) the learned
    `image_embedding`."""
    inject_layers: tuple[int, ...] = ()
    """Decoder layers, counted from 0, whose input is first passed to `inject`."""
    vision_layers: tuple[int, ...] = ()
    """Blocks of the vision encoder that `forward` reads, counted from 0, or from -1, the last one.
    Its features are then a tuple with an entry for each, in this order; (): they are one tensor, of
    the block that the recipe's `vision.layer` names. The encoder runs once, to the last of them."""
    question_length: int = 0
    """Tokens of text of the human turn that shows an image, of which `forward` reads at most so
    many (its first); 0: none. Others are given `question` (`question.Question`) as the second
    argument of `forward` and `patch_attention`."""
    class_token: bool = False
    """True: `features[:, 0]` is the vision encoder's class token, and the patches follow; in each
    entry, where features are a tuple."""
    image_embedding: nn.Parameter
    """`[lm_width]`, the embedding of an image position when `replaces_image_tokens` is False; a
    parameter of the connector."""

    weights_source: str = "random"
    """Where the initial weights come from, for reports; `prepare_objective` may load some."""
    ignored_reference_keys: str = r"(?!)"
    """Regular expression for the names of other parts (vision encoder, language model) in reference
    weights. They are counted and skipped; any other name is refused."""

    # *question, **_: to a type checker, whatever a subclass takes behind the features
    def forward(self, features: Any, *question: Any, **_: Any) -> Levels:
        """Turn features `[images, patches, vision_width]` into visual tokens.

        The result is `[images, tokens_per_image, lm_width]` if `replaces_image_tokens`, otherwise
        `[images, tokens, own width]`, which only `inject` uses. It may be a tuple of levels for
        `inject`, each with an entry for each image; then the first one is written to the image
        positions. `features` are a tuple with an entry for each of `vision_layers`, if it has any.
        With a `question_length` it takes a second argument, `question`.
        """
        raise NotImplementedError

    def inject(self, layer: int, hidden: Tensor, visual: Any, where: ImagePlaces) -> Tensor:
        """Return the new input `[rows, length, lm_width]` of decoder layer `layer`.

        It must have no side effects: activation checkpointing runs it more than once per step.

        Args:
            layer: One of `inject_layers`.
            hidden: Input of the layer, `[rows, length, lm_width]`. With a KV cache, `length` is
                the number of new positions.
            visual: What `forward` returned.
            where: Image and visual token of each position. `image_index` serves text that looks at
                its image (Flamingo), `token_index` what happens at image positions (DeepStack).
        """
        raise NotImplementedError

    def check_output(self, visual: Levels, image_count: int, width: int) -> None:
        """Raise a UserError when what fills the image positions has another shape than promised."""
        promised = (image_count, self.tokens_per_image, width)
        given = first_level(visual).shape
        if given != promised:
            raise UserError(
                f"connector {type(self).__name__}: forward gave {list(given)} for "
                f"{image_count} images; promised is {list(promised)}: images, tokens_per_image, "
                "lm_width"
            )

    def count_latents(self, visual: Any) -> int:
        """Return how many visual tokens of an image decoder layers attend to by `inject`.

        They are part of a connector's cost. By default those of the first level, if it injects.
        """
        return first_level(visual).shape[1] if self.inject_layers else 0

    def losses(self, features: Any, visual: Any, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return losses to add to the language loss as `{name: (sum, count)}`; none by default.

        The core divides sums by counts, both over the global batch.
        """
        return {}

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        """Return the counts that `losses` or `objective` will give, where `batch` alone tells them.

        A loss is divided by its count over the global batch, like the language loss. If a loss is
        not named here, every step needs an extra forward pass to count.
        """
        return {}

    def objectives(self) -> tuple[str, ...]:
        """Name the training objectives that this connector offers beside `language`.

        They are for caption stages: a sample is an image and its caption in `batch.captions`.
        """
        return ()

    def prepare_objective(self, objective: str, fresh: bool = False) -> None:
        """Build modules that only a stage of `objective` needs; remove those that it does not.

        Called before a stage begins, and before weights from a checkpoint of such a stage are
        loaded. `fresh`: no weights are loaded otherwise, so pretrained ones may be used.
        """

    def objective(self, name: str, features: Any, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the losses of objective `name`, one of `objectives()`, as `{name: (sum, count)}`.

        Called for each micro-batch. The number of samples in one depends on `max_tokens_per_row`
        and the number of processes, so a contrastive objective must not take negatives from
        `features`: it takes them from `batch.contrast_pool`, and defines `contrast_embeddings`.
        """
        raise NotImplementedError

    def contrast_embeddings(self, name: str, features: Any, batch: Any) -> dict[str, Tensor]:
        """Return the embeddings that objective `name` contrasts, `{name: [pairs, ...]}`.

        A pair is an image of `batch` and its caption; the blank image of a batch without images
        has no row. Called without gradients for all micro-batches of a step, before `objective`.
        The embeddings of the global batch are then in `batch.contrast_pool.embeddings`, and its
        `local_indices` are those of this micro-batch (see `vlbench.data.packing.ContrastPool`).
        Without this method there is no pool.
        """
        return {}

    def adapt(self, old_state: Mapping[str, Tensor], old_shapes: Shapes) -> Mapping[str, Tensor]:
        """Convert the state dict of the same connector at `old_shapes` to the shapes of this one.

        Called when a stage changes the image size; unchanged by default.
        """
        return old_state

    def released_projector(self) -> nn.Sequential | None:
        """Return the layers if the connector is exactly LLaVA's or Yi-VL's `mm_projector`.

        That is: Linear layers as wide as the language model, exact GELU between them, and a
        LayerNorm after each Linear layer or after none. Only such a connector can be exported to
        the released layouts; None, the default, means any other connector.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Return numbers to log during training by name, such as gates; none by default.

        They become columns of metrics.csv and values of the loggers.
        """
        return {}

    def patch_attention(self, features: Any, *question: Any, **_: Any) -> Tensor | None:
        """Return how much each visual token attends to each patch; None without attention.

        The result is `[images, visual tokens, patches]`, the mean over heads and layers of
        cross-attention; each row sums to 1. `attention_shares` computes it from the layers that
        give queries and keys. `features` are those of `forward`, and `question`, if it takes one.
        """
        return None

    def load_reference(self, weights: Mapping[str, Tensor]) -> Collection[str]:
        """Load weights under the names of the reference implementation.

        Return the names of this connector's tensors that were loaded. Tensors that were not loaded,
        and weights that were not read, are reported to the user; see `ignored_reference_keys`.

        Raises:
            ValueError: the weights do not fit, as in `load_strict`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference weights to load")

    def load_strict(self, state: Mapping[str, Tensor]) -> set[str]:
        """Load a complete state dict of this connector and return its names.

        Raises:
            WeightMismatch: a ValueError that names the tensor which does not fit.
        """
        return load_strict(self, state)


def zero_like_loss(visual: Levels) -> Tensor:
    """Return a zero that depends on `visual`, so that its parameters get (zero) gradients.

    Added to the loss of a batch without images: DDP needs a gradient for every trained parameter.
    """
    first, *more = (
        torch.zeros((), dtype=level.dtype, device=level.device) * level.float().sum()
        for level in as_levels(visual)
    )
    return sum(more, start=first)


def attention_shares(
    query_key_layers: Sequence[tuple[nn.Module, nn.Module]],
    heads: int,
    run_forward: Callable[[], object],
    patch_slice: slice = slice(None),
) -> Tensor:
    """Run a forward pass and return its attention weights `[images, queries, patches]`.

    They are means over layers and heads; each row sums to 1.

    Args:
        query_key_layers: For each attention the layers that give queries and keys `[images,
            number, width]`; a layer that gives keys and values gives the keys first.
        heads: Number of heads.
        run_forward: Runs the forward pass, in which hooks record the layers' outputs.
        patch_slice: Which of the keys are patches.
    """
    outputs: dict[nn.Module, Tensor] = {}
    own_thread = threading.get_ident()

    def record_output(module: nn.Module, _: object, output: Tensor) -> None:
        if threading.get_ident() == own_thread:  # other threads may run the same layers
            outputs[module] = output.detach()

    hooks: list[RemovableHandle] = [
        layer.register_forward_hook(record_output) for pair in query_key_layers for layer in pair
    ]
    try:
        run_forward()
    finally:
        for hook in hooks:
            hook.remove()
    weights = torch.stack(
        [_mean_attention(outputs[query], outputs[key], heads) for query, key in query_key_layers]
    )
    weights = weights.mean(0)[..., patch_slice]
    return weights / weights.sum(-1, keepdim=True)


def _mean_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Return the mean over heads of scaled dot-product attention, `[images, queries, keys]`."""
    q, k = (
        tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2).float()
        for tensor in (queries, keys[..., : queries.shape[-1]])
    )
    weights: Tensor = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return weights.mean(1)
