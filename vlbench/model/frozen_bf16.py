"""Frozen weights held in 16 bits where that changes no number.

Under autocast every product rounds its weights to bfloat16 anew, so weights that rounding leaves as
they are (those of files in bfloat16, as Yi's and Yi-VL's) may stay rounded: in half the memory, and
without the work. Others stay float32. Where autocast is off, a block that holds weights makes them
float32 again while it runs; so evaluation and held-out losses are those of float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.compat.peft_internals import is_adapter_name
from vlbench.compat.torch_internals import parameter_slots
from vlbench.model.vlm import VLM

FROZEN_DTYPE = torch.bfloat16


class FrozenBF16:
    """The frozen weights of a model, held in bfloat16 until `release`."""

    def __init__(self, vlm: VLM, enabled: bool = True) -> None:
        """Hold what is frozen now in Linear layers of tower blocks and the language model.

        Nothing if it is not `wanted`. Connectors stay as they are, for they may do anything with
        their weights, and so do norms and embeddings, which autocast computes in float32.
        """
        self._blocks = (
            [_FrozenBF16Block(block, places) for block, places in _find_frozen_weights(vlm)]
            if enabled
            else []
        )

    def restore_float32(self) -> None:
        """Make all weights float32 again."""
        for unit in self._blocks:
            unit.restore_float32()
        self._blocks = []


class _FrozenBF16Block:
    """A block and its held weights."""

    def __init__(self, block: nn.Module, weight_owners: list[tuple[nn.Module, str]]) -> None:
        self.weight_owners = weight_owners
        self.bf16_weights: list[Tensor] = []
        for module, name in weight_owners:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.to(FROZEN_DTYPE)
        self.hooks = (
            block.register_forward_pre_hook(self.upcast_weights),
            block.register_forward_hook(self.put_back_weights, always_call=True),
        )

    def upcast_weights(self, *_: Any) -> None:
        """Put float32 weights in the place of the held ones, unless autocast rounds them anyway.

        They replace the parameters, whose own data would change under a backward pass to come.
        """
        self.bf16_weights = [parameter_slots(module)[name] for module, name in self.weight_owners]  # type: ignore[misc]
        if torch.is_autocast_enabled(self.bf16_weights[0].device.type):
            self.bf16_weights = []
        for (module, name), held in zip(self.weight_owners, self.bf16_weights, strict=False):
            parameter_slots(module)[name] = held.float()

    def put_back_weights(self, *_: Any) -> None:
        """Put the held weights back."""
        for (module, name), held in zip(self.weight_owners, self.bf16_weights, strict=False):
            parameter_slots(module)[name] = held
        self.bf16_weights = []

    def restore_float32(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, name in self.weight_owners:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()


def _find_frozen_weights(vlm: VLM) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str]]]]:
    """Give blocks that have weights to hold: (module, name of the parameter in it)."""
    looked_up = {id(m.weight) for m in vlm.language.modules() if isinstance(m, nn.Embedding)}
    for block in (*vlm.language.model.layers, vlm.language.lm_head, *vlm.vision.blocks()):
        places: list[tuple[nn.Module, str]] = [
            (module, name)
            for path, module in block.named_modules()
            if type(module) is nn.Linear  # that of torch's own attention may take another way
            and not is_adapter_name(path)  # dropout may come before
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in looked_up and _is_exact_in_bf16(parameter)
        ]
        if places:
            yield block, places


def _is_exact_in_bf16(parameter: nn.Parameter) -> bool:
    """Tell whether a frozen float32 parameter is the same in bfloat16."""
    if parameter.requires_grad or parameter.dtype != torch.float32:
        return False
    return torch.equal(parameter.data.to(FROZEN_DTYPE).float(), parameter.data)
