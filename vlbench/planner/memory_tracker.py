"""Tensors that have shapes and no values, and the bytes that they would take.

A model of 34 billion weights goes through a training step in seconds and no memory: the code that
runs is the real one, on torch's fake tensors, so nothing has to be known of what a layer keeps.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.compat.fake_tensors import (
    FakeTensor,
    TorchDispatchMode,
    is_device_query,
    is_type_cast,
    storage_address,
    tree_leaves,
    unset_fake_temporarily,
)

WEIGHT_COPIES, LOGITS = "weight copies", "logits"
INTEGER_FACTORIES = (torch.ops.aten.arange, torch.ops.aten.randint, torch.ops.aten.randperm)
"""What makes whole numbers when no type is asked for."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of fake tensors from their making to their end, by `kind`.

    It is entered inside of a FakeTensorMode. Whole numbers stay real: who sees which picture
    decides about shapes (`Connector.inject`).
    """

    kind = "activations"
    """What is made now counts as this, but for copies of weights, and logits."""
    phase = ""
    """Peaks are kept for each phase apart."""

    def __init__(self, vocab_size: int) -> None:
        """Begin with nothing; logits are known by their last side, `vocabulary`."""
        super().__init__()
        self._vocab_size = vocab_size
        self.reset_counts()

    def reset_counts(self, *counted_tensors: Tensor) -> None:
        """Count anew: of all that is there by now, `given` alone."""
        self._live_bytes: dict[str, int] = {}
        self._open_storages: dict[int, int] = {}
        self._total_bytes = 0
        self.phase_peaks: dict[str, dict[str, int]] = {}
        self._peak_bytes: dict[str, int] = {}
        for one in counted_tensors:
            self._count_storage(one, self.kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes, or on whole numbers for real, and note what it makes."""
        if is_device_query(func) and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for three times as often as anything is computed
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if _runs_on_real_tensors(func, given, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            args = _masks_to_indices(args)
        made = func(*args, **kwargs)
        known = {storage_address(one) for one in given if isinstance(one, FakeTensor)}
        for one in tree_leaves(made):
            if isinstance(one, FakeTensor) and storage_address(one) not in known:
                self._count_storage(one, self._classify_output(func, given, one))
        return made

    def _classify_output(self, func: Any, inputs: list[Tensor], output: Tensor) -> str:
        if is_type_cast(func) and isinstance(inputs[0], nn.Parameter):
            return WEIGHT_COPIES
        return LOGITS if output.shape[-1:] == (self._vocab_size,) else self.kind

    def _count_storage(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address = storage_address(tensor)
        if address in self._open_storages:
            return
        size = storage.nbytes()
        self._open_storages[address] = size
        self._live_bytes[kind] = self._live_bytes.get(kind, 0) + size
        self._total_bytes += size
        if self._total_bytes > self._peak_bytes.get(self.phase, 0):
            self._peak_bytes[self.phase], self.phase_peaks[self.phase] = (
                self._total_bytes,
                dict(self._live_bytes),
            )
        weakref.finalize(storage, self._release_storage, self._open_storages, address, kind)

    def _release_storage(self, open_storages: dict[int, int], address: int, kind: str) -> None:
        size = open_storages.pop(address)
        if open_storages is self._open_storages:  # of a count that is over nobody wants to know
            self._live_bytes[kind] -= size
            self._total_bytes -= size


def _runs_on_real_tensors(func: Any, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Tell whether an operation reads and makes whole numbers, or what was real before."""
    if inputs:
        return not any(isinstance(one, FakeTensor) for one in inputs)
    kind = kwargs.get("dtype")
    if kind is None:
        return func.overloadpacket in INTEGER_FACTORIES
    return not (kind.is_floating_point or kind.is_complex)


def _masks_to_indices(args: Any) -> Any:
    """Return arguments of an indexing with places instead of masks, whose shape is not known."""
    tensor, indices, *rest = args
    if not any(_is_boolean_mask(one) for one in indices):
        return args
    found: list[Any] = []
    with unset_fake_temporarily():
        for one in indices:
            found += one.nonzero().unbind(1) if _is_boolean_mask(one) else [one]
    return (tensor, found, *rest)


def _is_boolean_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool
