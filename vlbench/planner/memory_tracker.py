"""Counting the bytes of fake tensors: tensors with shapes and without values.

A training step of a model with 34 billion weights takes seconds and no memory: the real code runs
on torch's fake tensors, so no knowledge of what a layer saves for its backward pass is needed.
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
"""Operations that return integers where no dtype is given."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live fake tensors by `kind`, and their peak in each phase.

    Enter it inside of a FakeTensorMode. Integer tensors stay real, because shapes depend on their
    values (which positions attend to which image: `Connector.inject`).
    """

    supports_higher_order_operators = True  # compiled code has some, as what saves a random state
    kind = "activations"
    """Kind of the tensors that are made from now on, except for weight copies and logits."""
    phase = ""
    """Name of the current phase; each has its own peak."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let blocks be compiled under this mode; what compiled code allocates is counted."""
        return True

    def __init__(self, vocab_size: int) -> None:
        """Start at zero; logits are recognised by their last dimension, `vocab_size`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocab_size = vocab_size
        self.reset_counts()

    def reset_counts(self, *counted_tensors: Tensor) -> None:
        """Start again at zero, with `counted_tensors` as the only live ones."""
        self._live_bytes: dict[str, int] = {}
        self._open_storages: dict[int, int] = {}
        self._total_bytes = 0
        self.phase_peaks: dict[str, dict[str, int]] = {}
        self._peak_bytes: dict[str, int] = {}
        for tensor in counted_tensors:
            self._count_storage(tensor, self.kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on real tensors if they are integers, and count its outputs."""
        if is_device_query(func) and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # three of four dispatched calls are this one
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _runs_on_real_tensors(func, inputs, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", None)  # higher-order operators have none
        if packet in (torch.ops.aten.index, torch.ops.aten.index_put_):
            args = _masks_to_indices(args)
        outputs = func(*args, **kwargs)
        known = {storage_address(tensor) for tensor in inputs if isinstance(tensor, FakeTensor)}
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, FakeTensor) and storage_address(leaf) not in known:
                self._count_storage(leaf, self._classify_output(func, inputs, leaf))
        return outputs

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
        if open_storages is self._open_storages:  # else the counts were reset since
            self._live_bytes[kind] -= size
            self._total_bytes -= size


def _runs_on_real_tensors(func: Any, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Return whether all inputs are real, or, without inputs, whether the output is of integers."""
    if inputs:
        return not any(isinstance(tensor, FakeTensor) for tensor in inputs)
    dtype = kwargs.get("dtype")
    if dtype is None:
        return getattr(func, "overloadpacket", None) in INTEGER_FACTORIES
    return not (dtype.is_floating_point or dtype.is_complex)


def _masks_to_indices(args: Any) -> Any:
    """Return the arguments of an indexing with indices in place of boolean masks.

    The output shape of a mask depends on its values, which a fake tensor cannot have.
    """
    tensor, indices, *rest = args
    if not any(_is_boolean_mask(index) for index in indices):
        return args
    converted: list[Any] = []
    with unset_fake_temporarily():
        for index in indices:
            converted += index.nonzero().unbind(1) if _is_boolean_mask(index) else [index]
    return (tensor, converted, *rest)


def _is_boolean_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool
