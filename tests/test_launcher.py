"""Processes are started, stopped and killed: by the command, by Slurm's script, by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_processes import run_in_processes
from torch import distributed
from two_process_commands import (
    QUIET,
    TWO,
    FitCommand,
    read_losses,
    run_fit_command,
    run_in_two_processes,
)

from vlbench.distributed import collectives, launcher, process_group
from vlbench.errors import EnvironmentFailure

DOCS = Path(__file__).parents[1] / "docs"


def start(*given: str, workers: int = 0) -> subprocess.Popen[str]:
    """Start the main command in two processes."""
    command = [sys.executable, "-m", "vlbench", "fit", "recipe=yivl_llava", "only=chat", TWO]
    command += ["stages.chat.global_batch_size=4", "stages.chat.image_size=56", *QUIET]
    command += [f"data.workers={workers}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *given], text=True, **pipes)


def wait_for(run: Path, steps: int) -> None:
    """Wait until a run has done some steps."""
    until = time.monotonic() + 120
    while not (run / "metrics.csv").is_file() or len(read_losses(run)) < steps:
        assert time.monotonic() < until
        time.sleep(0.1)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of what a launcher has started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in found]


def imported(number: int) -> str:
    """Return the names of the files that a process has mapped."""
    return Path(f"/proc/{number}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_one_line_and_it_goes_on(rank, tmp_path):
    run = tmp_path / "run"
    process = start("stages.chat.steps=40", f"run={run}")
    wait_for(run, 5)
    os.kill(children(process)[rank], signal.SIGKILL)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"process {rank} of 2 was ended by SIGKILL" in told
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) <= 2
    words = [
        "recipe=yivl_llava",
        "only=chat",
        "stages.chat.global_batch_size=4",
        "stages.chat.image_size=56",
    ]
    words += ["data.workers=0", *QUIET, "stages.chat.steps=40", f"run={run}"]
    assert run_fit_command(FitCommand(tuple(words), stop_step=12)) == 130
    assert len(read_losses(run)) == 12


def group_of(processes: list[int]) -> list[int]:
    """Return processes and all that descend from them."""
    found = list(processes)
    for number in found:
        with contextlib.suppress(OSError):
            inside = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            found += [int(one) for one in inside]
    return found


def alive(processes: list[int]) -> list[int]:
    """Return those of the processes that run; a zombie does not."""
    states = {}
    for number in processes:
        with contextlib.suppress(OSError):
            states[number] = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    return [number for number, state in states.items() if state != "Z"]


def wait_for_end(processes: list[int], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while left := alive(processes):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def test_processes_and_their_workers_end_with_a_killed_launcher_and_save(tmp_path):
    run = tmp_path / "run"
    process = start("stages.chat.steps=4000", f"run={run}", workers=1)
    wait_for(run, 3)
    ours = group_of(children(process))
    assert len(ours) == 6  # two processes; each has one that plans steps and one that loads rows
    process.kill()
    process.communicate(timeout=60)  # their pipes are closed when the last has ended
    wait_for_end(ours)
    assert len(list((run / "checkpoints").glob("0-chat-*/position.json"))) == 1


HANGS = """
import os, subprocess, sys
code = '''
import signal, time
from vlbench.distributed import collectives, launcher, process_group
signal.signal(signal.SIGTERM, signal.SIG_IGN)
launcher.ORPHAN_GRACE_SECONDS, launcher.PARENT_POLL_SECONDS = 0.1, 0.05
launcher.end_with_launcher()
print("ready", flush=True)
time.sleep(600)
'''
told = os.environ | {"VLBENCH_LAUNCHER": str(os.getpid())}
subprocess.run([sys.executable, "-c", code], env=told, start_new_session=True)
"""
SLOW_SAMPLE = """
import os, time
from torch.utils.data import DataLoader
from vlbench.distributed.launcher import isolate_data_worker

class Slow:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        time.sleep(600)

