"""Share the cores with other processes: threads of torch sleep where they wait, while others work.

Threads that wait for each other spin, which is fastest on an idle machine. Beside a busy process
they spin on the core that the one they wait for should have, and training is ten times slower. So a
watch in the background compares how long the threads of this process ran with how long they were
ready and waited for a core; while that is long, threads that wait for each other sleep at once.

The number of threads stays as it is: with another one sums are rounded differently, and the weights
of a run would depend on what else the machine did.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.compat.openmp_waiting import SpinSwitch, find_spin_switch

if TYPE_CHECKING:
    import torch

# Between two looks; until the first one, threads spin. With a shorter time a moment in which other
# threads of this process want a core, as those that write a checkpoint, looks like a neighbour.
CHECK_SECONDS = 1.0
LINGER_SECONDS = 10.0  # the watch goes on after its last use, so that short uses are watched too
MIN_ACTIVE_SECONDS = 0.02  # less running and waiting between two looks tells nothing
# Shares of the time in which threads ran or waited for a core; measured on two cores: 0.01 alone,
# 0.07 beside a data worker of the run, 0.3 beside a busy process.
BUSY_SHARE = 0.15  # from here on they sleep
CALM_SHARE = 0.1  # below it, in CALM_CHECKS looks one after the other, they spin again
CALM_CHECKS = 3
MAX_CALM_CHECKS = 60  # each time that the cores were free for a short while, it takes twice as long
TASKS_FOLDER = Path("/proc/self/task")

ThreadTimes = dict[str, tuple[int, int]]
"""By thread: nanoseconds that it ran, and that it was ready and waited for a core."""


class ContentionMeter:
    """Tells from the times of the threads of a process whether others want its cores."""

    def __init__(self) -> None:
        """Begin with cores that are free."""
        self.is_contended = False
        self._calm_checks, self._needed_checks = 0, CALM_CHECKS
        self._checks_since_change = MAX_CALM_CHECKS

    def update(self, run_seconds: float, wait_seconds: float) -> bool:
        """Take the sums over all threads since the last call; return `is_contended`."""
        if run_seconds + wait_seconds < MIN_ACTIVE_SECONDS:
            return self.is_contended
        share = wait_seconds / (run_seconds + wait_seconds)
        self._checks_since_change += 1
        if not self.is_contended and share >= BUSY_SHARE:
            is_relapse = self._checks_since_change < self._needed_checks
            longer = min(2 * self._needed_checks, MAX_CALM_CHECKS)
            self._needed_checks = longer if is_relapse else CALM_CHECKS
            self._change(True)
        elif self.is_contended:
            self._calm_checks = self._calm_checks + 1 if share < CALM_SHARE else 0
            if self._calm_checks >= self._needed_checks:
                self._change(False)
        return self.is_contended

    def _change(self, is_contended: bool) -> None:
        self.is_contended, self._calm_checks, self._checks_since_change = is_contended, 0, 0


class CoreWatch:
    """The watch of one process: a background thread while somebody uses it, and a while longer."""

    def __init__(self) -> None:
        """Watch nothing yet."""
        self.is_sharing = False
        """Whether other processes want the cores, and threads that wait sleep."""
        self._lock, self._user_count, self._team_size = threading.Lock(), 0, 1
        self._end_requested = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def use(self, team_size: int) -> Iterator[None]:
        """Watch until the end of `with`; `team_size` threads work together."""
        with self._lock:
            self._user_count, self._team_size = self._user_count + 1, team_size
            if self._thread is None and team_size > 1:
                self._start()
        try:
            yield
        finally:
            with self._lock:
                self._user_count -= 1

    def _start(self) -> None:
        switch = find_spin_switch()
        if switch is None:
            return
        self._end_requested.clear()
        thread = threading.Thread(
            target=self._watch, args=(switch,), name="vlbench core watch", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no thread is left: they go on spinning
            thread.start()
            self._thread = thread
            atexit.register(self._end)  # a thread that outlives the interpreter may crash it

    def _end(self) -> None:
        self._end_requested.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, switch: SpinSwitch) -> None:
        meter, before, used_at = ContentionMeter(), read_thread_times(), time.monotonic()
        if not before:  # where nothing is counted, sleeping is the smaller loss
            switch.stop_spinning(self._team_size)
        while not self._end_requested.wait(CHECK_SECONDS):
            now = read_thread_times()
            is_contended = meter.update(*elapsed_seconds(before, now))
            before = now
            if is_contended and not self.is_sharing:
                self.is_sharing = switch.stop_spinning(self._team_size)
            elif self.is_sharing and not is_contended:
                switch.allow_spinning()
                self.is_sharing = False
            with self._lock:
                used_at = time.monotonic() if self._user_count else used_at
                if time.monotonic() - used_at > LINGER_SECONDS:
                    break
        switch.allow_spinning()
        with self._lock:
            self.is_sharing, self._thread = False, None
        if not self._end_requested.is_set():
            atexit.unregister(self._end)  # not from here while it runs


_WATCHES: dict[int, CoreWatch] = {}
"""The watch of this process, by its number: a process that was forked has none yet."""


def process_watch() -> CoreWatch:
    """Return the one watch of this process."""
    return _WATCHES.setdefault(os.getpid(), CoreWatch())


@contextlib.contextmanager
def share_cores(device: torch.device) -> Iterator[None]:
    """Until the end of `with`, let threads sleep where they wait while others want the cores.

    Nothing is watched where the work is done by a GPU, where torch has one thread, or where it runs
    on another OpenMP runtime than libgomp (macOS).
    """
    if device.type != "cpu":
        yield
        return
    import torch

    with process_watch().use(torch.get_num_threads()):
        yield


def read_thread_times() -> ThreadTimes:
    """Return the times of all threads of this process; empty where the system does not count."""
    times: ThreadTimes = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(TASKS_FOLDER):
            with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
                run, wait, _ = (TASKS_FOLDER / name / "schedstat").read_text().split()
                times[name] = int(run), int(wait)
    return times


def elapsed_seconds(before: ThreadTimes, now: ThreadTimes) -> tuple[float, float]:
    """Return how long threads ran, and waited for a core, between two readings; sums."""
    pairs = [(times, before.get(name, (0, 0))) for name, times in now.items()]
    run, wait = (sum(new[index] - old[index] for new, old in pairs) for index in (0, 1))
    return run / 1e9, wait / 1e9
