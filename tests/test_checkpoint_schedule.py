"""When checkpoints are written: often, but never so that a run does little else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vlbench.train import callbacks
from vlbench.train.callbacks import CheckpointCallback, GracefulStop


@pytest.mark.parametrize(("slow", "share"), [(0.5, 0.01), (30.0, 0.05)])
def test_saving_takes_a_small_share_of_the_time(slow, share, monkeypatch):
    now, saved = SimpleNamespace(time=0.0), []

    def write(folder, position, *_):
        saved.append(position.step)
        now.time += slow
        return SimpleNamespace(is_written=True, finish_writing=lambda: None)

    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(callbacks.checkpoint_files, "CheckpointWriter", write)
    monkeypatch.setattr(callbacks.checkpoint_pruning, "prune_checkpoints", lambda *_: None)
    run = SimpleNamespace(checkpoints_folder=None, recipe_file=None)
    saving = CheckpointCallback(
        None, run, (0, "chat"), [], 60.0, 2, GracefulStop(), lambda: now.time
    )
    trainer = SimpleNamespace(optimizers=[None])
    training = SimpleNamespace(total_steps=10**6, steps_done=0, trainer=trainer, seen={}, vlm=None)
    while training.steps_done < 20_000:  # of a second each
        now.time += 1.0
        training.steps_done += 1
        saving.on_step_end(training, None)
    assert saved[0] <= 61 and len(saved) > 20
    assert slow * len(saved) / now.time <= share


@pytest.mark.parametrize("beside", [True, False])
def test_weights_are_copied_at_once_where_callbacks_may_change_them(beside, monkeypatch):
    events = []
    writer = SimpleNamespace(
        is_written=False,
        wait_until_copied=lambda: events.append("copied"),
        finish_writing=lambda: events.append("finished"),
    )
    monkeypatch.setattr(callbacks.checkpoint_files, "CheckpointWriter", lambda *_: writer)
    monkeypatch.setattr(callbacks.checkpoint_pruning, "prune_checkpoints", lambda *_: None)
    run = SimpleNamespace(checkpoints_folder=None, recipe_file=None)
    saving = CheckpointCallback(
        None, run, (0, "chat"), [], 60.0, 2, GracefulStop(), lambda: 0.0, beside
    )
    trainer = SimpleNamespace(optimizers=[None])
    training = SimpleNamespace(total_steps=2, steps_done=1, trainer=trainer, seen={}, vlm=None)
    saving.on_step_end(training, None)
    assert events == ([] if beside else ["copied"])
    saving.on_before_optimizer_step(trainer, None, None)
    assert events[-1] == "copied" and "finished" not in events
    training.steps_done = 2
    saving.on_step_end(training, None)
    assert events[-1] == "finished" and saving.writer is None
