"""The state of an optimizer by the names of parameters, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vlbench.errors import UserError
from vlbench.model.vlm import VLM


def named_optimizer_state(vlm: VLM, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of an optimizer as `KEY.PARAMETER_NAME`; tensors may be sharded."""
    if not optimizer.state:  # get_optimizer_state_dict would take a step to make one
        return
    states = get_optimizer_state_dict(vlm, optimizer)["state"]
    for name, state in cast(Mapping[str, Mapping[str, Tensor]], states).items():
        for key, value in state.items():
            yield f"{key}.{name}", value


def restore_optimizer_state(
    vlm: VLM, optimizer: Optimizer, saved_state: Mapping[str, Tensor]
) -> None:
    """Load what `named_optimizer_state` gave, sharded as the parameters are now.

    Not torch's set_optimizer_state_dict: it takes a step with zero gradients first, so its peak is
    19 bytes a parameter instead of 8 (measured), where a model may only just fit.
    """
    keys_by_parameter: dict[str, list[str]] = {}
    for stored_name in saved_state:
        key, _, name = stored_name.partition(".")
        keys_by_parameter.setdefault(name, []).append(key)
    names = {parameter: name for name, parameter in vlm.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unknown = sorted(keys_by_parameter.keys() - {names[parameter] for parameter in trained})
    if unknown:
        raise UserError(f"the state of the optimizer has {unknown[0]}, which is not trained here")
    for parameter in trained:
        name = names[parameter]
        keys = keys_by_parameter.get(name)
        if keys:  # a parameter that never had a gradient has none
            optimizer.state[parameter] = {
                key: _distribute_like(saved_state[f"{key}.{name}"], parameter) for key in keys
            }


def _distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor on the device of a parameter, sharded like it if shapes agree."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    # every process has read the whole tensor: nothing needs to be sent
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
