"""Two processes train as one: the same losses, checkpoints that fit any number, one voice."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from several import Job, do, in_two

from vlbench.data.scene_world import scene

RECIPES = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
STRATEGIES = ("ddp", "fsdp2")
DOCS = Path(__file__).parents[1] / "docs"
TWO = "trainer.devices=2"
QUIET = ("log.every=1", "log.questions=2", "log.examples=0", "log.tensorboard=false")
LORA = ("stages.chat.train.language.lora.rank=4", "stages.chat.train.language.lr=1e-3")
WAYS = {
    **{name: (f"recipe={name}", "only=chat") for name in RECIPES},
    "lora": ("recipe=yivl_llava", "only=chat", *LORA),
    "frozen": ("recipe=yivl_llava", "only=align_448", "stages.align_448.form=chat"),
}
HALF = "bf16"
WAYS[HALF] = ("recipe=yivl_llava", "only=chat", "precision=bf16")
NEAR = {HALF: 0.1}  # rounding to 16 bits grows from step to step
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Words that name conversations of which every second has no picture."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number in range(24):
        picture = {} if number % 2 else {"image": f"{number}.png"}
        place = "" if number % 2 else "<image>\n"
        if picture:
            scene("processes", 0, number).open().save(folder / f"{number}.png")
        told = [f"{place}What is number {number}?", "It is red. " * (1 + number % 5)]
        turns = [{"from": who, "value": v} for who, v in zip(("human", "gpt"), told, strict=True)]
        records.append({"id": str(number), **picture, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return f"data.train={folder / 'data.json'}", f"data.images={folder}"


def words(way: str, run: Path, data: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Return a command: 2 samples a step, one with a picture and one without for two processes."""
    stage = "align_448" if way == "frozen" else "chat"
    short = (f"stages.{stage}.batch=2", f"stages.{stage}.image_size=56", "data.workers=0")
    return (
        *WAYS[way],
        *short,
        f"stages.{stage}.steps=400",
        *data,
        *QUIET,
        f"run={run}",
        *more,
    )


def losses(run: Path) -> list[float]:
    """Return the loss of every step in the log of a run."""
    with (run / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def curves(data, tmp_path_factory) -> dict[tuple[str, str], list[float]]:
    """Losses by way and strategy, in float64 but for one; "alone" is one process."""
    folder = tmp_path_factory.mktemp("curves")
    for way in WAYS:
        assert do(Job(words(way, folder / f"{way}-alone", data), STEPS, way != HALF)) == 130
    jobs = [
        Job(
            words(way, folder / f"{way}-{how}", data, TWO, f"trainer.strategy={how}"),
            STEPS,
            double=way != HALF,
        )
        for way in WAYS
        for how in STRATEGIES
    ]
    assert in_two(jobs) == [(130, 130)] * len(jobs)
    return {
        (way, how): losses(folder / f"{way}-{how}")
        for way in WAYS
        for how in ("alone", *STRATEGIES)
    }


@pytest.mark.parametrize("how", STRATEGIES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_of_one(way, how, curves):
    alone, together = curves[way, "alone"], curves[way, how]
    assert len(alone) == len(together) == STEPS
    assert len(set(alone)) == STEPS  # something is learned
    assert together[0] == pytest.approx(alone[0], rel=1e-2 if way == HALF else 1e-9)
    assert together == pytest.approx(alone, rel=NEAR.get(way, 1e-9))


KINDS = {"one": (), **{how: (TWO, f"trainer.strategy={how}") for how in STRATEGIES}}
CHANGES = [("one", "ddp"), ("one", "fsdp2"), ("ddp", "one"), ("fsdp2", "one"), ("ddp", "fsdp2")]
STOP = 3


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> dict[tuple[str, str], list[float]]:
    """Losses in float32 of two stages, stopped in the second by one kind, ended by another."""
    folder = tmp_path_factory.mktemp("resumed")

    def job(begins: str, ends: str, now: str, stop: int) -> Job:
        given = ["recipe=yivl_llava", "only=[align_448,chat]", *QUIET, *data, "data.workers=0"]
        for stage, steps in (("align_448", 2), ("chat", 6)):
            settings = (f"steps={steps}", "batch=4", "image_size=56")
            given += [f"stages.{stage}.{setting}" for setting in settings]
        return Job((*given, f"run={folder / f'{begins}-{ends}'}", *KINDS[now]), stop)

    assert do(job("one", "one", "one", 0)) == 0
    todo = [(job(a, b, a, STOP), a, 130) for a, b in CHANGES]
    todo += [(job(a, b, b, 0), b, 0) for a, b in CHANGES]
    for step in (todo[: len(CHANGES)], todo[len(CHANGES) :]):
        assert [do(one) for one, kind, _ in step if kind == "one"] == [
            code for _, kind, code in step if kind == "one"
        ]
        assert in_two([one for one, kind, _ in step if kind != "one"]) == [
            (code, code) for _, kind, code in step if kind != "one"
        ]
    return {(a, b): losses(folder / f"{a}-{b}") for a, b in [("one", "one"), *CHANGES]}


@pytest.mark.parametrize("change", CHANGES, ids=" to ".join)
def test_a_run_goes_on_with_another_number_of_processes(change, resumed):
    assert len(resumed[change]) == 8
    assert resumed[change] == pytest.approx(resumed["one", "one"], rel=1e-3)
    assert resumed[change][0] == pytest.approx(resumed["one", "one"][0], rel=1e-5)


def start(*given: str) -> subprocess.Popen[str]:
    """Start the main command in two processes."""
    command = [sys.executable, "-m", "vlbench", "fit", "recipe=yivl_llava", "only=chat", TWO]
    command += ["stages.chat.batch=4", "stages.chat.image_size=56", "data.workers=0", *QUIET]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *given], text=True, **pipes)


