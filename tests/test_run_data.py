"""A run that goes on has the data that it has trained on; other data are refused, or told."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from forked_processes import run_in_processes
from PIL import Image

from vlbench import fit_command
from vlbench.__main__ import main
from vlbench.compare.report.finished_runs import _load_versions
from vlbench.config import recipe as recipes
from vlbench.data import data_checksums
from vlbench.errors import UserError
from vlbench.train import run_data
from vlbench.train.fit import check_and_open_run
from vlbench.train.run_folder import RunFolder
from vlbench.train.stage_plan import StageRun, plan_stage_runs

RUN, STAGES = RunFolder(Path("run")), ("align_224", "chat")
WORDS = ["recipe=yivl_llava", "only=[align_224,chat]", "run=run", "data.val=val.json"]
WORDS += [f"stages.{name}.{key}" for name in STAGES for key in ("epochs=1", "steps=null")]
WORDS += [f"stages.{name}.global_batch_size=2" for name in STAGES]
TWO_FILES = ["data.train=align.json", "stages.chat.data.train=chat.json"]
TWO_FILES += ["stages.chat.data.val=val.json"]
ONE_FILE = ["data.train=align.json"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("a.png")
    for name in ("align", "chat", "val"):
        write(f"{name}.json", 8)


def write(name: str, count: int, word: str = "red") -> None:
    turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": word}]
    records = [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(count)]
    Path(name).write_text(json.dumps(records))


def start(*words: str) -> list[StageRun]:
    """Do what `fit` does before it trains."""
    recipe = recipes.load_recipe([*WORDS, *words])
    stage_runs = plan_stage_runs(recipe.selected_data, recipe.last_stage_data)
    with contextlib.ExitStack() as held_locks:
        check_and_open_run(recipe, stage_runs, held_locks)
    return stage_runs


def reach(stage: int, step: int) -> None:
    """Write the place of a checkpoint."""
    place = {"stage": stage, "name": STAGES[stage], "step": step}
    checkpoint = RUN.checkpoints_folder / f"{stage}-{STAGES[stage]}-{step:06d}"
    checkpoint.mkdir()
    (checkpoint / "position.json").write_text(json.dumps(place))


def recorded() -> dict[str, str]:
    return dict(json.loads(RUN.versions_file.read_text())["data"])


@pytest.mark.parametrize("count", [8, 4, 12])  # another text, a stage that looks done, a longer one
def test_a_run_does_not_go_on_with_other_data_than_it_trained_on(count):
    start(*ONE_FILE)
    before = recorded()["align.json"]
    reach(0, 2)
    write("align.json", count, "green")
    with pytest.raises(UserError) as refused:
        start(*ONE_FILE)
    [said] = refused.value.lines
    assert said.startswith("run=run would go on with other data: align.json had the checksum ")
    assert before[:12] in said and f"now, with {count} records" in said and "init=run" in said
    assert recorded()["align.json"] == before
    write("align.json", 8)
    assert [one.total_steps for one in start(*ONE_FILE)] == [4, 4]


def test_files_that_are_as_they_were_are_not_read_again(monkeypatch):
    start(*TWO_FILES)
    reach(0, 2)
    read: list[str] = []
    checksum_file = data_checksums._checksum_file

    def note_and_checksum(path: Path) -> str:
        read.append(path.name)
        return checksum_file(path)

    monkeypatch.setattr(data_checksums, "_checksum_file", note_and_checksum)
    start(*TWO_FILES)
    assert read == []
    os.utime("align.json", ns=(1, 1))  # as a copy has another time
    start(*TWO_FILES)
    assert read == ["align.json"]
    start(*TWO_FILES)
    assert read == ["align.json"]


def test_a_run_without_times_of_its_files_is_compared_by_what_they_hold():
    start(*ONE_FILE)
    versions = json.loads(RUN.versions_file.read_text())
    RUN.versions_file.write_text(json.dumps({"data": versions["data"]}))
    reach(0, 2)
    start(*ONE_FILE)
    write("align.json", 8, "green")
    with pytest.raises(UserError, match="would go on with other data: align.json"):
        start(*ONE_FILE)


@pytest.mark.parametrize("place", [(0, 4), (1, 2)])
def test_data_of_a_stage_that_is_done_may_change(place, capsys):
    start(*TWO_FILES)
    before = recorded()
    reach(*place)
    write("align.json", 20)
    assert [one.total_steps for one in start(*TWO_FILES)] == [4, 4]
    assert "align.json: holds other data" in capsys.readouterr().err
    assert recorded() == before  # what was trained on


@pytest.mark.parametrize("shards", [2, 1])
def test_a_stage_does_not_go_on_in_another_order(shards):
    assert main(["pack", "data=align.json", "out=shards", f"samples={8 // shards}"]) == 0
    words = ["data.train=shards", *TWO_FILES[1:]]
    start(*words)
    versions = json.loads(RUN.versions_file.read_text())
    assert versions["stage_orders"] == dict.fromkeys(STAGES, run_data.ORDER_VERSION)
    del versions["stage_orders"]  # as of a version before
    RUN.versions_file.write_text(json.dumps(versions))
    reach(0, 2)
    with pytest.raises(UserError) if shards > 1 else contextlib.nullcontext() as refused:
        start(*words)
    if shards > 1:
        assert "run=run is in stage align_224" in str(refused.value)
        assert "in another order than the one that began it: shards." in str(refused.value)
    reach(0, 4)  # the stage is done, and the next has the order of today
    start(*words)
    assert json.loads(RUN.versions_file.read_text())["stage_orders"]["chat"] == 2
    reach(1, 2)
    start(*words)


def test_data_that_nothing_was_trained_on_are_recorded_anew(capsys):
    start(*TWO_FILES)
    before = recorded()
    reach(0, 2)
    bad = {"id": "0", "reason": "torn", "record": 1}
    lines = [json.dumps({**bad, "source": name}) for name in ("align.json", "chat.json")]
    RUN.quarantine_file.write_text("\n".join(lines) + "\n")
    for name in ("chat", "val"):
        write(f"{name}.json", 20, "green")
    assert [one.total_steps for one in start(*TWO_FILES)] == [4, 10]
    said = capsys.readouterr().err
    assert all(f"{name}.json: holds other data" in said for name in ("chat", "val"))
    changed = {name for name, checksum in recorded().items() if checksum != before[name]}
    assert changed == {"chat.json", "val.json"}
    assert [json.loads(line)["source"] for line in RUN.quarantine_file.open()] == ["align.json"]


def test_data_of_a_stage_that_is_done_do_not_change_under_a_later_one():
    start(*ONE_FILE)
    reach(0, 4)
    write("align.json", 8, "green")
    with pytest.raises(UserError, match="would go on with other data: align.json"):
        start(*ONE_FILE)


def test_before_its_first_checkpoint_a_run_takes_the_data_that_are_there():
    start(*ONE_FILE)
    before = recorded()["align.json"]
    write("align.json", 12)
    assert [one.total_steps for one in start(*ONE_FILE)] == [6, 6]
    assert recorded()["align.json"] != before


def test_all_processes_train_the_steps_that_the_first_one_reads(tmp_path):
    """Another machine may see a folder on a network file system as it was a minute ago."""
    align, _ = start(*ONE_FILE)
    reach(0, 1)
    RUN.record_versions({"stage_steps": {"align_224": 3}})
    (tmp_path / "stale").mkdir()

    def restore(rank: int) -> int:
        run_data.sync_stage_steps(RunFolder(Path("stale" if rank else "run")), [align])
        return align.total_steps

    assert run_in_processes(restore) == [3, 3]


def test_all_processes_show_a_run_that_the_first_one_sees_finished(monkeypatch):
    recipe = recipes.load_recipe([*WORDS, *ONE_FILE])
    run, shown = RunFolder(Path("run")), []

    def show(_: RunFolder) -> int:
        shown.append(1)
        return 0

    def finish(rank: int) -> tuple[int, int]:
        monkeypatch.setattr(fit_command, "check_and_open_run", lambda *_: run)
        monkeypatch.setattr(RunFolder, "is_finished", rank == 0)
        monkeypatch.setattr(fit_command.run_report, "show_results", show)
        code, _ = fit_command._fit_recipe(recipe, contextlib.ExitStack())
        return code, len(shown)

    assert run_in_processes(finish) == [(0, 1), (0, 0)]


def test_what_is_recorded_of_data_is_no_version_of_a_library():
    start(*ONE_FILE)
    versions = _load_versions(RUN.folder, {})
    assert not versions.keys() & {"data", "data_stamps", "stage_steps"} and "torch" in versions
