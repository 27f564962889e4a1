"""Tensors that have shapes and no values, and the bytes that they would take.

A model of 34 billion weights goes through a training step in seconds and no memory: the code that
runs is the real one, on torch's fake tensors, so nothing has to be known of what a layer keeps.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES, LOGITS = "weight copies", "logits"
COUNTERS = (torch.ops.aten.arange, torch.ops.aten.randint, torch.ops.aten.randperm)
"""What makes whole numbers when no type is asked for."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of fake tensors from their making to their end, by `kind`.

    It is entered inside of a FakeTensorMode. Whole numbers stay real: who sees which picture
    decides about shapes (`Connector.inject`).
    """

    kind = "activations"
    """What is made now counts as this, but for copies of weights, and logits."""
    phase = ""
    """Peaks are kept for each phase apart."""

    def __init__(self, vocabulary: int) -> None:
        """Begin with nothing; logits are known by their last side, `vocabulary`."""
        super().__init__()
        self._vocabulary = vocabulary
        self.begin()

    def begin(self, *given: Tensor) -> None:
        """Count anew: of all that is there by now, `given` alone."""
        self._live: dict[str, int] = {}
        self._open: dict[int, int] = {}
        self._total = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self._most: dict[str, int] = {}
        for one in given:
            self._note(one, self.kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes, or on whole numbers for real, and note what it makes."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for three times as often as anything is computed
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if _stays_real(func, given, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            args = _by_number(args)
        made = func(*args, **kwargs)
        known = {_address(one) for one in given if isinstance(one, FakeTensor)}
        for one in tree_leaves(made):
            if isinstance(one, FakeTensor) and _address(one) not in known:
                self._note(one, self._kind_of(func, given, one))
        return made

    def _kind_of(self, func: Any, given: list[Tensor], made: Tensor) -> str:
        if func is torch.ops.aten._to_copy.default and isinstance(given[0], nn.Parameter):
            return COPIES
        return LOGITS if made.shape[-1:] == (self._vocabulary,) else self.kind

    def _note(self, made: Tensor, kind: str) -> None:
        storage = made.untyped_storage()
        if storage._cdata in self._open:
            return
        size = storage.nbytes()
        self._open[storage._cdata] = size
        self._live[kind] = self._live.get(kind, 0) + size
        self._total += size
        if self._total > self._most.get(self.phase, 0):
            self._most[self.phase], self.peaks[self.phase] = self._total, dict(self._live)
        weakref.finalize(storage, self._gone, self._open, storage._cdata, kind)

    def _gone(self, opened: dict[int, int], address: int, kind: str) -> None:
        size = opened.pop(address)
        if opened is self._open:  # of a count that is over nobody wants to know
            self._live[kind] -= size
            self._total -= size


def _stays_real(func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Tell whether an operation reads and makes whole numbers, or what was real before."""
    if given:
        return not any(isinstance(one, FakeTensor) for one in given)
    kind = kwargs.get("dtype")
    if kind is None:
        return func.overloadpacket in COUNTERS
    return not (kind.is_floating_point or kind.is_complex)


def _by_number(args: Any) -> Any:
    """Return arguments of an indexing with places instead of masks, whose shape is not known."""
    tensor, indices, *rest = args
    if not any(_mask(one) for one in indices):
        return args
    found: list[Any] = []
    with unset_fake_temporarily():
        for one in indices:
            found += one.nonzero().unbind(1) if _mask(one) else [one]
    return (tensor, found, *rest)


def _mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