def wait_for(run: Path, steps: int) -> None:
    """Wait until a run has done some steps."""
    until = time.monotonic() + 120
    while not (run / "metrics.csv").is_file() or len(losses(run)) < steps:
        assert time.monotonic() < until
        time.sleep(0.1)


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of what a launcher has started."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(number) for number in found]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
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
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.batch=4", "stages.chat.image_size=56"]
    words += ["data.workers=0", *QUIET, "stages.chat.steps=40", f"run={run}"]
    assert do(Job(tuple(words), stop=12)) == 130
    assert len(losses(run)) == 12


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


def test_a_mistake_of_the_data_is_told_once(data, tmp_path):
    records = json.loads(Path(data[0].removeprefix("data.train=")).read_text())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for record in records:
        if "image" in record:
            record["image"] = "broken.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    where = (f"data.train={tmp_path / 'data.json'}", f"data.images={tmp_path}")
    process = start(*where, "data.on_bad=stop", "stages.chat.steps=4", f"run={tmp_path / 'run'}")
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert told.count("broken.png") == 1 and len(told.strip().splitlines()) == 1


def test_what_was_started_must_be_what_the_recipe_says(tmp_path, monkeypatch, capsys):
    words = ("recipe=yivl_llava", "trainer.devices=3", f"run={tmp_path / 'run'}")
    assert in_two([Job(words)]) == [(2, 2)]
    few = ("recipe=yivl_llava", TWO, "stages.chat.batch=1", f"run={tmp_path / 'run'}")
    assert in_two([Job(few)]) == [(2, 1)]
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert do(Job(("recipe=yivl_llava", "trainer.accelerator=gpu"))) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
    assert do(Job(("recipe=yivl_llava", "trainer.devices=2", "trainer.num_nodes=2"))) == 2
    assert "start the command on every machine with srun" in capsys.readouterr().err


SRUN = """#!/usr/bin/env bash
# Starts two tasks as srun would on one machine; its first option is --kill-on-bad-exit=1.
shift
export SLURM_STEP_NUM_TASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 "$@" & done
wait %1; first=$?
wait %2 && exit $first
"""


@pytest.mark.parametrize("told_first", [slice(None), slice(1, None)], ids=["all", "one alone"])
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
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.batch=4", "stages.chat.image_size=56"]
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


@pytest.mark.parametrize("own", [[], ["run=runs/mine"]])
def test_the_slurm_script_names_the_run_once(own, tmp_path):
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


@pytest.mark.slow
def test_torchrun_starts_it_too(tmp_path):
    run = tmp_path / "run"
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.batch=4", "stages.chat.image_size=56"]
    words += ["stages.chat.steps=2", "data.workers=0", TWO, *QUIET, f"run={run}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "vlbench", "fit", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results of") == 1
    assert (run / "results.json").is_file()
