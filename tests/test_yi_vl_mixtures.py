"""Yi-VL's published mixtures on a few records of every source: check, three stages, a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from forked_command import run_command
from safetensors.torch import load_file
from yi_vl_miniature import STAGES, WORDS, write_data

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.data.batch_sampler import StepDataset
from vlbench.data.optimizer_step import StepPlan
from vlbench.train import checkpoint_files
from vlbench.train.stage_plan import plan_stage_runs

STEPS, RUNS = 4, ("whole", "killed")
FIT = [
    "fit",
    "recipe=yivl_llava",
    *WORDS,
    *(f"stages.{stage}.steps={STEPS}" for stage in STAGES),
    *(f"stages.{stage}.global_batch_size=4" for stage in STAGES),
    "trainer.checkpoint_every=0.001",
    "log.questions=2",
    "log.tensorboard=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands run in, with the published data in miniature."""
    folder = tmp_path_factory.mktemp("yi_vl")
    write_data(folder)
    return folder


def test_every_published_source_is_in_its_stage_with_its_share(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    recipe = recipes.load_recipe([*FIT[1:], "stages.chat.data.workers=1"])
    mixtures = {
        one.name: one.data for one in plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
    }
    assert list(mixtures["align_224"].epoch_shares) == [18]
    for name, count in (("align_448", 8), ("chat", 7)):
        mixture = mixtures[name]
        assert len(mixture.sources) == len(set(source.name for source in mixture.sources)) == count
        for epoch in range(2):
            positions = range(epoch * len(mixture), (epoch + 1) * len(mixture))
            drawn = [mixture.locate_sample(position) for position in positions]
            assert len(set(drawn)) == len(drawn) == sum(map(len, mixture.sources))
    asked = {mixtures["align_448"][position].turns[0].text for position in range(31)}
    assert "<image_placeholder>" not in asked  # a caption of LAION has a question here
    assert any("Describe the image in one sentence." in text for text in asked)


def test_check_tells_the_shares_of_a_mixture(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data)
    gqa, ocr, shards = "gqa:data/gqa", "ocr_vqa:data/ocr_vqa", "data/laion400m/*.tar"
    mix = f"[{{train: '{gqa}', weight: 3}}, {{train: '{ocr}'}}, {{train: {shards}, cap: 5}}]"
    assert main(["check", "recipe=yivl_llava", "only=chat", f"data.mix={mix}", "out=c"]) == 0
    said = capsys.readouterr().out
    assert f"{shards}: 5 of 18 records, 5 images" in said
    rows = {line.split()[-1]: line.split() for line in said.splitlines() if "%  " in line}
    samples = {name: (cells[0], float(cells[1])) for name, cells in rows.items()}
    assert samples == {gqa: ("6", 46.2), ocr: ("2", 15.4), shards: ("5", 38.5)}
    tokens = {name: int(cells[3].replace(",", "")) for name, cells in rows.items()}
    assert f"an epoch of the mixture: 13 samples, {sum(tokens.values()):,} tokens" in said
    lines = [line for line in said.splitlines() if line.startswith(f"  {gqa}:")]
    assert tokens[gqa] == 3 * int(lines[0].split(", ")[2].split()[0])


def kill_in_the_second_stage() -> None:
    """Let the process die without a word when it begins the third step of `align_448`."""
    plan_step = StepDataset.plan_step

    def dying(self: StepDataset, index: int) -> StepPlan:
        if len(self.mixture.sources) == 8 and index == STEPS - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plan_step(self, index)

    StepDataset.plan_step = dying  # type: ignore[method-assign]


@pytest.mark.slow
def test_the_three_stages_run_and_a_kill_in_the_second_changes_no_bit(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    assert main([*FIT, "run=whole"]) == 0
    died = run_command([*FIT, "run=killed"], data, prepare=kill_in_the_second_stage, timeout=120.0)
    assert died.code == -signal.SIGKILL, died.words
    killed = data / "killed/checkpoints"
    last = checkpoint_files.list_positions(killed)[-1]
    assert last.name == "align_448" and 0 < last.step < STEPS
    assert main(["fit", "run=killed"]) == 0
    ends = [checkpoint_files.list_positions(data / run / "checkpoints")[-1] for run in RUNS]
    assert ends[0] == ends[1] and (ends[0].name, ends[0].step) == ("chat", STEPS)
    whole, resumed = (
        load_file(data / run / "checkpoints" / ends[0].folder_name / "model.safetensors")
        for run in RUNS
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    logs = [(data / run / "metrics.csv").read_text().splitlines() for run in RUNS]
    assert [line.split(",")[:6] for line in logs[0]] == [line.split(",")[:6] for line in logs[1]]
