"""Whether torch knows all of a connector's layers, so that they are trained, moved and saved.

A layer in a plain list is computed with and never learns; a lazy one has no weights yet when a
connector is built, as one that `forward` makes has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from vlbench.errors import suggest_name

if TYPE_CHECKING:
    from vlbench.connector.base import Connector

MAX_DEPTH = 4  # of lists in lists that are looked through


def check_registered_layers(connector: Connector, name: str) -> None:
    """Raise a ValueError for layers that would not be trained, moved to a GPU or saved."""
    modules = dict(connector.named_modules())
    known = {id(one) for one in (*modules.values(), *connector.parameters())}
    for path, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute in _TORCH_ATTRIBUTES:
                continue
            hidden = next((one for one in _find_layers(value) if id(one) not in known), None)
            if hidden is not None:
                raise ValueError(
                    f"connector {name}: self.{_join(path, attribute)} is a plain "
                    f"{type(value).__name__} with a {type(hidden).__name__} in it, which would not "
                    f"be trained, moved to a GPU or saved: {_remedy(value, hidden)}"
                )
    for path, tensor in (*connector.named_parameters(), *connector.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ValueError(
                f"connector {name}: {path} has no shape before the first forward (a lazy layer), "
                "and would be neither trained nor saved: say its sizes, which `shapes` has, as in "
                "nn.Linear(shapes.vision_width, shapes.lm_width)"
            )


def check_methods(connector: Connector, base: type[Connector], name: str) -> None:
    """Raise a ValueError for a connector without `forward`, or one that injects without `inject`.

    `base` is the class `Connector`.
    """
    cls = type(connector)
    needed = ["forward", *(["inject"] if connector.inject_layers else [])]
    for method in needed:
        if getattr(cls, method) is getattr(base, method) and method not in vars(connector):
            own = [one for one in vars(cls) if one not in vars(base) and not one.startswith("_")]
            arguments = "features" if method == "forward" else "layer, hidden, visual, where"
            reason = "" if method == "forward" else ", and it names inject_layers"
            similar = suggest_name(method, own)
            raise ValueError(
                f"connector {name}: class {cls.__name__} has no method {method}(self, {arguments})"
                f"{reason}{'.' if similar else ''}{similar}"
            )


_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Where torch itself keeps layers, parameters, buffers and hooks."""


def _find_layers(value: Any, depth: int = 0) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the modules and parameters in lists, tuples, sets and mappings."""
    if depth and isinstance(value, nn.Module | nn.Parameter):
        yield value
    elif depth < MAX_DEPTH and isinstance(value, list | tuple | set | frozenset | Mapping):
        for one in list(value.values() if isinstance(value, Mapping) else value):
            yield from _find_layers(one, depth + 1)


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _remedy(value: Any, hidden: nn.Module | nn.Parameter) -> str:
    kind = "Module" if isinstance(hidden, nn.Module) else "Parameter"
    container = "Dict" if isinstance(value, Mapping) else "List"
    return f"use nn.{kind}{container}"
