"""Private parts of Lightning: what a Trainer has chosen for the machine that it runs on.

Checked with lightning 2.6; 2.5 is the oldest that vlbench allows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor


def trainer_device(trainer: Trainer) -> torch.device:
    """Return the device that a Trainer computes on, known before training: `strategy.root_device`.

    If it goes, nothing is trained.
    """
    return trainer.strategy.root_device


def autocast_context(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return the context in which a Trainer runs forward: `precision_plugin.forward_context`.

    Cached features are computed under it. If it changes, they differ from those of training.
    """
    return trainer.precision_plugin.forward_context()


def set_autocast_context(
    trainer: Trainer, make_context: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Have a Trainer in mixed precision run its steps, and `autocast_context`, under another one.

    `MixedPrecision.autocast_context_manager` is replaced on the object. If it is no longer called,
    training runs under Lightning's own autocast, whose settings differ between versions.
    """
    plugin: Any = trainer.precision_plugin
    plugin.autocast_context_manager = make_context


def is_ddp_trainer(trainer: Trainer) -> bool:
    """Tell whether a running Trainer exchanges gradients by DDP, the class of `strategy.model`.

    If the attribute moves, gradients of several micro-batches take twice the memory.
    """
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(trainer.strategy.model, DistributedDataParallel)


def exchange_gradients(trainer: Trainer, loss: Tensor) -> None:
    """Compute the gradients of a loss and exchange them, outside of a step: no hook is called.

    `strategy.pre_backward` prepares DDP for it. If it changes, the first step of a stage fails.
    """
    import torch

    trainer.strategy.pre_backward(loss)
    torch.autograd.backward(loss)


def leave_signals_alone(trainer: Trainer) -> None:
    """Keep a Trainer from handling SIGTERM: its handler calls a collective operation at once.

    The other processes are somewhere else, and in another one: all would wait forever.
    `_signal_connector.register_signal_handlers` is replaced on the object. If it is renamed,
    Lightning's handler is back while a stage trains.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def detach_callbacks(trainer: Trainer) -> None:
    """Let the callbacks of a Trainer forget the module that it has trained.

    Lightning gives each of them the module's `log` and `log_dict`: one that is used again in the
    next stage would hold the model of this one until then. If they get other names, a sharded model
    stays in memory while the next one is loaded.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in ("log", "log_dict"):
            vars(callback).pop(name, None)


def without_gradient_sync(trainer: Trainer) -> AbstractContextManager[Any]:
    """Return a context in which backward exchanges no gradients between processes.

    DDP's module, which is `strategy.model` while a Trainer runs, has `no_sync`; with one process or
    FSDP there is none, and the context does nothing. If the attribute moves, gradients are
    exchanged at every micro-batch: right, but slower.
    """
    wrapped: Any = trainer.strategy.model
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") else contextlib.nullcontext()
