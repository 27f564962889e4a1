"""`vlbench.fit` from a program: keys become a recipe, and the process stays as it was."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

import vlbench
from vlbench.config.schema import TrainerConfig
from vlbench.distributed import process_group
from vlbench.errors import UserError
from vlbench.python_fit import _override_words

STAGES = {name: {"steps": 1, "global_batch_size": 2} for name in ("align_224", "align_448", "chat")}
LOG = {"questions": 2, "examples": 0, "tensorboard": False}


def test_keys_may_be_nested_or_have_dots() -> None:
    keys = {
        "from_": "chat",
        "stages": {"chat": {"steps": 2}},
        "log.tensorboard": False,
        "run": Path("a"),
    }
    assert list(_override_words(keys)) == [
        "from=chat",
        "stages.chat.steps=2",
        "log.tensorboard=false",
        "run=a",
    ]


def test_it_trains_twice_and_also_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    levels = {name: logging.getLogger(name).level for name in ("", "lightning.pytorch", "mine")}
    runs: list[vlbench.python_fit.TrainedRun | None] = []

    def train(seed: int) -> None:
        runs.append(vlbench.fit("yivl_llava", only="chat", stages=STAGES, log=LOG, seed=seed))

    train(0)
    thread = threading.Thread(target=train, args=(1,))
    thread.start()
    thread.join()
    assert [run and str(run.folder) for run in runs] == [
        f"runs/yivl_llava-tiny-{n}" for n in (1, 2)
    ]
    assert runs[0] and runs[0].results["questions"] == 2 and runs[0].results["loss"] > 0
    assert levels == {name: logging.getLogger(name).level for name in levels}
    logging.getLogger("mine").warning("still heard")
    assert "still heard" in caplog.text


def test_a_wrong_key_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.chat\.step.*steps"):
        vlbench.fit("yivl_llava", stages={"chat": {"step": 2}})


def test_several_processes_on_mps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="mps serves one"):
        process_group._check_gpus(TrainerConfig(devices=2))
    process_group._check_gpus(TrainerConfig(devices=2, accelerator="cpu"))


def test_tasks_of_slurm_that_see_one_gpu_each_are_told_how_to_ask_for_all(monkeypatch):
    monkeypatch.setattr(process_group.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(UserError, match="finds 1 GPU here.*--gpus-per-node, without --gpus-per-ta"):
        process_group._check_gpus(TrainerConfig(devices=8))