next(iter(DataLoader(Slow(), num_workers=2, worker_init_fn=isolate_data_worker)))
"""


def test_a_process_that_hangs_ends_with_a_killed_launcher_too():
    launcher = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout and launcher.stdout.readline() == "ready\n"
    ours = group_of(children(launcher))
    launcher.kill()
    launcher.communicate(timeout=30)
    wait_for_end(ours, 30)


def test_workers_end_with_their_process_in_the_middle_of_a_sample():
    words = [sys.executable, "-c", SLOW_SAMPLE]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate(timeout=30)
    wait_for_end(workers, 30)


def test_ctrl_c_saves_in_all_processes(tmp_path):
    run = tmp_path / "run"
    process = start("stages.chat.steps=400", f"run={run}")
    wait_for(run, 3)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.count("stopped by Ctrl-C, saved") == 1 and "Traceback" not in told
    position = next((run / "checkpoints").glob("0-chat-*/position.json"))
    assert json.loads(position.read_text())["step"] >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_it_trains_is_one_line(number, tmp_path):
    process = start("stages.chat.steps=400", f"run={tmp_path / 'run'}")
    until = time.monotonic() + 60
    while len(started := children(process)) < 2 or "torch" not in imported(started[1]):
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told == "vlbench: interrupted\n"


def test_a_second_ctrl_c_ends_what_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(launcher, "STARTUP_SECONDS", 0.0)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(); time.sleep(60)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline()  # it is deaf now
    with launcher._forward_signals(processes) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        bad = launcher._wait_for_processes(processes, asked)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    assert launcher._report_exit([-signal.SIGKILL] * 2, bad, asked) == 130


@pytest.mark.slow
def test_a_mistake_of_the_data_is_told_once(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    record = {"image": "broken.png", "conversations": turns}
    records = [record | {"id": str(number)} for number in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    where = (f"data.train={tmp_path / 'data.json'}", f"data.images={tmp_path}")
    process = start(
        *where, "data.on_bad_sample=stop", "stages.chat.steps=4", f"run={tmp_path / 'run'}"
    )
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert told.count("broken.png") == 1 and len(told.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_gpu_that_no_process_finds_is_said_once(tmp_path):
    process = start("trainer.accelerator=gpu", f"run={tmp_path / 'run'}")
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert told == "vlbench: trainer.accelerator is gpu, and torch finds no GPU on this machine\n"


@pytest.mark.slow
def test_what_was_started_must_be_what_the_recipe_says(tmp_path, monkeypatch, capsys):
    words = ("recipe=yivl_llava", "trainer.devices=3", f"run={tmp_path / 'run'}")
    assert run_in_two_processes([FitCommand(words)]) == [(2, 2)]
    few = ("recipe=yivl_llava", TWO, "stages.chat.global_batch_size=1", f"run={tmp_path / 'run'}")
    assert run_in_two_processes([FitCommand(few)]) == [(2, 1)]
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run_fit_command(FitCommand(("recipe=yivl_llava", "trainer.accelerator=gpu"))) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert (
        run_fit_command(
            FitCommand(("recipe=yivl_llava", "trainer.devices=2", "trainer.num_nodes=2"))
        )
        == 2
    )
    assert "start the command on every machine with srun" in capsys.readouterr().err


def test_torchrun_that_srun_started_gives_the_ranks(monkeypatch):
    """As `srun --ntasks-per-node=1 torchrun --nproc-per-node=8 ...` on two machines."""
    started = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    started |= {"SLURM_NODELIST": "node[1-2]", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "job"}
    started |= {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "16", "RANK": "11", "LOCAL_RANK": "3"}
    started |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "GROUP_RANK": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    environment = process_group._cluster_environment()
    assert (environment.world_size(), environment.global_rank()) == (16, 11)
    assert (environment.local_rank(), environment.main_address) == (3, "node1")
    assert launcher.silent_exit_code(2) == 2  # torchrun ends the others by it


SRUN = """#!/usr/bin/env bash
# Starts two tasks as srun would on one machine, always with --kill-on-bad-exit=1: when one
# leaves with a code that is not 0 the other is killed, and the highest code is that of all.
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & done
highest=0
for task in 0 1; do
    wait -n; code=$?
    if [ $code -ne 0 ]; then kill -KILL $(jobs -p) 2> /dev/null; fi
    if [ $code -gt $highest ]; then highest=$code; fi
