"""Settings of the process, restored on leaving: vlbench may run inside somebody's program.

Libraries change settings of the whole process when they are imported or used: log handlers, filters
of warnings, the environment, signal handlers, random states. This module imports none of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from vlbench.compat.torch_internals import sigchld_flag_restorer
from vlbench.stop_signals import STOP_SIGNALS, RestoreFunction

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class SettingsGuard:
    """Settings saved when the first of several threads enters, restored when the last leaves."""

    def __init__(self, save_settings: Callable[[], RestoreFunction]) -> None:
        self._save_settings, self._lock, self._entry_count = save_settings, threading.Lock(), 0
        self._restore_settings: RestoreFunction

    def __enter__(self) -> None:
        with self._lock:
            if not self._entry_count:
                self._restore_settings = self._save_settings()
            self._entry_count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entry_count -= 1
            if not self._entry_count:
                self._restore_settings()


@contextlib.contextmanager
def preserve_process_settings() -> Iterator[None]:
    """Restore at the end the settings of the process that libraries or vlbench have changed.

    These are the root logger's level and handlers, the filters of warnings, `os.environ`, signal
    handlers (in the main thread), the start method of processes, and the random states of Python,
    numpy and torch.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_INTERPRETER_GUARD)
        if "torch" in sys.modules:
            stack.enter_context(_RANDOM_GUARD)
        if threading.current_thread() is threading.main_thread():
            stack.callback(_save_signal_handlers())
        yield


def avoid_cudnn_attention(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which attention on a GPU takes the flash or the efficient kernel.

    On Hopper torch prefers cuDNN's, which makes a plan for each new length: a growing KV cache has
    one at every token. The preference is the process's, so it is put back when the last thread
    leaves. `device_type` other than `cuda`: nothing is changed.
    """
    return _CUDNN_ATTENTION_GUARD if device_type == "cuda" else contextlib.nullcontext()


def prefer_expandable_segments() -> None:
    """Let torch grow its blocks of GPU memory, unless the user has configured its allocator.

    Rows and images differ from batch to batch: blocks of fixed sizes leave gaps that no tensor
    fits. Must come before the first use of a GPU; processes that are started inherit it.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


class _ThreadWarningFilter:
    """The pattern of a warning filter: it matches every warning of one thread, and no other."""

    def __init__(self) -> None:
        self._thread_id = threading.get_ident()

    def match(self, _: str) -> bool:
        """Return whether the warning is of the thread."""
        return threading.get_ident() == self._thread_id


@contextlib.contextmanager
def ignore_thread_warnings() -> Iterator[None]:
    """Ignore warnings of this thread; those of other threads are handled as before.

    `warnings.catch_warnings` replaces the filters of all threads, and where two of them overlap,
    the second restores what the first has set.
    """
    filters: Any = warnings.filters
    thread_filter = ("ignore", _ThreadWarningFilter(), Warning, None, 0)
    filters.insert(0, thread_filter)
    try:
        yield
    finally:
        filters.remove(thread_filter)


def _save_interpreter_state() -> RestoreFunction:
    start_method = _process_start_method()
    environment, root_logger = dict(os.environ), logging.getLogger()
    level, handlers = root_logger.level, root_logger.handlers[:]
    random_state = random.getstate()
    excepthook, formatwarning = sys.excepthook, warnings.formatwarning
    filters = warnings.catch_warnings()
    filters.__enter__()

    def restore_interpreter() -> None:
        """Put back what was saved; names that the environment has gained are removed."""
        filters.__exit__(None, None, None)
        root_logger.setLevel(level)
        root_logger.handlers[:] = handlers
        sys.excepthook, warnings.formatwarning = excepthook, formatwarning
        random.setstate(random_state)
        if _process_start_method() != start_method:
            sys.modules["multiprocessing"].set_start_method(start_method, force=True)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return restore_interpreter


def _process_start_method() -> str | None:
    """Return how new processes start; None is not yet set, as it is before the first import."""
    module = sys.modules.get("multiprocessing")
    return module.get_start_method(allow_none=True) if module else None


def _save_random_state() -> RestoreFunction:
    import numpy as np
    import torch

    numpy_state, cpu_state = np.random.get_state(), torch.get_rng_state()
    has_gpu_state = torch.cuda.is_initialized()
    gpu_states = torch.cuda.get_rng_state_all() if has_gpu_state else []

    def restore_random() -> None:
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)

    return restore_random


def _save_signal_handlers() -> RestoreFunction:
    signals = (*STOP_SIGNALS, signal.SIGCHLD)
    handlers = {number: signal.getsignal(number) for number in signals}
    restore_flag = sigchld_flag_restorer()  # so that the host's data loaders set theirs again

    def restore_signals() -> None:
        for number, handler in handlers.items():
            # None: a handler that was not set from Python, which cannot be set again
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        restore_flag()

    return restore_signals


def _disable_cudnn_attention() -> RestoreFunction:
    from torch.backends import cuda

    was_enabled = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    return lambda: cuda.enable_cudnn_sdp(was_enabled)


_INTERPRETER_GUARD, _RANDOM_GUARD, _CUDNN_ATTENTION_GUARD = (
    SettingsGuard(_save_interpreter_state),
    SettingsGuard(_save_random_state),
    SettingsGuard(_disable_cudnn_attention),
)
