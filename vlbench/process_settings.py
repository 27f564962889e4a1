"""The settings of the process, put back as they were: vlbench may run inside somebody's program.

Libraries change settings of the whole process when they are imported or used: log handlers, filters
of warnings, the environment, signal handlers, random numbers. Imports neither torch nor any other.
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
from typing import Any

from vlbench.compat.torch_internals import sigchld_flag_restorer

RestoreFunction = Callable[[], None]


class _SettingsGuard:
    """Settings noted when the first of several threads comes, and put back when the last leaves."""

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
    """Put back at the end what libraries and we ourselves have changed of the process.

    That is the root logger's level and handlers, the filters of warnings, `os.environ`, handlers of
    signals (in the main thread), how processes are started, and the state of the random numbers of
    Python, numpy and torch.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_INTERPRETER_GUARD)
        if "torch" in sys.modules:
            stack.enter_context(_RANDOM_GUARD)
        if threading.current_thread() is threading.main_thread():
            stack.callback(_save_signal_handlers())
        yield


class _ThreadWarningFilter:
    """What a filter of warnings matches their text with: all that the thread warns of, no more."""

    def __init__(self) -> None:
        self._thread_id = threading.get_ident()

    def match(self, _: str) -> bool:
        """Tell whether the thread warns."""
        return threading.get_ident() == self._thread_id


@contextlib.contextmanager
def ignore_thread_warnings() -> Iterator[None]:
    """Ignore warnings of this thread, whatever the program does with those of others.

    `warnings.catch_warnings` exchanges the filters of all threads; of two that overlap, the second
    puts back what the first has set.
    """
    filters: Any = warnings.filters
    own = ("ignore", _ThreadWarningFilter(), Warning, None, 0)
    filters.insert(0, own)
    try:
        yield
    finally:
        filters.remove(own)


def _save_interpreter_state() -> RestoreFunction:
    import multiprocessing

    method = multiprocessing.get_start_method(allow_none=True)
    environment, root = dict(os.environ), logging.getLogger()
    level, handlers, state = root.level, root.handlers[:], random.getstate()
    hook, written = sys.excepthook, warnings.formatwarning
    filters = warnings.catch_warnings()
    filters.__enter__()

    def restore_interpreter() -> None:
        filters.__exit__(None, None, None)
        root.setLevel(level)
        root.handlers[:] = handlers
        sys.excepthook, warnings.formatwarning = hook, written
        random.setstate(state)
        if multiprocessing.get_start_method(allow_none=True) != method:  # None: still to be chosen
            multiprocessing.set_start_method(method, force=True)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        for name, value in environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    return restore_interpreter


def _save_random_state() -> RestoreFunction:
    import numpy as np
    import torch

    numpy, here = np.random.get_state(), torch.get_rng_state()
    there = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore_random() -> None:
        np.random.set_state(numpy)
        torch.set_rng_state(here)
        if there:
            torch.cuda.set_rng_state_all(there)

    return restore_random


def _save_signal_handlers() -> RestoreFunction:
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in caught}
    restore_flag = sigchld_flag_restorer()  # so that the host's data loaders set theirs again

    def restore_signals() -> None:
        for number, handler in before.items():
            # None: of a program that is not Python, and cannot be put back from here
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        restore_flag()

    return restore_signals


_INTERPRETER_GUARD, _RANDOM_GUARD = (
    _SettingsGuard(_save_interpreter_state),
    _SettingsGuard(_save_random_state),
)
