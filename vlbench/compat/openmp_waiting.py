"""GNU's OpenMP runtime, libgomp, with which torch's wheels for Linux run on several threads.

Threads that wait for each other at the end of a parallel region spin for milliseconds before they
sleep. How long is fixed when the library is loaded (GOMP_SPINCOUNT), but for one thing that its
manual says: where it manages more threads than there are cores, they spin 100 times and sleep.
"""

from __future__ import annotations

import ctypes
import sys
import threading

OMP_PAUSE_SOFT = 1  # omp_pause_resource_t of the OpenMP specification
NEEDED_SYMBOLS = (
    "GOMP_parallel",
    "omp_get_num_procs",
    "omp_get_initial_device",
    "omp_pause_resource",
)


class SpinSwitch:
    """Ends the spinning of libgomp's threads in the whole process, by more threads that sleep.

    Both methods are for one thread that computes nothing, as its team sleeps; the end of the thread
    is that of the team. No result depends on it: how many threads compute, and what each of them
    does, stays the same.
    """

    def __init__(self, runtime: ctypes.CDLL) -> None:
        """Take the loaded runtime; see `find_spin_switch`."""
        self._runtime = runtime
        self._do_nothing = ctypes.cast(runtime.free, ctypes.c_void_p)  # free(NULL)

    def stop_spinning(self, team_size: int) -> bool:
        """Have more threads than cores beside a team of `team_size`; False if none can start."""
        count = max(2, self._runtime.omp_get_num_procs() - team_size + 2)  # this thread is one
        if not can_start_threads(count - 1):
            return False
        self._runtime.GOMP_parallel(self._do_nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
        return True

    def allow_spinning(self) -> None:
        """End the threads of `stop_spinning`."""
        self._runtime.omp_pause_resource(OMP_PAUSE_SOFT, self._runtime.omp_get_initial_device())


def find_spin_switch() -> SpinSwitch | None:
    """Return the switch; None where torch runs on another runtime. torch must be imported.

    It relies on torch loading the runtime's symbols globally, and on the rule of the manual. If
    either goes, threads spin beside busy processes: the same results, ten times later. LLVM's and
    Intel's runtimes have `kmp_set_blocktime`; they follow other rules.
    """
    if sys.platform != "linux":
        return None
    runtime = ctypes.CDLL(None)
    if hasattr(runtime, "kmp_set_blocktime"):
        return None
    return SpinSwitch(runtime) if all(hasattr(runtime, one) for one in NEEDED_SYMBOLS) else None


def can_start_threads(count: int) -> bool:
    """Tell whether `count` more threads are allowed: libgomp ends the process where one is not."""
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        return False
    finally:
        end.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return True
