"""A model in evaluation mode, without changing the mode of the model that others use."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from vlbench.compat.torch_internals import copy_module_attributes

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ModuleCopies = dict[int, nn.Module]
"""The copy of each module by the `id` of the original."""


def in_eval_mode(model: ModuleT) -> ModuleT:
    """Return `model` if all of it is in evaluation mode, else a copy that is, with its weights.

    The copy has modules of its own and shares parameters and buffers, so it takes no memory. What
    is bound to a module of the original (hooks, a `forward` set on the object) is bound to the copy
    of that module.
    """
    if not any(module.training for module in model.modules()):
        return model
    originals = list(model.modules())
    copies: ModuleCopies = {id(module): object.__new__(type(module)) for module in originals}
    rebind = functools.partial(_rebind_to_copies, copies=copies)
    for module in originals:
        copied = copies[id(module)]
        copy_module_attributes(module, copied, rebind)
        copied.training = False
    return copies[id(model)]  # type: ignore[return-value]


def _rebind_to_copies(value: Any, copies: ModuleCopies) -> Any:
    """Return `value` with the copy of every module that it is, or is bound to."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in copies:
        return MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, functools.partial):
        bound = functools.partial(
            _rebind_to_copies(value.func, copies),
            *(_rebind_to_copies(one, copies) for one in value.args),
            **{name: _rebind_to_copies(one, copies) for name, one in value.keywords.items()},
        )
        vars(bound).update(vars(value))
        return bound
    return value