done
exit $highest
"""


@pytest.mark.parametrize(
    "told_first",
    [
        pytest.param(slice(None), id="all", marks=pytest.mark.slow),
        pytest.param(slice(1, None), id="one alone", marks=pytest.mark.slow),
    ],
)
def test_the_slurm_script_trains_and_queues_what_was_stopped(told_first, tmp_path):
    (tmp_path / "bin").mkdir()
    queued = tmp_path / "queued"
    for name, text in (("srun", SRUN), ("scontrol", f'echo "$@" >> {queued}\n')):
        file = tmp_path / "bin" / name
        file.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}")
        file.chmod(0o755)
    python = Path(sys.executable).parent
    slurm = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "7"}
    slurm |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    path = f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}"
    words = [
        "recipe=yivl_llava",
        "only=chat",
        "stages.chat.global_batch_size=4",
        "stages.chat.image_size=56",
    ]
    process = subprocess.Popen(
        ["bash", DOCS / "slurm.sh", *words, "stages.chat.steps=400", "data.workers=0", *QUIET],
        cwd=tmp_path,
        env=os.environ | slurm | {"PATH": path, "MASTER_ADDR": "127.0.0.1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    run = tmp_path / "runs/job-7"
    try:
        wait_for(run, 3)
        tasks = tasks_of(run)
        assert len(tasks) == 2
        for number in tasks[told_first]:  # as Slurm does before it takes the machine away
            os.kill(number, signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, told
    assert told.count("stopped by SIGTERM, saved") == 1 and "Traceback" not in told
    assert queued.read_text() == "requeue 7\n"


def test_tasks_of_slurm_tell_a_mistake_once(tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["recipe=yivl_llava", "stages.chatt.steps=3"]
    command = [
        str(tmp_path / "srun"),
        "--kill-on-bad-exit=1",
        "python",
        "-m",
        "vlbench",
        "fit",
        *words,
    ]
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stderr.count("given 'chatt'") == done.stderr.count("vlbench:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (130, True), (143, True)])
def test_the_slurm_script_queues_what_was_stopped_and_not_what_failed(code, again, tmp_path):
    for name, text in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/queued')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "8", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "j", "SLURM_JOB_ID": "7"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(DOCS / "slurm.sh"), "recipe=yivl_llava"]
    assert subprocess.run(words, env=os.environ | slurm | path, check=False).returncode == code
    assert (tmp_path / "queued").exists() is again


@pytest.mark.parametrize("own", [[], ["run=runs/mine"]])
def test_the_slurm_script_names_the_run_once_and_waits_for_the_first_task(own, tmp_path):
    told = tmp_path / "told"
    (tmp_path / "srun").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {told}\n')
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "j", "SLURM_JOB_ID": "7"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ["bash", str(DOCS / "slurm.sh"), "recipe=yivl_llava", *own]
    subprocess.run(words, env=os.environ | slurm | path, check=True)
    given = told.read_text().splitlines()
    assert [word for word in given if word.startswith("run=")] == (own or ["run=runs/j-7"])
    assert given[-2:] == ["trainer.devices=8", "trainer.num_nodes=2"]
    # the first task evaluates when the others have ended: slurm.conf's WaitTime must not end it
    assert "--wait=0" in given[: given.index("python")]


def tasks_of(run: Path) -> list[int]:
    """Return the process ids of all that train `run`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:  # it has just ended
            continue
        if f"run=runs/{run.name}" in words and words[1:3] == ["-m", "vlbench"]:
            found.append(int(folder.name))
    return sorted(found)


