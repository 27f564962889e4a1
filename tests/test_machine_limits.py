"""More processes than the machine can run are refused in one line, before any is started."""

from __future__ import annotations

import subprocess

import pytest

from vlbench.__main__ import main
from vlbench.distributed import launcher, machine_limits

FIT = ["fit", "recipe=yivl_llava", "only=chat"]


@pytest.fixture
def two_cores(monkeypatch, tmp_path):
    """Be on a machine with two cores and no GPU, on which nothing can be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine_limits, "count_cpu_cores", lambda: 2)
    monkeypatch.setattr(machine_limits, "count_gpus", lambda: 0)

    def refuse(*given, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("vlbench.fit_command.train_and_evaluate", refuse)
    monkeypatch.setattr("vlbench.compare.experiment.compare_command.match_budgets", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.devices=99"], "trainer.devices is 99, and this machine has 2 processor cores"),
        (["trainer.devices=3", "trainer.accelerator=cpu"], "at most 2"),
        (["trainer.devices=0"], "must be at least 1, given 0"),
        (["trainer.devices=-1"], "must be at least 1, given -1"),
        (["trainer.devices=99", "dry_run=true"], "at most 2"),
        (["trainer.num_nodes=99"], "start the command on every machine with srun"),
        (["data.workers=99"], "data.workers is 99, and there are 2 processor cores: at most 16"),
        (["data.workers=9", "trainer.devices=2"], "9 for each of 2 processes"),
    ],
)
def test_too_much_is_refused(words, said, two_cores, tmp_path, capsys):
    assert main([*FIT, *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jobs=99"], "jobs is 99, runs at once, and there are 2 processor cores: at most 2"),
        (["jobs=2", "trainer.devices=2"], "jobs is 2, runs of 2 processes"),
        (["trainer.devices=99"], "trainer.devices is 99"),
        (["data.workers=99"], "data.workers is 99"),
    ],
)
def test_a_comparison_that_is_too_much_is_refused(words, said, two_cores, tmp_path, capsys):
    assert main(["compare", "recipe=yivl_llava", "seeds=1", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_gpus_count_where_there_are_some(two_cores, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        launcher, "launch_processes", lambda words, settings: asked.append(settings) or 0
    )
    monkeypatch.setattr(machine_limits, "count_gpus", lambda: 8)
    assert main([*FIT, "trainer.devices=8"]) == 0 and asked[0].devices == 8
    assert main([*FIT, "trainer.devices=9"]) == 2
    assert "this machine has 8 GPUs for this process: at most 8" in capsys.readouterr().err
    assert main([*FIT, "trainer.devices=8", "trainer.accelerator=cpu"]) == 2
    assert "2 processor cores" in capsys.readouterr().err


def test_what_another_launcher_has_started_has_its_own_cores(two_cores, monkeypatch):
    monkeypatch.setattr("vlbench.fit_command.train_and_evaluate", lambda recipe: (0, None))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([*FIT, "trainer.devices=8"]) == 0


def test_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5}, raising=False)
    assert machine_limits.count_cpu_cores() == 1
