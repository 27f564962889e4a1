"""Signals that stop a program: Ctrl-C, and what `kill`, Slurm and a closed terminal send.

Python raises an exception where a signal arrives. In the middle of an import it may get lost: the
initializers of C extensions (numpy's, torch's) swallow it or leave half a module, and what is seen
is a program that goes on, or an ImportError or RecursionError of another library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # of kill, Slurm; of a closed terminal
STOP_SIGNALS = (signal.SIGINT, *TERMINATION_SIGNALS)
IMPORT_SYSTEM = "<frozen importlib._bootstrap"  # how the file names of its frames begin
REPEAT_SECONDS = 0.1
RestoreFunction = Callable[[], None]


class _TerminationRequest(SystemExit):
    """A signal that ends the process, raised where it arrives."""


def handle_stop_signals(handler: Callable[[int, Any], None]) -> RestoreFunction:
    """Let a handler have Ctrl-C, SIGTERM and SIGHUP; return what puts the old ones back.

    SIGHUP stays ignored where it is (nohup). Only the main thread may set handlers; in any other
    one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    numbers = list(STOP_SIGNALS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}

    def restore_handlers() -> None:
        for number, old_handler in before.items():
            # None: a handler that was not set from Python, which cannot be set again
            signal.signal(number, signal.SIG_DFL if old_handler is None else old_handler)

    return restore_handlers


class StopSignalHandler:
    """Raises what a stop signal means where it arrives, and again while an import swallows it."""

    def __init__(self) -> None:
        self._main_thread, self._process_id = threading.get_ident(), os.getpid()
        self._outer_imports = _count_imports(sys._getframe())
        self._interrupted_import = 0
        """The signal that arrived in an import which is not left yet; 0 for none."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt after Ctrl-C, else what ends the process by the signal."""
        if os.getpid() != self._process_id and number in TERMINATION_SIGNALS:
            _end_by_signal(number)  # a process that was forked has nothing to remove
        if _count_imports(frame) > self._outer_imports and not self._interrupted_import:
            self._interrupted_import = number
            threading.Thread(target=self._repeat_in_import, daemon=True).start()
        _raise_request(number)

    @contextlib.contextmanager
    def explain_broken_imports(self) -> Iterator[None]:
        """Raise what the signal means in the place of an error of the import that it broke."""
        try:
            yield
        except Exception:
            if self._interrupted_import:
                _raise_request(self._interrupted_import)
            raise

    def _repeat_in_import(self) -> None:
        """Send the signal to the main thread again until it has left the import."""
        time.sleep(REPEAT_SECONDS)
        while self._interrupted_import and self._is_importing():
            signal.pthread_kill(self._main_thread, self._interrupted_import)
            time.sleep(REPEAT_SECONDS)
        self.forget()

    def _is_importing(self) -> bool:
        frame = sys._current_frames().get(self._main_thread)
        return _count_imports(frame) > self._outer_imports

    def forget(self) -> None:
        """Let errors be what they are again: the import was left."""
        self._interrupted_import = 0


@contextlib.contextmanager
def unwind_on_stop_signals() -> Iterator[StopSignalHandler]:
    """Let the signals that stop a program leave `with` by an exception: half-written files go.

    After SIGTERM and SIGHUP the process ends by the signal all the same; Ctrl-C raises
    KeyboardInterrupt. A signal that is ignored (nohup) or has a handler keeps it, and so do all in
    a thread: only the main one may set handlers.
    """
    handler = StopSignalHandler()
    defaults: dict[signal.Signals, Any] = dict.fromkeys(TERMINATION_SIGNALS, signal.SIG_DFL)
    defaults[signal.SIGINT] = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    before = {number: old for number, old in defaults.items() if signal.getsignal(number) == old}
    for number in before:
        signal.signal(number, handler)
    try:
        yield handler
    except _TerminationRequest as request:
        _end_by_signal(int(str(request)) - 128)
    finally:
        handler.forget()
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def end_silently_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process without a trace: while a program imports what it runs."""
    if signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _count_imports(frame: FrameType | None) -> int:
    """Return how many frames of the import system are in the stack of a frame."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith(IMPORT_SYSTEM)
        frame = frame.f_back
    return count


def _raise_request(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else _TerminationRequest(128 + number)


def _end_by_signal(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
