"""The state of an optimizer by the names of parameters, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from vlbench.errors import UserError
from vlbench.model.vlm import VLM


def named_optimizer_state(vlm: VLM, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Give what an optimizer keeps, as `KEY.NAME OF PARAMETER`; tensors may be sharded."""
    for name, parameter in _named_trained_params(vlm, optimizer):
        for key, value in optimizer.state[parameter].items():
            yield f"{key}.{name}", value


def restore_optimizer_state(
    vlm: VLM, optimizer: Optimizer, saved_state: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that `moments` gave, sharded as its parameters are now."""
    by_name: dict[str, dict[str, str]] = {}
    for stored in saved_state:
        key, _, name = stored.partition(".")
        by_name.setdefault(name, {})[key] = stored
    trained = dict(_named_trained_params(vlm, optimizer))
    strange = sorted(by_name.keys() - trained.keys())
    if strange:
        raise UserError(f"the state of the optimizer has {strange[0]}, which is not trained here")
    for name, parameter in trained.items():
        state = {
            k: _distribute_like(saved_state[stored], parameter)
            for k, stored in by_name.get(name, {}).items()
        }
        if state:
            optimizer.state[parameter] = state


def _named_trained_params(vlm: VLM, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Give the parameters of an optimizer in its order, with their names."""
    names = {id(parameter): name for name, parameter in vlm.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _distribute_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Return a whole tensor where `parameter` is, and sharded like it if their shapes agree."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # every process has read the whole: nothing needs to be sent
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
