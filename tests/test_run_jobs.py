"""Runs as processes: several at once, none before what it waits for, all told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlbench.compare.experiment import (
    compare_command,
    cost_estimate,
    lr_sweep,
    probe_run,
    run_jobs,
)
from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.run_jobs import ComparisonStopped, TrainingJob, train_jobs
from vlbench.compare.report.sweep_summary import SWEEP_SEED

SLEEPS = "import time, sys; time.sleep(0.6); print('the end'); sys.exit(int(sys.argv[1]))"
SAVES = """
import signal, sys, time
def save(number, _):
    print('saved', flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print('ready', flush=True)
time.sleep(60)
"""


@pytest.fixture
def programs(monkeypatch):
    """Let a job run a program of its own instead of `fit`."""
    launched = []
    popen = subprocess.Popen

    def launch(command, **options):
        launched.append(options["env"])
        return popen([sys.executable, "-c", *command[4:]], **options)

    monkeypatch.setattr(run_jobs.subprocess, "Popen", launch)
    return launched


def job(folder: Path, name: str, *words: str) -> TrainingJob:
    return TrainingJob(name, words, folder / name)


def test_as_many_at_once_as_wanted_and_none_before_it_is_ready(programs, tmp_path):
    todo = [job(tmp_path, name, SLEEPS, "0") for name in "abcd"]
    running, most, order, ended = set(), [], [], []

    def start(one):
        running.add(one.title)
        order.append(one.title)
        most.append(len(running))

    def end(one, code):
        running.remove(one.title)
        ended.append(one.title)
        assert code == 0 and one.last_log_line == "the end"

    train_jobs(todo, 2, lambda one: one.title != "b" or "a" in ended, start, end)
    assert max(most) == 2 and sorted(order) == list("abcd")
    assert order[:2] == ["a", "c"] and order.index("b") > 1


def test_a_job_that_fails_does_not_end_the_others(programs, tmp_path):
    todo = [job(tmp_path, "a", SLEEPS, "3"), job(tmp_path, "b", SLEEPS, "0")]
    codes = {}
    train_jobs(
        todo, 1, lambda _: True, lambda _: None, lambda one, code: codes.update({one.title: code})
    )
    assert codes == {"a": 3, "b": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_jobs_are_told_to_stop_and_waited_for(number, programs, tmp_path):
    todo = [job(tmp_path, name, SAVES) for name in "abc"]

    def stop():
        while not all(
            one.log_file.is_file() and "ready" in one.log_file.read_text() for one in todo[:2]
        ):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(ComparisonStopped):
        train_jobs(todo, 2, lambda _: True, lambda _: None, lambda *_: None)
    thread.join()
    assert [one.last_log_line for one in todo[:2]] == ["saved", "saved"] and not todo[
        2
    ].log_file.exists()
    assert signal.getsignal(number) is before


def test_every_job_has_its_gpu_or_its_part_of_the_processors(programs, tmp_path, monkeypatch):
    todo = [job(tmp_path, name, SLEEPS, "0") for name in "ab"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(run_jobs, "count_cpu_cores", lambda: 6)
    train_jobs(todo, 2, lambda _: True, lambda _: None, lambda *_: None)
    assert [env["OMP_NUM_THREADS"] for env in programs] == ["3", "3"]
    monkeypatch.setattr(run_jobs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    train_jobs(todo, run_jobs.count_slots("auto"), lambda _: True, lambda _: None, lambda *_: None)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in programs[2:]] == ["5", "7"]
    monkeypatch.setattr(run_jobs.torch.cuda, "device_count", lambda: 0)
    assert run_jobs.count_slots("auto") == 4 and run_jobs.count_slots("6") == 6


def test_a_run_of_several_gpus_has_as_many_for_itself(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_jobs.torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    words = ["recipe=yivl_llava,yivl_qformer", "seeds=3", "trainer.devices=2", "run=c"]
    grid = grids.parse_grid([*words, "trainer.accelerator=gpu"])
    started = []

    def note(jobs, slot_count, is_ready, on_start, on_end, run_gpus=1):
        started.append(
            [
                run_jobs.slot_environment(slot, slot_count, run_gpus)["CUDA_VISIBLE_DEVICES"]
                for slot in range(slot_count)
            ]
        )

    monkeypatch.setattr(compare_command, "train_jobs", note)
    compare_command._train_unfinished(grid, compare_command._make_jobs(grid))
    assert started == [["7,6", "5,4"]]
    more = [run_jobs.slot_environment(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert more == ["7,6", "5,4", "7,6"]
    few = run_jobs.slot_environment(0, run_jobs.count_slots("auto", 8), 8)
    assert few["CUDA_VISIBLE_DEVICES"] == "7,6,5,4,3"  # the run says that they are too few


def test_a_sweep_multiplies_the_rate_of_every_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = grids.parse_grid(
        ["recipe=yivl_llava,yivl_qformer", "seeds=[4,2]", "sweep=0.5,2"]
        + ["stages.chat.train.connector.lr=1e-3", "run=c"]
    )
    trials = lr_sweep.trial_jobs(grid)
    assert [one.title for one in trials] == [
        f"{name}, rate x {factor}" for factor in ("0.5", "2") for name in grid_names(grid)
    ]
    assert "stages.chat.train.connector.lr=0.0005" in trials[0].overrides
    assert "stages.align_224.train.connector.lr=0.004" in trials[2].overrides
    assert "stages.chat.train.connector.lr=1e-3" not in trials[0].overrides
    assert f"seed={SWEEP_SEED}" in trials[0].overrides  # no run of a comparison ever has it


def grid_names(grid: grids.ComparisonGrid) -> list[str]:
    return [row.name for row in grid.rows]


def finish(folder: Path, loss: str) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    (folder / "metrics.csv").write_text(f"stage,step,held_out_loss\nchat,1,0.9\nchat,2,{loss}\n")


def test_the_lowest_held_out_loss_is_chosen_row_by_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=yivl_llava,yivl_qformer,yivl_eva", "seeds=1", "sweep=0.5,1,2", "run=c"]
    grid = grids.parse_grid(words)
    llava, qformer, eva = grid.rows
    for factor, losses in {0.5: ("0.3", "0.2"), 1: ("0.1", "nan"), 2: ("0.2", "0.1")}.items():
        for row, loss in zip((llava, qformer), losses, strict=True):
            finish(lr_sweep.trial_folder(grid, row, {"connector": factor}), loss)
    after = lr_sweep.apply_best_lr(grid)
    rates = [
        grids.load_recipe(row, 0).stages["chat"].trained_parts["connector"].lr for row in after.rows
    ]
    assert rates == [4e-4, 8e-4, 4e-4]  # nothing is known of the last row, so it stays
    written = json.loads((tmp_path / "c/sweep.json").read_text())["rows"]
    assert written["yivl_qformer"]["chosen"] == {"connector": 2.0}
    assert [trial["loss"] for trial in written["yivl_qformer"]["trials"]] == [0.2, None, 0.1]
    assert [trial["loss"] for trial in written["yivl_eva"]["trials"]] == [None] * 3
    assert written["yivl_eva"]["chosen"] is None


def test_freezing_the_encoder_keeps_its_features_in_the_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = grids.parse_grid(["recipe=yivl_llava,yivl_eva", "freeze=vision", "run=c"])
    for row in grid.rows:
        recipe = grids.load_recipe(row, 0)
        assert all("vision" not in stage.trained_parts for stage in recipe.stages.values())
        assert recipe.trainer.feature_cache == "c/features"


def test_a_probe_has_as_many_processes_as_its_run(monkeypatch):
    launched = []
    monkeypatch.setattr(probe_run, "launch_processes", lambda *words: launched.append(words) or 0)
    monkeypatch.setattr(probe_run, "run_probe", lambda words: launched.append(words) or 0)
    words = ["recipe=yivl_llava", "trainer.accelerator=cpu"]
    assert probe_run.launch_probe([*words, "trainer.devices=2"]) == 0
    assert probe_run.launch_probe(words) == 0
    (_, settings, module), alone = launched
    assert settings.devices == 2 and module == probe_run.__name__ and alone == words


@pytest.mark.slow
def test_a_run_of_two_processes_is_probed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=yivl_llava", "trainer.devices=2", "trainer.accelerator=cpu", "only=align_224"]
    (row,) = grids.parse_grid([*words, "log.questions=2"]).rows
    cost = cost_estimate._probe_run(row, row.overrides_for_seed(0), dict(os.environ))
    assert cost is not None and cost["seconds"] > 0 and cost["question_seconds"] > 0
