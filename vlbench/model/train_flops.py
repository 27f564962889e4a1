"""The floating-point operations that a training step needs: what its stage asks for and no more.

Counted are matrix products and attention: forward, gradients of inputs below which something is
trained, gradients of weights that are trained. Not counted: norms, activations, recomputation, and
a connector's losses of its own. This is the numerator of MFU (Chowdhery et al. 2022, PaLM,
arXiv:2204.02311, appendix B), with the causal half of attention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from vlbench.compat.torch_internals import make_flop_counter
from vlbench.compat.vision_internals import encoder_width, patch_projection
from vlbench.connector.base import ImagePlaces
from vlbench.connector.blank_inputs import blank_inputs
from vlbench.connector.levels import Levels, first_level
from vlbench.data.packing import PackedBatch
from vlbench.model.decoder_families import DecoderConfig
from vlbench.model.vision_encoder import VisionEncoder, has_trained_parameters
from vlbench.model.vlm import VLM

PROBE_POSITIONS = 64  # positions over which an injected layer is counted


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations per unit, forward and backward, with the parts that are trained."""

    per_position: float
    """A position of the language model."""
    per_attended_pair: float
    """A pair of positions of which one attends to the other."""
    per_supervised_position: float
    """A supervised position: the projection to the vocabulary."""
    per_view: float
    """A view of an image, of which an untiled one has one: vision encoder and connector."""
    per_view_encoding: float
    """The part of a view that is not run where its features are cached: the vision encoder."""

    def count_flops(self, batches: Iterable[PackedBatch], causal: bool = True) -> float:
        """Return the operations of micro-batches; without `causal`, of full attention."""
        total = 0.0
        for batch in batches:
            lengths = [length for row in batch.sample_lengths for length in row]
            pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
            view = self.per_view - (self.per_view_encoding if batch.features is not None else 0)
            total += self.per_position * sum(lengths) + self.per_attended_pair * pairs
            total += self.per_supervised_position * batch.supervised_token_count
            total += view * batch.view_count
        return total


def count_step_flops(vlm: VLM, views_per_image: int = 1) -> StepFlops:
    """Count for the parts that require gradients now.

    A position costs a connector that injects the more, the more views an image has. The MFU of a
    training takes one, so that with tiles it is too low for these connectors.
    """
    encoder_flops = _vision_encoder_flops(vlm)
    is_vision_trained = vlm.is_vision_trained()
    connector_flops = _connector_flops(vlm, is_vision_trained)
    needs_grad = is_vision_trained or has_trained_parameters(vlm.connector)
    language = vlm.language.model
    needs_grad = needs_grad or language.embed_tokens.weight.requires_grad
    position_flops = pair_flops = 0.0
    width = vlm.language.config.num_attention_heads * head_width(vlm.language.config)
    for number, layer in enumerate(language.layers):
        if number in vlm.connector.inject_layers:
            position_flops += _injection_flops(vlm, number, needs_grad, views_per_image)
        position_flops += _matmul_flops(layer, needs_grad)
        needs_grad = needs_grad or has_trained_parameters(layer)
        pair_flops += 4 * width * (3 if needs_grad else 1)
    return StepFlops(
        per_position=position_flops,
        per_attended_pair=pair_flops,
        per_supervised_position=_matmul_flops(vlm.language.lm_head, needs_grad),
        per_view=encoder_flops + connector_flops,
        per_view_encoding=encoder_flops,
    )


def count_forward_flops(vlm: VLM) -> StepFlops:
    """Count for a model of which nothing is trained: forward alone, as it answers."""
    with temporarily_frozen(vlm):
        return count_step_flops(vlm)


def head_width(config: DecoderConfig) -> int:
    """Return the width of an attention head of a language model."""
    width: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return width


def _matmul_flops(module: nn.Module, input_needs_grad: bool) -> float:
    """Return the operations of a module's matrices for one position, forward and backward."""
    total = 0.0
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            total += 2 * parameter.numel() * (1 + input_needs_grad + parameter.requires_grad)
    return total


