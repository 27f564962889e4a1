"""The main job with few steps: it trains, survives every kind of end, and says what it did."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.config.recipe import load_recipe
from vlbench.train import checkpoint_files, lightning_trainer
from vlbench.train.lightning_trainer import build_trainer
from vlbench.train.progress_logging import METRIC_COLUMNS, truncate_metrics
from vlbench.train.run_folder import RunFolder
from vlbench.train.stage_runner import StageRunner
from vlbench.train.step_report import SEEN_COUNTS

STEPS = {"align_224": 3, "align_448": 2, "chat": 4}
SHORT = [
    "fit",
    "recipe=yivl_llava",
    *(f"stages.{name}.steps={steps}" for name, steps in STEPS.items()),
    *(f"stages.{name}.global_batch_size=4" for name in STEPS),
    "log.questions=8",
    "log.evaluate_every=2",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("fit") / "whole"
    assert main([*SHORT, f"run={folder}"]) == 0
    return folder


def last_of(run: Path) -> Path:
    return (
        run / "checkpoints" / checkpoint_files.list_positions(run / "checkpoints")[-1].folder_name
    )


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoint_files.list_positions(run / "checkpoints")[-1]
    assert (last.name, last.step) == ("chat", STEPS["chat"])
    return load_file(run / "checkpoints" / last.folder_name / "model.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = final_weights(run), final_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    files = [{p.name for p in last_of(one).rglob("*")} for one in (run, other)]
    assert files[0] == files[1] and "tokenizer.model" in files[0]
    here, there = (checkpoint_files.list_positions(one / "checkpoints")[-1] for one in (run, other))
    assert here == there


def log_of(run: Path) -> list[list[str]]:
    """Return stage, step and losses of every line of metrics.csv; times differ."""
    lines = (run / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:6] for line in lines]


def test_a_run_records_what_it_was_trained_with(whole: Path) -> None:
    budget = json.loads((whole / "results.json").read_text())["budget"]
    assert budget["steps"] == STEPS and budget["samples"] == 4 * sum(STEPS.values())
    assert budget["epochs"]["chat"] == 4 * STEPS["chat"] / 100000
    assert budget["truncated_samples"] == budget["lost_supervised_tokens"] == 0
    assert budget["unused_objectives"] == [] and budget["supervised_tokens"] > 0


def test_truncation_is_counted_kept_when_a_run_goes_on_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SHORT, "only=chat", "language.max_length=190", "run=r"]
    assert main(words) == 0
    said = capsys.readouterr().err
    budget = json.loads((tmp_path / "r/results.json").read_text())["budget"]
    told = re.search(r"chat: (\d+) of (\d+) samples were cut .* took ([\d,]+) supervised", said)
    assert told and int(told[1]) == budget["truncated_samples"] > 0
    assert int(told[3].replace(",", "")) == budget["lost_supervised_tokens"] > 0
    assert budget["steps"] == {"chat": 4}
    # albums, which would be cut through an image, are left out
    assert 12 < int(told[2]) == budget["samples"] < 16
    first = sorted((tmp_path / "r/checkpoints").iterdir())[0]
    position = json.loads((first / "position.json").read_text())
    assert set(position["seen"]) == set(SEEN_COUNTS)


def test_a_run_describes_itself(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    wanted = (
        "accuracy unseen_accuracy blank_accuracy shuffled_accuracy accuracy_by_type "
        "accuracy_by_language questions seconds peak_memory_bytes tokens_per_second recipe size "
        "connector seed commit"
    )
    assert set(wanted.split()) <= results.keys()
    assert results["questions"] == 8 and results["connector"] == "llava_mlp"
    budget = results["budget"]
    assert budget["samples"] == 4 * sum(STEPS.values()) <= budget["images"]  # some have several
    assert budget["tokens_seen"] > 64 * budget["images"]
    assert list(budget["step_seconds"]) == list(STEPS)
    assert budget["parts"]["connector"] == {"total": 33536, "trained": 33536}
    assert budget["parts"]["vision"]["trained"] < budget["parts"]["vision"]["total"]
    assert (whole / "examples.png").stat().st_size > 10_000
    assert "torch" in json.loads((whole / "versions.json").read_text())
    assert recipes.load_recipe_file(whole / "recipe.yaml").stages["chat"].steps == 4


def test_every_stage_changes_what_it_trains_and_nothing_else(whole: Path) -> None:
    folder = whole / "checkpoints"
    ends = {p.name: p for p in checkpoint_files.list_positions(folder) if p.step == STEPS[p.name]}
    align = load_file(folder / ends["align_448"].folder_name / "model.safetensors")
    chat = load_file(folder / ends["chat"].folder_name / "model.safetensors")
    assert not any(key.startswith("language.") for key in align)
    changed = {key.split(".")[0] for key in align if not torch.equal(align[key], chat[key])}
    assert changed == {"vision", "connector"}
    assert any(key.startswith("language.") for key in chat)


def test_a_finished_run_shows_its_results_again(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "results.json").stat().st_mtime_ns
    assert main([*SHORT, f"run={whole}"]) == 0
    assert "exact match" in capsys.readouterr().out
    assert (whole / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("torn", [True, False])
def test_a_checkpoint_without_its_optimizer_is_named(
    whole: Path, tmp_path: Path, torn: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    folder = tmp_path / "run/checkpoints"
    shutil.rmtree(folder / f"2-chat-{STEPS['chat']:06d}")
    file = sorted(folder.iterdir())[-1] / "optimizer/model.safetensors"
    file.write_bytes(b"torn") if torn else file.unlink()
    assert main([*SHORT, f"run={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert f"optimizer is {'torn' if torn else 'missing'}" in said and said.count("\n") == 1


@pytest.mark.parametrize("saves", [*(pytest.param(n, marks=pytest.mark.slow) for n in (3, 14)), 6])
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(
    whole: Path, tmp_path: Path, saves: int
) -> None:
    """Die while file `saves` is written: in a stage, between two stages, in the last one."""
    dying = (
        "import os, signal, sys, vlbench.model.weights.background_writer as c\n"
        "whole, count = c.fsync_path, 0\n"
        "def torn(path):\n"
        "    global count\n"
        "    count += path.suffix == '.safetensors'\n"
        "    whole(path)\n"
        f"    if count == {saves} and path.is_file():\n"
        "        os.truncate(path, 1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.fsync_path = torn\n"
        "from vlbench.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = tmp_path / "killed"
    words = [*SHORT, f"run={run}"]
    killed = subprocess.run([sys.executable, "-c", dying, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((run / "checkpoints").glob(".writing-*"))
    assert main(words) == 0
    assert_same_weights(whole, run)
    assert log_of(whole) == log_of(run)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_says_how_to_go_on_and_exits_130(
    whole: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "stopped"
    words = [*SHORT, f"run={run}", "data.workers=1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "vlbench", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    while child.poll() is None and not list(run.glob("checkpoints/0-*")):
        time.sleep(0.01)
    os.killpg(child.pid, number)  # as a terminal and Slurm do: workers must not die of it
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert f"run={run}" in errors and "Traceback" not in errors
    assert not (run / "results.json").exists()
    before = checkpoint_files.list_positions(run / "checkpoints")[-1].seconds
    assert main(words) == 0
    assert_same_weights(whole, run)
    assert before and json.loads((run / "results.json").read_text())["seconds"] > before


@pytest.mark.slow
def test_a_killed_data_worker_is_one_line_and_the_run_goes_on(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "short of memory"
    words = [*SHORT, f"run={run}", "data.workers=1"]
    dying = (
        "import os, signal, sys\n"
        "from torch.utils.data import get_worker_info\n"
        "from vlbench.data import batch_sampler\n"
        "real = batch_sampler.StepDataset.load_row\n"
        "def load_row(self, row, *opened):\n"
        "    if get_worker_info() and row.stream_index[0] >= 8:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, row, *opened)\n"
        "batch_sampler.StepDataset.load_row = load_row\n"
        "from vlbench.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", dying, *words]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == 1 and len(killed.stderr.splitlines()) == 1
    assert "killed by signal: Killed" in killed.stderr and "lower data.workers" in killed.stderr
    assert main(words) == 0
    assert_same_weights(whole, run)


def test_metrics_beyond_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    rest = "0.5,,0.1,1.0,2.0,3.0,3.0,4.0,0.1,,7,5.0"
    lines = [f"{stage},{step},{rest}" for stage in STEPS for step in (1, 2)]
    metrics.write_text("\n".join([",".join(METRIC_COLUMNS), *lines, "chat,3,0."]))
    truncate_metrics(metrics, list(STEPS), "align_448", 1)
    assert metrics.read_text().split() == [",".join(METRIC_COLUMNS), *lines[:3]]


def test_a_run_of_another_recipe_is_refused_with_the_keys_that_differ(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, f"run={whole}", "seed=1", "stages.chat.grad_clip=0.7"]) == 2
    said = capsys.readouterr().err
    assert "seed" in said and "stages.chat.grad_clip" in said and len(said.splitlines()) == 1


def test_a_loss_that_is_not_finite_is_skipped_named_and_ends_the_run_in_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlbench.model.vlm import VLM

    forward = VLM.forward

    def broken(self: VLM, batch: object) -> object:
        out = forward(self, batch)
        if out.loss_sum is not None and self.connector.training and out.loss_sum.requires_grad:
            out.loss_sum = out.loss_sum * float("nan")
        return out

    monkeypatch.setattr(VLM, "forward", broken)
    words = [*SHORT, f"run={tmp_path / 'nan'}", "trainer.max_nonfinite_steps=2"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "step 1: loss is not finite, step skipped; samples: " in said
    assert "2 steps in a row" in said
    reason = said.splitlines()[-1].removeprefix("vlbench: ")
    assert RunFolder(tmp_path / "nan").read_divergence() == reason
    short = ["stages.align_224.steps=1", f"run={tmp_path / 'short'}"]
    words = [word for word in SHORT if not word.startswith("stages.align_224.steps")]
    assert main([*words, *short]) == 2  # a stage of which nothing was learned is none
    assert "1 step, up to step 1; no weight had changed by then" in capsys.readouterr().err
    monkeypatch.setattr(VLM, "forward", forward)
    assert main([*words, *short]) == 0  # it is tried again, and nothing says that it diverged
    assert not RunFolder(tmp_path / "short").read_divergence()


def test_a_dry_run_does_one_step_of_every_stage_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in STEPS)
    assert not list(tmp_path.iterdir())


def test_checkpointing_changes_nothing_but_memory(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "recomputed"
    assert main([*SHORT, f"run={run}", "activation_checkpointing=full"]) == 0
    ours, theirs = final_weights(whole), final_weights(run)
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], atol=1e-4), key


def test_stage_runner_makes_one_trainer_to_learn_its_device(monkeypatch):
    made = []

    def counted_trainer(*args):
        made.append(args)
        return build_trainer(*args)

    monkeypatch.setattr(lightning_trainer, "build_trainer", counted_trainer)
    runner = StageRunner.from_recipe(load_recipe(["recipe=yivl_llava"]))
    assert runner.device == runner.device
    assert len(made) == 1
