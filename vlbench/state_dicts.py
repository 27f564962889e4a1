"""State dicts compared and loaded strictly: every tensor has its place, name and shape.

What does not fit is told in one way everywhere, whoever reads the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vlbench.errors import UserError, suggest_name

if TYPE_CHECKING:
    from torch import Tensor, nn


class WeightMismatch(UserError):
    """Weights that do not fit the module that they are for."""

    def __init__(self, reason: str, context: str = "") -> None:
        """Say what does not fit, after `context` if there is one: what the weights are."""
        super().__init__(f"{context}: {reason}" if context else reason)


def describe_missing(names: Sequence[str]) -> str:
    """Return "tensor X is missing, and N more" for names that weights lack."""
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {names[0]} is missing{more}"


def describe_unexpected(name: str, known_names: Iterable[str]) -> str:
    """Return a line for a tensor that is for nothing, with the most similar known name."""
    return f"tensor {name} belongs to nothing in this model.{suggest_name(name, known_names)}"


def describe_shapes(name: str, given: Sequence[int], needed: Sequence[int]) -> str:
    """Return a line for a tensor of the wrong shape."""
    return f"tensor {name} has shape {tuple(given)}, needed is {tuple(needed)}"


def check_names(expected: Collection[str], given: Collection[str], context: str = "") -> None:
    """Refuse weights that lack a name or have one more.

    Every loader returns the names that it loaded, and its caller compares them: weights that were
    not read, or that went nowhere, cannot pass for a part that is loaded.

    Raises:
        WeightMismatch: begins with `context`.
    """
    missing = [name for name in expected if name not in given]
    if missing:
        raise WeightMismatch(describe_missing(missing), context)
    for name in given:
        if name not in expected:
            raise WeightMismatch(describe_unexpected(name, expected), context)


def check_state(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], context: str = ""
) -> None:
    """Refuse tensors that do not have the names and shapes of others.

    Raises:
        WeightMismatch: begins with `context`.
    """
    check_names(expected, given, context)
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            reason = describe_shapes(name, given[name].shape, tensor.shape)
            raise WeightMismatch(reason, context)


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], context: str = "", assign: bool = False
) -> set[str]:
    """Load a whole state dict into `module` and return its names.

    Args:
        module: What is loaded; left alone where the state does not fit.
        state: All of its tensors, by name.
        context: What the weights are, the beginning of an error.
        assign: Take the tensors themselves, with their type and device, and not their numbers.

    Raises:
        WeightMismatch: names the tensor that is missing, surplus or of another shape.
    """
    check_state(module.state_dict(), state, context)
    module.load_state_dict(dict(state), strict=True, assign=assign)
    return set(state)
