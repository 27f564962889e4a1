"""Private parts of torch for tensors with shapes and no values, as the planner simulates a step.

Checked with torch 2.14; 2.11 is the oldest that vlbench allows. `torch._subclasses.fake_tensor`
(and of its mode `avoid_device_init`), `torch.utils._python_dispatch`, `torch.utils._pytree`,
`UntypedStorage._cdata` are used. If one of them changes, `plan` breaks, nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "ShapeMode",
    "TorchDispatchMode",
    "is_device_query",
    "is_type_cast",
    "storage_address",
    "tree_leaves",
    "unset_fake_temporarily",
]


class ShapeMode(FakeTensorMode):
    """A FakeTensorMode that asks once whether there is an accelerator.

    torch's asks with every operation that it meets for the first time, and without a GPU each
    question opens the library of the driver anew: a twelfth of the time of a simulated step.
    """

    @functools.cached_property
    def avoid_device_init(self) -> bool:
        """Tell whether there is none."""
        has_none: bool = super().avoid_device_init
        return has_none


def storage_address(tensor: Tensor) -> int:
    """Return a number that is the same for all tensors in one storage, while it lives."""
    address: int = tensor.untyped_storage()._cdata
    return address


def is_type_cast(operation: Any) -> bool:
    """Tell whether an operation casts to another type: autocast casts by `aten._to_copy`."""
    return operation is torch.ops.aten._to_copy.default


def is_device_query(operation: Any) -> bool:
    """Tell whether an operation only asks for the device of a tensor."""
    return operation is torch.ops.prim.device.default