def _vision_encoder_flops(vlm: VLM) -> float:
    """Return the operations of all vision encoders for one image, up to the blocks in use."""
    return sum(_encoder_flops(encoder) for encoder in vlm.vision.encoders())


def _encoder_flops(encoder: VisionEncoder) -> float:
    trained, width = has_trained_parameters(encoder), encoder_width(encoder.visual)
    patches = encoder.grid[0] * encoder.grid[1]
    length = patches + 1
    total = 0.0
    for block in encoder.blocks()[: encoder.used_block_count]:
        total += length * _matmul_flops(block, trained)
        total += 4 * length**2 * width * (3 if trained else 1)
    kernel_size = patch_projection(encoder.visual).numel()
    return total + patches * 2 * kernel_size * (1 + trained)


def _connector_flops(vlm: VLM, input_needs_grad: bool) -> float:
    """Return the operations of the connector for one image, counted by running it on zeros."""
    inputs = _blank_inputs(vlm)
    return _count_run_flops(vlm.connector, lambda: vlm.connector(*inputs)) * _count_matmul_passes(
        vlm, input_needs_grad
    )


def _injection_flops(vlm: VLM, layer: int, input_needs_grad: bool, views: int) -> float:
    """Return the operations for one position of what the connector does before a decoder layer."""
    shapes, device = vlm.shapes, vlm.device
    inputs = _blank_inputs(vlm, views)
    dtype = first_level(inputs[0]).dtype
    hidden = torch.zeros(1, PROBE_POSITIONS, shapes.lm_width, dtype=dtype, device=device)
    with torch.no_grad():
        visual: Levels = vlm.connector(*inputs)
    where = text_places(PROBE_POSITIONS, device, views)
    inject = functools.partial(vlm.connector.inject, layer, hidden, visual, where)
    return (
        _count_run_flops(vlm.connector, inject)
        * _count_matmul_passes(vlm, input_needs_grad)
        / PROBE_POSITIONS
    )


class RealIndices(TorchDispatchMode):
    """Lets tensors whose values are needed meet tensors on `meta`: they join them there.

    So an `inject` may multiply by a mask of its places, as it does where everything is on a device.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.is_meta for tensor in tensors}) == 2:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the operations inside of `with`, on `meta` as well."""
    counter = make_flop_counter()
    with RealIndices(), counter:  # type: ignore[no-untyped-call]
        yield counter


def _blank_inputs(vlm: VLM, views: int = 1) -> tuple[Any, ...]:
    parameter = next(vlm.connector.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return blank_inputs(vlm.connector, vlm.shapes, dtype, vlm.device, views)


def text_places(length: int, device: torch.device, views: int = 1) -> ImagePlaces:
    """Return the places of text after one image of so many views, to count what injection costs.

    Their values are needed while other tensors are on `meta`: connectors sort the text by the image
    that it belongs to.
    """
    device = torch.device("cpu") if device.type == "meta" else device
    image_index = torch.zeros(1, length, dtype=torch.long, device=device)
    none = image_index - 1
    if views == 1:
        return ImagePlaces(image_index, none)
    return ImagePlaces(image_index, none, none, torch.tensor([0, views], device=device))


def _count_matmul_passes(vlm: VLM, input_needs_grad: bool) -> int:
    """Return how often the connector's products are computed: forward, for inputs, for weights."""
    return 1 + input_needs_grad + has_trained_parameters(vlm.connector)


def _count_run_flops(connector: nn.Module, run: Any) -> float:
    with temporarily_frozen(connector), torch.no_grad(), counted_flops() as counting:
        run()
    return float(counting.get_total_flops())


@contextlib.contextmanager
def temporarily_frozen(module: nn.Module) -> Iterator[None]:
    """Freeze a module inside of `with`: FlopCounterMode fails on views of trained parameters."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)
