"""The one way to build a connector: options that ask for too much are a line, and no full memory.

`depth=10**9` would build layers for hours, `width=10**6` would fill the memory. The tensors that
`__init__` creates are counted while it runs, on the meta device as well as on a real one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlbench.connector.base import Connector, Shapes
from vlbench.connector.declared_attributes import check_attributes
from vlbench.connector.option_schema import check_option_size
from vlbench.connector.registered_layers import check_methods, check_registered_layers

MAX_NEW_TENSORS = 8_000
"""As 300 transformer blocks have; connectors in use have at most 1,000."""
MAX_NEW_ELEMENTS = 200_000_000_000
"""Twenty times the gated blocks of a Flamingo with 80 billion parameters."""


def build_connector(
    connector_class: type[Connector], shapes: Shapes, options: Mapping[str, Any]
) -> Connector:
    """Return a new connector on the default device.

    Raises:
        ValueError: when an option is a number that is no size, when the connector would have more
            tensors than any has, or more bytes than this machine has memory; when its attributes
            cannot be what they say (`check_attributes`); when a method is missing, or torch does
            not know all of its layers (`registered_layers`); and whatever `__init__` raises.
    """
    name = connector_module_name(connector_class)
    for key, value in options.items():
        try:
            check_option_size(value)
        except ValueError as error:
            raise ValueError(f"connector {name}: {key} {error}") from None
    with NewTensorLimit(connector_class):
        connector = connector_class(shapes, **options)
    check_attributes(connector, shapes, name)
    check_methods(connector, Connector, name)
    check_registered_layers(connector, name)
    return connector


class NewTensorLimit(TorchDispatchMode):
    """Raises a ValueError where the code of a connector, in this thread, makes too many tensors."""

    def __init__(self, connector_class: type[Connector]) -> None:
        """Take the class that errors name."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = connector_module_name(connector_class)
        self._tensors = self._elements = self._cpu_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args):
            self._count(result)  # its memory is not touched before it is filled
        return result

    def _count(self, tensor: Tensor) -> None:
        self._tensors += 1
        self._elements += tensor.numel()
        if tensor.device.type == "cpu":
            self._cpu_bytes += tensor.nbytes
        problem = ""
        if self._tensors > MAX_NEW_TENSORS:
            problem = f"more than {MAX_NEW_TENSORS:,} tensors"
        elif self._elements > MAX_NEW_ELEMENTS:
            problem = f"more than {MAX_NEW_ELEMENTS:,} parameters"
        elif self._cpu_bytes > (memory := _physical_memory()):
            problem = f"more than the {memory / 1e9:.0f} GB of memory that this machine has"
        if problem:
            raise ValueError(f"connector {self._name}: its options ask for {problem}")


def connector_module_name(connector_class: type[Connector]) -> str:
    """Return the name by which messages call a connector: that of its file."""
    return connector_class.__module__.rpartition(".")[2]


def _physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