FAILING_CALLBACK = """
import time
import lightning.pytorch as pl
from torch import distributed

distributed.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
distributed.destroy_process_group = lambda: time.sleep(600)  # NCCL waits for all processes


class Fails(pl.Callback):
    def on_train_batch_end(self, *_):
        if distributed.get_rank() == 1:
            raise {error}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')",
            "out of memory in stage",
        ),
        ("ValueError('one process alone')", "ValueError: one process alone"),
    ],
)
def test_an_error_on_one_gpu_is_told_and_ends_all(error, said, tmp_path, monkeypatch):
    """Whoever leaves a group with NCCL waits for the others, and they wait for a step of it."""
    (tmp_path / "my_failure.py").write_text(FAILING_CALLBACK.format(error=error))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    words = ["trainer.callbacks=[my_failure.Fails]", "stages.chat.steps=4"]
    process = start(*words, f"run={tmp_path / 'run'}")
    try:
        told = process.communicate(timeout=100)[1]
    finally:
        for number in group_of([process.pid, *children(process)]) if process.poll() is None else []:
            os.kill(number, signal.SIGKILL)
    assert process.returncode == 1
    assert said in told


@pytest.mark.slow
def test_torchrun_starts_it_too(tmp_path):
    run = tmp_path / "run"
    words = [
        "recipe=yivl_llava",
        "only=chat",
        "stages.chat.global_batch_size=4",
        "stages.chat.image_size=56",
    ]
    words += ["stages.chat.steps=2", "data.workers=0", TWO, *QUIET, f"run={run}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "vlbench", "fit", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results of") == 1
    assert (run / "results.json").is_file()


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by what is tested
        monkeypatch.setenv(name, "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first = SimpleNamespace(main_address="127.0.0.1", main_port=port, global_rank=lambda: 0)
        first.world_size = lambda: 2
        with pytest.raises(
            EnvironmentFailure, match=f"cannot meet at 127.0.0.1:{port}.*MASTER_PORT"
        ):
            process_group._init_process_group(SimpleNamespace(accelerator="cpu"), first)


def test_what_one_process_does_for_all_may_take_longer_than_a_step(monkeypatch):
    """A download of hours in the first process, as seconds."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by what is tested
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(process_group, "STEP_TIMEOUT", timedelta(seconds=4), raising=False)
    monkeypatch.setattr(process_group, "PROCESS_GROUP_TIMEOUT", timedelta(seconds=4), raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work_in_the_first(rank: int) -> list[object]:
        distributed.destroy_process_group()  # that of the tests, which waits for a minute
        own = SimpleNamespace(main_address="127.0.0.1", main_port=port, global_rank=lambda: rank)
        own.world_size = lambda: 2
        process_group._init_process_group(SimpleNamespace(accelerator="cpu"), own)
        done = collectives.call_on_rank_zero(lambda: time.sleep(6) or "downloaded")
        first = collectives.call_on_rank_zero_first(lambda: rank or time.sleep(6) or 0)
        return [done, first, *collectives.all_gather_objects(rank)]

    assert run_in_processes(work_in_the_first) == [["downloaded", rank, 0, 1] for rank in (0, 1)]


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (8, 0), (9, 1)])
def test_a_process_that_hangs_is_told_from_one_that_ended(rank, local_rank, monkeypatch):
    monkeypatch.setattr(collectives, "rank", lambda: rank)

    def told_of(message: str) -> str:
        with pytest.raises((EnvironmentFailure, SystemExit)) as raised:
            with process_group._exit_together(local_rank):
                raise RuntimeError(f"[gloo/transport/tcp/{message}")
        return str(raised.value)

    ended = told_of("pair.cc:561] Connection closed by peer [127.0.0.1]:8102")
    hangs = told_of("unbound_buffer.cc:129] Timed out waiting 1800000ms for recv operation")
    assert ("one of them has ended" in ended) == (local_rank == 0)
    # where the first process hangs, the second tells it
    assert ("did not answer in time (30 minutes" in hangs) == (rank != 9)
    assert "has ended" not in hangs
