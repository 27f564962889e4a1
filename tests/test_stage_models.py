"""Which model several processes train in which stage: of one checkpoint, and one at a time."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from forked_processes import run_in_processes

from vlbench.distributed import collectives
from vlbench.train import checkpoint_files, fit
from vlbench.train.callbacks import GracefulStop
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.run_folder import RunFolder

STEPS = 4


class Model:
    """A model that is part of a cycle of references, as sharded ones are."""

    def __init__(self, source: Path | None) -> None:
        self.source, self.myself = source, self
        self.model = self.weight_origins = None
        self.processor = SimpleNamespace(
            with_decoding=lambda *_: self.processor, transform=SimpleNamespace(can_draft=False)
        )

    def set_image_size(self, _: int) -> None:
        """Resize nothing."""


def train_run(
    folder: Path, seen: list[RunPosition], graceful_stop: GracefulStop
) -> list[tuple[int, str, int]]:
    """Train two stages of a run whose checkpoints are `seen` to be there.

    Return for each stage its first step, the checkpoint that its model is of, and how many models
    of earlier stages were in memory when it was loaded.
    """
    run, trained, models = RunFolder(folder), [], []

    def load(source: Path | None, *_: Any, **__: Any) -> Model:
        alive = sum(model() is not None for model, _ in models)
        model = Model(source)
        models.append((weakref.ref(model), alive))
        return model

    def train_stage(self: Any, vlm: Model, stage_run: Any, steps_done: int) -> None:
        trained.append((steps_done, vlm.source.name if vlm.source else "", models[-1][1]))

    stages = [
        SimpleNamespace(
            name=name, stage_index=index, total_steps=STEPS, stage=SimpleNamespace(image_size=8)
        )
        for index, name in enumerate(("align", "chat"))
    ]
    runner = SimpleNamespace(is_sharded=True)
    config = SimpleNamespace(init=None, seed=0, draft_decoding=False, apply_exif=False)
    training = fit.RunTraining(runner, config, None, run, stages, graceful_stop)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (fit, "load_checkpoint", load),
            (fit, "check_four_bit_stages", lambda *_: None),
            (fit, "check_trainable_stage", lambda *_: None),
            (fit.run_report, "show_weight_origins", lambda *_: None),
            (fit.run_report, "show_inputs", lambda *_: None),
            (fit.RunTraining, "train_stage", train_stage),
            (RunFolder, "record_weight_origins", lambda *_: None),
            (checkpoint_files, "list_positions", lambda _: seen),
        ):
            stack.enter_context(patch.object(target, name, value))
        training.train_stages()
    return trained


def test_all_processes_go_on_from_the_checkpoint_that_the_first_one_sees(tmp_path):
    """Another machine may see a folder on a network file system as it was a minute ago."""
    newest, older = RunPosition(0, "align", 3), RunPosition(0, "align", 2)

    def train_as(rank: int) -> list[tuple[int, str, int]]:
        return train_run(tmp_path, [older] if rank else [older, newest], GracefulStop())

    first, second = run_in_processes(train_as)
    assert first == second
    names = [newest.folder_name, RunPosition(0, "align", STEPS).folder_name]
    assert [(steps, name) for steps, name, _ in first] == [(3, names[0]), (0, names[1])]


def test_a_stop_of_one_process_while_the_model_is_loaded_ends_all_before_a_step(tmp_path):
    def train_as(rank: int) -> tuple[list[tuple[int, str, int]], str]:
        graceful_stop = GracefulStop()
        graceful_stop.stop_reason = "SIGTERM" if rank else ""
        trained = train_run(tmp_path, [RunPosition(0, "align", 3)], graceful_stop)
        return trained, graceful_stop.stop_reason

    assert run_in_processes(train_as) == [([], "SIGTERM")] * 2


def test_a_sharded_model_is_gone_before_that_of_the_next_stage_is_loaded(tmp_path):
    def train_as(_: int) -> list[tuple[int, str, int]]:
        assert collectives.is_distributed()
        return train_run(tmp_path, [RunPosition(0, "align", 3)], GracefulStop())

    assert [alive for _, _, alive in run_in_processes(train_as, 1)[0]] == [0, 0]
