"""A comparison whose runs are made in this process, at once: what `compare` does around them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from vlbench.compare.experiment import cost_estimate, run_jobs
from vlbench.compare.experiment.run_jobs import TrainingJob
from vlbench.config import recipe as recipes
from vlbench.data.data_checksums import (
    CHECKSUMS_KEY,
    STAMPS_KEY,
    checksum_sources,
    stamp_sources,
)
from vlbench.data.data_sources import open_stage_sources
from vlbench.errors import UserError
from vlbench.train.run_folder import RunFolder, open_run

QUESTIONS = 40
ANSWER = {"set": "accuracy", "type": "shape", "language": "en"}


def finish_run(words: Sequence[str]) -> RunFolder:
    """Make the finished run that `fit` with these words would leave; half of its answers right."""
    recipe = recipes.load_recipe(list(words))
    with contextlib.ExitStack() as held_locks:
        run = open_run(recipe, held_locks)
    sources = [one for data in recipe.selected_data for one, _ in open_stage_sources(data)]
    run.record_versions(
        {CHECKSUMS_KEY: checksum_sources(sources), STAMPS_KEY: stamp_sources(sources)}
    )
    for number, name in enumerate(recipe.selected_stages):
        (run.checkpoints_folder / f"{number}-{name}-000002").mkdir(exist_ok=True)
    answers = [
        {**ANSWER, "id": f"q{number}", "correct": number % 2 == 0} for number in range(QUESTIONS)
    ]
    (run.folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)) + "\n")
    (run.folder / "metrics.csv").write_text("stage,step,loss,seconds\n")
    run.results_file.write_text(json.dumps({"accuracy": 0.5, "seconds": 1.0}))
    return run


class EndedProcess(NamedTuple):
    """A process that has ended."""

    exit_code: int

    def poll(self) -> int:
        """Return its exit code."""
        return self.exit_code


class FakeTraining:
    """In the place of the processes of `fit`: every run is finished when it begins."""

    def __init__(self) -> None:
        self.trained: list[Path] = []
        """Folders of the runs, in order."""
        self.after_run: Callable[[Path], object] = lambda _: None
        """Called with the folder of a run when it has ended."""

    def __call__(self, job: TrainingJob, _: Mapping[str, str]) -> EndedProcess:
        """Train."""
        try:
            folder = finish_run(job.overrides).folder
        except UserError as error:
            job.log_file.write_text(f"vlbench: {error}\n")
            return EndedProcess(2)
        self.trained.append(folder)
        self.after_run(folder)
        return EndedProcess(0)


@pytest.fixture
def training(tmp_path, monkeypatch) -> FakeTraining:
    """Let comparisons of this test train nothing, in a folder of their own."""
    fake = FakeTraining()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_jobs, "_launch_job", fake)
    monkeypatch.setattr(run_jobs, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    return fake
