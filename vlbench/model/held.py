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

from vlbench.model.vlm import VLM

HELD = torch.bfloat16


class Held:
    """The frozen weights of a model, held in bfloat16 until `release`."""

    def __init__(self, vlm: VLM, wanted: bool = True) -> None:
        """Hold what is frozen now in Linear layers of tower blocks and the language model.

        Nothing if it is not `wanted`. Connectors stay as they are, for they may do anything with
        their weights, and so do norms and embeddings, which autocast computes in float32.
        """
        self._units = [_Unit(block, places) for block, places in _found(vlm)] if wanted else []

    def release(self) -> None:
        """Make all weights float32 again."""
        for unit in self._units:
            unit.release()
        self._units = []


class _Unit:
    """A block and its held weights."""

    def __init__(self, block: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
        self.places = places
        self.kept: list[Tensor] = []
        for module, name in places:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.to(HELD)
        self.hooks = (
            block.register_forward_pre_hook(self.widen),
            block.register_forward_hook(self.narrow, always_call=True),
        )

    def widen(self, *_: Any) -> None:
        """Put float32 weights in the place of the held ones, unless autocast rounds them anyway.

        They replace the parameters, whose own data would change under a backward pass to come.
        """
        self.kept = [module._parameters[name] for module, name in self.places]  # type: ignore[misc]
        if torch.is_autocast_enabled(self.kept[0].device.type):
            self.kept = []
        for (module, name), held in zip(self.places, self.kept, strict=False):
            module._parameters[name] = held.float()  # type: ignore[assignment]

    def narrow(self, *_: Any) -> None:
        """Put the held weights back."""
        for (module, name), held in zip(self.places, self.kept, strict=False):
            module._parameters[name] = held  # type: ignore[assignment]
        self.kept = []

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for module, name in self.places:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()


def _found(vlm: VLM) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str]]]]:
    """Give blocks that have weights to hold: (module, name of the parameter in it)."""
    looked_up = {id(m.weight) for m in vlm.language.modules() if isinstance(m, nn.Embedding)}
    for block in (*vlm.language.model.layers, vlm.language.lm_head, *vlm.vision.blocks()):
        places: list[tuple[nn.Module, str]] = [
            (module, name)
            for path, module in block.named_modules()
            if type(module) is nn.Linear  # that of torch's own attention may take another way
            and ".lora_" not in path  # dropout may come before
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in looked_up and _exact(parameter)
        ]
        if places:
            yield block, places


def _exact(parameter: nn.Parameter) -> bool:
    """Tell whether a frozen float32 parameter is the same in bfloat16."""
    if parameter.requires_grad or parameter.dtype != torch.float32:
        return False
    return torch.equal(parameter.data.to(HELD).float(), parameter.data)
