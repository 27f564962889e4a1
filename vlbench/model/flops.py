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
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlbench.data.batch import Batch
from vlbench.model.vlm import VLM

PROBE = 64  # positions over which an injected layer is counted


@dataclass(frozen=True)
class StepFlops:
    """What one of each costs, forward and backward, for a model whose trained parts are chosen."""

    position: float
    """A position that the language model reads."""
    pair: float
    """A pair of positions of which one attends to the other."""
    supervised: float
    """A supervised position: the projection to the vocabulary."""
    image: float
    """A picture, tower and connector."""
    tower: float
    """The part of a picture that is not run where its features are known."""

    def of(self, batches: Iterable[Batch], causal: bool = True) -> float:
        """Return the operations of micro-batches; without `causal` as if all positions attended."""
        total = 0.0
        for batch in batches:
            lengths = [length for row in batch.lengths for length in row]
            pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
            image = self.image - (self.tower if batch.features is not None else 0)
            total += self.position * sum(lengths) + self.pair * pairs
            total += self.supervised * batch.tokens + image * len(batch.pixels)
        return total


def step_flops(vlm: VLM) -> StepFlops:
    """Count for the parts that require gradients now."""
    tower = _tower(vlm)
    sees_gradient = _any_trained(vlm.vision)
    connector = _connector(vlm, sees_gradient)
    flows = sees_gradient or _any_trained(vlm.connector)
    language = vlm.language.model
    flows = flows or language.embed_tokens.weight.requires_grad
    position = pair = 0.0
    heads = vlm.language.config.num_attention_heads * head_width(vlm.language.config)
    for number, layer in enumerate(language.layers):
        if number in vlm.connector.inject_at:
            position += _injected(vlm, number, flows)
        position += _products(layer, flows)
        flows = flows or _any_trained(layer)
        pair += 4 * heads * (3 if flows else 1)
    return StepFlops(
        position=position,
        pair=pair,
        supervised=_products(vlm.language.lm_head, flows),
        image=tower + connector,
        tower=tower,
    )


def head_width(config: Any) -> int:
    """Return the width of an attention head of a language model."""
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def _products(module: nn.Module, flows: bool) -> float:
    """Return the operations of a module's matrices for one position, forward and backward."""
    total = 0.0
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            total += 2 * parameter.numel() * (1 + flows + parameter.requires_grad)
    return total


def _tower(vlm: VLM) -> float:
    """Return the operations of the tower for one picture, up to the block whose output is used."""
    tower, trained = vlm.vision, _any_trained(vlm.vision)
    length = vlm.shapes.patches + 1
    total = 0.0
    for block in tower.blocks()[: tower.index + 1]:
        total += length * _products(block, trained)
        total += 4 * length**2 * tower.width * (3 if trained else 1)
    visual = getattr(tower.visual, "trunk", tower.visual)
    patches = visual.patch_embed.proj if hasattr(visual, "patch_embed") else visual.conv1
    return total + vlm.shapes.patches * 2 * patches.weight.numel() * (1 + trained)


def _connector(vlm: VLM, flows: bool) -> float:
    """Return the operations of the connector for one picture: counted by running it on zeros."""
    shapes = vlm.shapes
    parameter = next(vlm.connector.parameters(), None)
    kind = torch.float32 if parameter is None else parameter.dtype
    length = shapes.patches + vlm.connector.class_token
    features = torch.zeros(1, length, shapes.vision_width, dtype=kind, device=vlm.device)
    return _counted(vlm.connector, lambda: vlm.connector(features)) * _times(vlm, flows)


def _injected(vlm: VLM, layer: int, flows: bool) -> float:
    """Return the operations for one position of what the connector does before a decoder layer."""
    shapes, device = vlm.shapes, vlm.device
    parameter = next(vlm.connector.parameters())
    length = shapes.patches + vlm.connector.class_token
    features = torch.zeros(1, length, shapes.vision_width, dtype=parameter.dtype, device=device)
    hidden = torch.zeros(1, PROBE, shapes.lm_width, dtype=parameter.dtype, device=device)
    # real numbers: the text is sorted by what it sees
    sees = torch.zeros(1, PROBE, dtype=torch.long, device=real(device))
    with torch.no_grad():
        visual: Tensor = vlm.connector(features)
    inject = functools.partial(vlm.connector.inject, layer, hidden, visual, sees)
    return _counted(vlm.connector, inject) * _times(vlm, flows) / PROBE


def real(device: torch.device) -> torch.device:
    """Return the device for tensors whose values are needed where others have none."""
    return torch.device("cpu") if device.type == "meta" else device


def _times(vlm: VLM, flows: bool) -> int:
    """Return how often the connector's products are done: forward, for inputs, for weights."""
    return 1 + flows + _any_trained(vlm.connector)


def counter() -> Any:
    """Return torch's counter; it does not know the attention of a CPU by itself."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def _attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *a: Any, **o: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)  # what is computed again is not counted


def _counted(connector: nn.Module, run: Any) -> float:
    counting = counter()
    with untrained(connector), torch.no_grad(), counting:
        run()
    return float(counting.get_total_flops())


@contextlib.contextmanager
def untrained(module: nn.Module) -> Iterator[None]:
    """Let nothing be trained for a moment: torch's counter stumbles over views of what is."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    yield
    for parameter in trained:
        parameter.requires_grad_(True)


def _any_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
