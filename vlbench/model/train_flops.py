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

from vlbench.compat.torch_internals import make_flop_counter
from vlbench.data.packing import PackedBatch
from vlbench.model.vlm import VLM

PROBE_POSITIONS = 64  # positions over which an injected layer is counted


@dataclass(frozen=True)
class StepFlops:
    """What one of each costs, forward and backward, for a model whose trained parts are chosen."""

    per_position: float
    """A position that the language model reads."""
    per_attended_pair: float
    """A pair of positions of which one attends to the other."""
    per_supervised_position: float
    """A supervised position: the projection to the vocabulary."""
    per_image: float
    """A picture, tower and connector."""
    per_image_encoding: float
    """The part of a picture that is not run where its features are known."""

    def count_flops(self, batches: Iterable[PackedBatch], causal: bool = True) -> float:
        """Return the operations of micro-batches; without `causal` as if all positions attended."""
        total = 0.0
        for batch in batches:
            lengths = [length for row in batch.sample_lengths for length in row]
            pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
            image = self.per_image - (self.per_image_encoding if batch.features is not None else 0)
            total += self.per_position * sum(lengths) + self.per_attended_pair * pairs
            total += self.per_supervised_position * batch.supervised_token_count + image * len(
                batch.pixels
            )
        return total


def count_step_flops(vlm: VLM) -> StepFlops:
    """Count for the parts that require gradients now."""
    tower = _vision_encoder_flops(vlm)
    sees_gradient = _has_trained_parameters(vlm.vision)
    connector = _connector_flops(vlm, sees_gradient)
    flows = sees_gradient or _has_trained_parameters(vlm.connector)
    language = vlm.language.model
    flows = flows or language.embed_tokens.weight.requires_grad
    position = pair = 0.0
    heads = vlm.language.config.num_attention_heads * head_width(vlm.language.config)
    for number, layer in enumerate(language.layers):
        if number in vlm.connector.inject_layers:
            position += _injection_flops(vlm, number, flows)
        position += _matmul_flops(layer, flows)
        flows = flows or _has_trained_parameters(layer)
        pair += 4 * heads * (3 if flows else 1)
    return StepFlops(
        per_position=position,
        per_attended_pair=pair,
        per_supervised_position=_matmul_flops(vlm.language.lm_head, flows),
        per_image=tower + connector,
        per_image_encoding=tower,
    )


def head_width(config: Any) -> int:
    """Return the width of an attention head of a language model."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def _matmul_flops(module: nn.Module, input_needs_grad: bool) -> float:
    """Return the operations of a module's matrices for one position, forward and backward."""
    total = 0.0
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            total += 2 * parameter.numel() * (1 + input_needs_grad + parameter.requires_grad)
    return total


def _vision_encoder_flops(vlm: VLM) -> float:
    """Return the operations of the tower for one picture, up to the block whose output is used."""
    tower, trained = vlm.vision, _has_trained_parameters(vlm.vision)
    length = vlm.shapes.patches + 1
    total = 0.0
    for block in tower.blocks()[: tower.block_index + 1]:
        total += length * _matmul_flops(block, trained)
        total += 4 * length**2 * tower.feature_width * (3 if trained else 1)
    visual = getattr(tower.visual, "trunk", tower.visual)
    patches = visual.patch_embed.proj if hasattr(visual, "patch_embed") else visual.conv1
    return total + vlm.shapes.patches * 2 * patches.weight.numel() * (1 + trained)


def _connector_flops(vlm: VLM, input_needs_grad: bool) -> float:
    """Return the operations of the connector for one picture: counted by running it on zeros."""
    shapes = vlm.shapes
    parameter = next(vlm.connector.parameters(), None)
    kind = torch.float32 if parameter is None else parameter.dtype
    length = shapes.patches + vlm.connector.class_token
    features = torch.zeros(1, length, shapes.vision_width, dtype=kind, device=vlm.device)
    return _count_run_flops(vlm.connector, lambda: vlm.connector(features)) * _count_matmul_passes(
        vlm, input_needs_grad
    )


def _injection_flops(vlm: VLM, layer: int, input_needs_grad: bool) -> float:
    """Return the operations for one position of what the connector does before a decoder layer."""
    shapes, device = vlm.shapes, vlm.device
    parameter = next(vlm.connector.parameters())
    length = shapes.patches + vlm.connector.class_token
    features = torch.zeros(1, length, shapes.vision_width, dtype=parameter.dtype, device=device)
    hidden = torch.zeros(1, PROBE_POSITIONS, shapes.lm_width, dtype=parameter.dtype, device=device)
    # real numbers: the text is sorted by what it sees
    sees = torch.zeros(1, PROBE_POSITIONS, dtype=torch.long, device=real_device(device))
    with torch.no_grad():
        visual: Tensor = vlm.connector(features)
    inject = functools.partial(vlm.connector.inject, layer, hidden, visual, sees)
    return (
        _count_run_flops(vlm.connector, inject)
        * _count_matmul_passes(vlm, input_needs_grad)
        / PROBE_POSITIONS
    )


def real_device(device: torch.device) -> torch.device:
    """Return the device for tensors whose values are needed where others have none."""
    return torch.device("cpu") if device.type == "meta" else device


def _count_matmul_passes(vlm: VLM, input_needs_grad: bool) -> int:
    """Return how often the connector's products are done: forward, for inputs, for weights."""
    return 1 + input_needs_grad + _has_trained_parameters(vlm.connector)


def _count_run_flops(connector: nn.Module, run: Any) -> float:
    counting = make_flop_counter()
    with temporarily_frozen(connector), torch.no_grad(), counting:
        run()
    return float(counting.get_total_flops())


@contextlib.contextmanager
def temporarily_frozen(module: nn.Module) -> Iterator[None]:
    """Let nothing be trained for a moment: torch's counter stumbles over views of what is."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def _has_trained_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
