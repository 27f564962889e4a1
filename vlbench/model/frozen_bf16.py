"""Frozen weights held in bfloat16 where that changes no number.

Under autocast every product rounds its weights to bfloat16 anew. Weights that rounding leaves
unchanged (of files in bfloat16, as Yi's and Yi-VL's) can stay in bfloat16: half the memory, and no
rounding. Others stay float32. Where autocast is off, a block with such weights upcasts them to
float32 while it runs, so evaluation and held-out losses are those of float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.compat.peft_internals import is_adapter_name
from vlbench.compat.torch_internals import parameter_slots
from vlbench.model.activation_checkpointing import WEIGHT_CAST
from vlbench.model.vlm import VLM

FROZEN_DTYPE = torch.bfloat16


class FrozenBF16:
    """The frozen weights of a model, held in bfloat16 until `restore_float32`."""

    def __init__(
        self,
        vlm: VLM,
        enabled: bool = True,
        is_exact: Callable[[nn.Parameter], bool] | None = None,
    ) -> None:
        """Cast the frozen weights of Linear layers in encoder blocks and the language model.

        Nothing unless `enabled`. Connectors are left alone, since they may do anything with their
        weights, and so are norms and embeddings, which autocast computes in float32. `is_exact`
        tells of a frozen weight without values whether bfloat16 holds it.
        """
        found = _find_frozen_weights(vlm, is_exact or _equals_in_bf16) if enabled else ()
        self._blocks = [_FrozenBF16Block(block, owners) for block, owners in found]

    def restore_float32(self) -> None:
        """Cast all weights back to float32."""
        for block in self._blocks:
            block.restore_float32()
        self._blocks = []


class _FrozenBF16Block:
    """A block and its weights in bfloat16."""

    def __init__(self, block: nn.Module, weight_owners: list[tuple[nn.Module, str]]) -> None:
        self.weight_owners = weight_owners
        self.bf16_weights: list[Tensor] = []
        for module, name in weight_owners:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.to(FROZEN_DTYPE)
        self.block = block
        setattr(block, WEIGHT_CAST, self.cast_weights)
        self.hooks = (
            block.register_forward_pre_hook(self.upcast_weights),
            block.register_forward_hook(self.put_back_weights, always_call=True),
        )

    def upcast_weights(self, *_: Any) -> None:
        """Forward pre-hook: replace the weights by float32 copies, unless autocast is on.

        The parameters themselves are replaced: changing their data would break a later backward.
        """
        self.bf16_weights = [parameter_slots(module)[name] for module, name in self.weight_owners]  # type: ignore[misc]
        if torch.is_autocast_enabled(self.bf16_weights[0].device.type):
            self.bf16_weights = []
        for (module, name), held in zip(self.weight_owners, self.bf16_weights, strict=False):
            parameter_slots(module)[name] = held.float()

    def put_back_weights(self, *_: Any) -> None:
        """Forward hook: put the bfloat16 weights back."""
        for (module, name), held in zip(self.weight_owners, self.bf16_weights, strict=False):
            parameter_slots(module)[name] = held
        self.bf16_weights = []

    @contextlib.contextmanager
    def cast_weights(self) -> Iterator[None]:
        """Have float32 weights in `with`, as the hooks do, which a recomputation does not call."""
        if self.bf16_weights:
            yield
            return
        self.upcast_weights()
        try:
            yield
        finally:
            self.put_back_weights()

    def restore_float32(self) -> None:
        delattr(self.block, WEIGHT_CAST)
        for hook in self.hooks:
            hook.remove()
        for module, name in self.weight_owners:
            parameter = module.get_parameter(name)
            parameter.data = _to_float32(parameter.data)


def _to_float32(tensor: Tensor) -> Tensor:
    """Return a tensor as float32: on its device, or on the host where it does not fit beside it.

    A large frozen model fits on its GPU in 16 bits alone; the next stage casts it back, if it stays
    frozen, before it is moved there again.
    """
    try:
        return tensor.float()
    except torch.OutOfMemoryError:
        return tensor.cpu().float()


def _find_frozen_weights(
    vlm: VLM, is_exact: Callable[[nn.Parameter], bool]
) -> Iterator[tuple[nn.Module, list[tuple[nn.Module, str]]]]:
    """Yield blocks with their weights to hold: (module, name of its parameter)."""
    embedding_ids = {id(m.weight) for m in vlm.language.modules() if isinstance(m, nn.Embedding)}
    for block in (*vlm.language.model.layers, vlm.language.lm_head, *vlm.encoder_blocks()):
        owners: list[tuple[nn.Module, str]] = [
            (module, name)
            for path, module in block.named_modules()
            if type(module) is nn.Linear  # nn.MultiheadAttention bypasses its projection's forward
            and not is_adapter_name(path)  # dropout may come first
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in embedding_ids
            and not parameter.requires_grad
            and parameter.dtype == torch.float32
            and is_exact(parameter)
        ]
        if owners:
            yield block, owners


def _equals_in_bf16(parameter: nn.Parameter) -> bool:
    """Tell whether bfloat16 holds every value of a float32 parameter."""
    return torch.equal(parameter.data.to(FROZEN_DTYPE).float(), parameter.data)
