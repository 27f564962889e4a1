"""Threads that wait sleep while other processes want the cores, and spin again afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from vlbench import core_sharing
from vlbench.compat import openmp_waiting
from vlbench.core_sharing import CALM_CHECKS, ContentionMeter, CoreWatch, share_cores
from vlbench.train.core_sharing_notice import CoreSharingNotice

CPU = torch.device("cpu")
BUSY, FREE = (1.0, 0.5), (1.0, 0.001)  # seconds that threads ran, and waited for a core

SPIN_PROGRAM = """
import json, threading, time, torch
from vlbench.compat.openmp_waiting import find_spin_switch
torch.set_num_threads(2)
numbers = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))

def regions():
    before = time.process_time()
    for _ in range(20):
        total = float((numbers * numbers).sum())
        time.sleep(0.005)
    return time.process_time() - before, total

switch, stopped, end, ended = find_spin_switch(), *(threading.Event() for _ in range(3))

def hold():
    switch.stop_spinning(2)
    stopped.set()
    end.wait()
    switch.allow_spinning()
    ended.set()

found = [regions()]
threading.Thread(target=hold).start()
stopped.wait()
found.append(regions())
end.set()
ended.wait()
print(json.dumps([*found, regions()]))
"""


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="needs libgomp")
def test_threads_that_wait_take_no_time_while_spinning_is_stopped():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP", "GOMP", "MKL"))}
    done = subprocess.run(
        [sys.executable, "-c", SPIN_PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (spinning, first), (sleeping, second), (again, third) = json.loads(done.stdout)
    assert sleeping < min(spinning, again) / 2  # seconds of processor time, not of a clock
    assert first == second == third


def test_no_switch_without_libgomp(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openmp_waiting, "NEEDED_SYMBOLS", ("no_such_symbol",))
    assert openmp_waiting.find_spin_switch() is None


def test_threads_that_cannot_start_are_no_end_of_the_process(monkeypatch: pytest.MonkeyPatch):
    class Runtime:
        free = openmp_waiting.ctypes.CDLL(None).free

        def omp_get_num_procs(self) -> int:
            return 2

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not openmp_waiting.SpinSwitch(Runtime()).stop_spinning(2)


def test_a_busy_neighbour_is_seen_at_once_and_its_end_after_a_while():
    meter = ContentionMeter()
    assert not meter.update(*FREE)
    assert meter.update(*BUSY)
    assert [meter.update(*FREE) for _ in range(CALM_CHECKS)] == [True] * (CALM_CHECKS - 1) + [False]


def test_calm_counts_only_without_interruption():
    meter = ContentionMeter()
    meter.update(*BUSY)
    for _ in range(CALM_CHECKS - 1):
        meter.update(*FREE)
    meter.update(*BUSY)
    assert all(meter.update(*FREE) for _ in range(CALM_CHECKS - 1))
    assert not meter.update(*FREE)


def test_cores_that_are_never_free_for_long_are_tried_less_and_less():
    meter, needed = ContentionMeter(), []
    for _ in range(3):
        meter.update(*BUSY)
        checks = 1
        while meter.update(*FREE):
            checks += 1
        needed.append(checks)
    assert needed[1:] == [2 * needed[0], 4 * needed[0]]


def test_a_process_that_does_nothing_learns_nothing():
    meter = ContentionMeter()
    meter.update(*BUSY)
    assert all(meter.update(0.001, 0.0) for _ in range(10 * CALM_CHECKS))


def test_times_are_summed_over_threads_that_began_or_ended():
    before = {"1": (10**9, 0), "2": (5 * 10**9, 10**9)}
    now = {"1": (3 * 10**9, 10**8), "3": (10**9, 2 * 10**8)}
    assert core_sharing.elapsed_seconds(before, now) == pytest.approx((3.0, 0.3))


@pytest.mark.skipif(not core_sharing.TASKS_FOLDER.exists(), reason="needs /proc of Linux")
def test_linux_counts_the_times_of_this_thread():
    times = core_sharing.read_thread_times()
    assert str(threading.get_native_id()) in times


class FakeSwitch:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def stop_spinning(self, team_size: int) -> bool:
        self.calls.append(f"stop {team_size}")
        return True

    def allow_spinning(self) -> None:
        self.calls.append("allow")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine whose neighbour the test plays, with a watch that looks 200 times a second."""
    switch = FakeSwitch()
    played = SimpleNamespace(busy=False, run=0, wait=0, switch=switch, watch=CoreWatch())

    def read_thread_times() -> core_sharing.ThreadTimes:
        played.run += 10**9
        played.wait += 10**9 if played.busy else 0
        return {"1": (played.run, played.wait)}

    monkeypatch.setattr(core_sharing, "read_thread_times", read_thread_times)
    monkeypatch.setattr(core_sharing, "find_spin_switch", lambda: switch)
    monkeypatch.setattr(core_sharing, "CHECK_SECONDS", 0.005)
    monkeypatch.setattr(core_sharing, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(core_sharing, "process_watch", lambda: played.watch)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield played
    torch.set_num_threads(threads)
    wait_until(lambda: played.watch._thread is None)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_spinning_stops_while_a_neighbour_is_busy_and_the_watch_ends_after_its_last_use(machine):
    with share_cores(CPU), share_cores(CPU):
        machine.busy = True
        wait_until(lambda: machine.watch.is_sharing)
        machine.busy = False
        wait_until(lambda: not machine.watch.is_sharing)
    assert machine.switch.calls == ["stop 2", "allow"]
    machine.busy = True  # it goes on watching for a while
    wait_until(lambda: machine.watch.is_sharing)
    wait_until(lambda: machine.watch._thread is None)
    assert not machine.watch.is_sharing
    assert machine.switch.calls == ["stop 2", "allow", "stop 2", "allow"]


def test_where_nothing_is_counted_threads_sleep(machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(core_sharing, "read_thread_times", dict)
    with share_cores(CPU):
        wait_until(lambda: machine.switch.calls == ["stop 2"])
        assert not machine.watch.is_sharing


def test_one_thread_and_a_gpu_need_no_watch(machine):
    with share_cores(torch.device("cuda")):
        assert machine.watch._thread is None
    torch.set_num_threads(1)
    with share_cores(CPU):
        assert machine.watch._thread is None


def test_a_model_that_answers_is_watched(machine, model):
    import vlbench

    vlm = vlbench.load(model)
    vlm.chat([{"role": "user", "content": "What is this?"}], max_new_tokens=1)
    assert machine.watch._thread is not None
    wait_until(lambda: machine.watch._thread is None)
    vlm(vlm.prepare([{"role": "user", "content": "What is this?"}]))
    assert machine.watch._thread is not None


def test_training_says_once_that_cores_are_shared(machine):
    lines: list[str] = []
    notice = CoreSharingNotice(lines.append)
    import vlbench.train.core_sharing_notice as module

    for is_sharing in (False, True, True, False, True):
        machine.watch.is_sharing = is_sharing
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "process_watch", lambda: machine.watch)
            notice.on_step_end(None, None)  # type: ignore[arg-type]
    assert len(lines) == 1 and "sleep" in lines[0]
