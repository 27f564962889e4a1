"""The connector contract: what carries the features of a vision tower into a language model.

A connector is one file with one subclass of `Connector`. Two families share the contract: those
that return tokens of the sequence (LLaVA MLP, Q-Former, EVA), and those that feed decoder layers
(Flamingo); a connector may also do both. The core reaches a connector only through this class.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlbench.errors import UserError
from vlbench.state_dicts import load_strict


@dataclass(frozen=True)
class Shapes:
    """What a connector has to fit, known before it is built."""

    patches: int
    """Features that the tower gives per image at this resolution, class token not counted."""
    grid: tuple[int, int]
    """Rows and columns of patches; rows x columns = patches."""
    vision_width: int
    """Width of one feature of the tower."""
    lm_width: int
    """Width of the language model's embeddings and hidden states."""
    lm_layers: int
    """Number of decoder layers of the language model."""


class Connector(nn.Module):
    """Base class of every connector.

    A subclass takes `Shapes` first and then flat, typed keyword options: its signature is the
    schema of `connector:` in a recipe. The attributes below are set on the class or in `__init__`.
    """

    size_options: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Options that make the connector larger or smaller, each with the values worth trying.

    `compare match=...` picks from them what gives rows the same budget. Values that do not go
    together, or do not fit the shapes, are those for which `__init__` raises a ValueError.
    """
    tokens_per_image: int = 1
    """Places that one image takes in the text."""
    replaces_image_tokens: bool = True
    """True: the result of `forward` replaces the places. False: the learned `image_embedding`."""
    inject_layers: tuple[int, ...] = ()
    """Decoder layers whose input passes through `inject` first, counted from 0."""
    class_token: bool = False
    """True: `features[:, 0]` is the tower's class token and the patches follow."""
    image_embedding: nn.Parameter
    """`[lm_width]`, what a place reads when `replaces_image_tokens` is False; owned by it."""

    weights_source: str = "random"
    """What the weights of a new connector are, for people; `prepare_objective` may load some."""
    ignored_reference_keys: str = r"(?!)"
    """Names that a reference's weights may have beside the connector's, as a regular expression:
    tower, language model. They are counted and left out; any other name is refused."""

    def forward(self, features: Tensor) -> Tensor:
        """Turn features `[images, patches, vision_width]` into visual tokens.

        The result is `[images, tokens_per_image, lm_width]` when it fills the sequence, otherwise
        `[images, tokens, own width]`, to be used by `inject` alone.
        """
        raise NotImplementedError

    def inject(self, layer: int, hidden: Tensor, visual: Tensor, image_index: Tensor) -> Tensor:
        """Return the new input of decoder layer `layer`.

        `hidden` is `[rows, length, lm_width]`, `visual` what `forward` returned, and `image_index`
        `[rows, length]` int64 holds the index into `visual` of the nearest image before each
        position in the same sample, -1 for none. It must be free of side effects: it may run more
        than once per step.
        """
        raise NotImplementedError

    def check_output(self, visual: Tensor, image_count: int, width: int) -> None:
        """Raise a Mistake when `visual` is not `[images, tokens_per_image, width]`, as promised."""
        promised = (image_count, self.tokens_per_image, width)
        if visual.shape != promised:
            raise UserError(
                f"connector {type(self).__name__}: forward gave {list(visual.shape)} for "
                f"{image_count} "
                f"pictures; promised is {list(promised)}: pictures, tokens_per_image, lm_width"
            )

    def losses(
        self, features: Tensor, visual: Tensor, batch: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `{name: (sum, count)}`, losses to add to the language loss; none by default."""
        return {}

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        """Return the counts that `losses` or `objective` gives for `batch`, where it alone tells.

        A loss is divided by the count of the global batch, like the language loss. For one that is
        not named here, every step first runs forward once more, to count.
        """
        return {}

    def objectives(self) -> tuple[str, ...]:
        """Name the stage objectives that this connector offers beside `language`.

        They learn from captions: each sample of the batch is a picture and `batch.captions`.
        """
        return ()

    def prepare_objective(self, objective: str, fresh: bool = False) -> None:
        """Build what only a stage of `objective` needs and let go of what it does not.

        Called before a stage begins and before the weights of a checkpoint of such a stage are
        loaded. `fresh`: no weights were or will be loaded, so pretrained ones may be taken.
        """

    def objective(
        self, name: str, features: Tensor, batch: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `{name: (sum, count)}` of the stage objective `name`, one of `objectives()`.

        It is called for one micro-batch after the other. How many samples there are in one depends
        on `max_tokens_per_row` and the number of processes, so an objective that compares samples
        with each other must not look for negatives in `features`: it takes them from
        `batch.contrast_pool`, and defines `contrast_embeddings`.
        """
        raise NotImplementedError

    def contrast_embeddings(self, name: str, features: Tensor, batch: Any) -> dict[str, Tensor]:
        """Return what the objective `name` compares pairs by, `{name: [pairs, ...]}`.

        A pair is a picture of `batch` and its caption; pictures that stand for none, in a batch
        without any, have no row. It is called without a graph for all micro-batches of a step,
        before `objective` is; of the global batch they are then in `embeddings` of
        `batch.contrast_pool`, and its `local_indices` tell which are those of the micro-batch (see
        `vlbench.data.packing.ContrastPool`). A connector that does not define it has no pool.
        """
        return {}

    def adapt(self, old_state: Mapping[str, Tensor], old_shapes: Shapes) -> Mapping[str, Tensor]:
        """Return the state of the same connector at other shapes as a state for this one.

        Called when a stage changes the image size; by default nothing depends on it.
        """
        return old_state

    def released_projector(self) -> nn.Sequential | None:
        """Return the layers of a connector that is nothing but LLaVA's or Yi-VL's `mm_projector`.

        That is Linear layers, all as wide as the language model, each followed by LayerNorm or none
        is, and exact GELU between them.
        Only such a connector fits into the released layouts; None, the default, says that this is
        another one.
        """
        return None

    def metrics(self) -> dict[str, float]:
        """Return numbers of the parameters that are worth watching while they learn, by name.

        They become columns of metrics.csv and values of the loggers; none by default.
        """
        return {}

    def patch_attention(self, features: Tensor) -> Tensor | None:
        """Return the share of each patch in what each visual token reads, None if none attends.

        `features` are those of `forward`, the result is `[images, visual tokens, patches]`, a mean
        over heads and layers of cross-attention, and each row sums to 1. `attention_shares` makes
        it of the layers that give queries and keys.
        """
        return None

    def load_reference(self, weights: Mapping[str, Tensor]) -> Collection[str]:
        """Load weights that use the reference implementation's own keys.

        Return the names of this connector's tensors that were loaded. What the caller finds neither
        there nor in the weights that were asked for is named to the user; see
        `ignored_reference_keys`.

        Raises:
            ValueError: when the weights do not fit, as `load_strict` does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reference weights to load")

    def load_strict(self, state: Mapping[str, Tensor]) -> set[str]:
        """Load a whole state of this connector and return its names.

        Raises:
            WeightMismatch: a ValueError that names the tensor which does not fit.
        """
        return load_strict(self, state)


def zero_like_loss(visual: Tensor) -> Tensor:
    """Return a zero that depends on every entry of `visual`: gradients reach its parameters.

    A batch without images adds it: every trained parameter then has a gradient, as DDP demands.
    """
    return torch.zeros((), dtype=visual.dtype, device=visual.device) * visual.float().sum()


def attention_shares(
    query_key_layers: Sequence[tuple[nn.Module, nn.Module]],
    heads: int,
    run_forward: Callable[[], object],
    patch_slice: slice = slice(None),
) -> Tensor:
    """Call `run_forward`; return the shares of keys in what queries read, by attention.

    The result is `[images, queries, patches]`. Each pair of `query_key_layers` gives an attention
    its queries and its keys, `[images, number, width]`; a layer that gives keys and values gives
    the keys first. `patch_slice` tells which of the keys are patches. The shares are means over
    pairs and heads, and each row sums to 1.
    """
    given: dict[nn.Module, Tensor] = {}
    here = threading.get_ident()

    def record_output(module: nn.Module, _: object, output: Tensor) -> None:
        if threading.get_ident() == here:  # other threads may use the same layers meanwhile
            given[module] = output.detach()

    hooks: list[RemovableHandle] = [
        layer.register_forward_hook(record_output) for pair in query_key_layers for layer in pair
    ]
    try:
        run_forward()
    finally:
        for hook in hooks:
            hook.remove()
    seen = torch.stack(
        [_mean_attention(given[one], given[other], heads) for one, other in query_key_layers]
    )
    seen = seen.mean(0)[..., patch_slice]
    return seen / seen.sum(-1, keepdim=True)


def _mean_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Return the mean over heads of scaled dot-product attention, `[images, queries, keys]`."""
    q, k = (
        one.reshape(*one.shape[:2], heads, -1).transpose(1, 2).float()
        for one in (queries, keys[..., : queries.shape[-1]])
    )
    shares: Tensor = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return shares.mean(1)
