"""`compare tasks=` and `eval task=` with words for single tasks: read, planned, asked, reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlbench.__main__ import main
from vlbench.command_line.task_words import parse_eval_words
from vlbench.compare.experiment import (
    compare_command,
    comparison_report,
    cost_estimate,
    task_jobs,
)
from vlbench.compare.experiment.grid import parse_grid
from vlbench.errors import UserError

MMMU = Path(__file__).parent / "goldens" / "evaluation" / "mmmu_tiny"


def test_words_of_a_task_are_for_it_alone():
    words = ["model=RUN", "task=mmmu,cmmmu, data/vqa.json", "batch=4", "limit=9"]
    words += ["task.mmmu.data=DIR", "task.cmmmu.protocol=raw", "task.vqa.images=PICTURES"]
    mmmu, cmmmu, file = parse_eval_words([*words, "task.vqa.limit=3"])
    assert (mmmu.task, mmmu.data, mmmu.protocol, mmmu.batch) == ("mmmu", "DIR", None, 4)
    assert (cmmmu.task, cmmmu.data, cmmmu.protocol, cmmmu.limit) == ("cmmmu", None, "raw", 9)
    assert (file.task, file.data, file.limit) == ("llava_json", "data/vqa.json", 3)
    assert file.images == "PICTURES" and mmmu.images is None
    (alone,) = parse_eval_words(["model=RUN", "data=a.json"])
    assert (alone.task, alone.data) == ("llava_json", "a.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=mmmu", "task.mmu.data=x"], "'task.mmu.data=x': the tasks that are asked are mmmu."),
        (["task=mmmu", "task.mmmu.dta=x"], "Did you mean 'data'?"),
        (["task=mmmu", "task.data=x"], "is no task.NAME.KEY=VALUE"),
        (["task=mmmu", "task.mmmu.protocol=offical"], "task.mmmu.protocol must be"),
        (["task=mmmu", "task.mmmu.images=x"], "images= is for task=llava_json, not for mmmu"),
        (["task=a/v.json,b/v.json"], "two tasks are called v"),
        (["task=own,llava_json"], "task=llava_json needs data=FILE.json"),
        (["task=v.json,own", "data=x"], "data= and out= belong to one task"),
    ],
)
def test_mistakes_in_words_of_tasks_are_one_line(words, message):
    with pytest.raises(UserError) as caught:
        parse_eval_words(["model=RUN", *words])
    assert message in str(caught.value) and len(caught.value.lines) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=mmu"], "tasks is 'mmu'; known are mmmu, cmmmu, own, llava_json. Did you mean"),
        (["task=mmmu"], "Did you mean 'tasks'?"),
        (["tasks.mmmu.data=x"], "'tasks.mmmu.data=x' is for one of tasks=, which are not given"),
        (["tasks=mmmu", "tasks.mmmu.dta=x"], "Did you mean 'data'?"),
        (["tasks=llava_json"], "tasks=llava_json needs tasks.llava_json.data=FILE.json"),
        (["tasks=nowhere.json", "dry_run=true"], "nowhere.json: there is no such file"),
        (["tasks=mmmu", f"tasks.mmmu.data={MMMU}", "tasks.mmmu.split=vall"], "no split 'vall'"),
    ],
)
def test_mistakes_in_tasks_are_told_before_anything_runs(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "recipe=yivl_llava", "seeds=1", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_two_benchmarks_with_their_data_are_asked_in_one_call(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"model={model}", "task=mmmu,cmmmu", "limit=2", f"task.mmmu.data={MMMU}"]
    words += [f"task.cmmmu.data={MMMU.with_name('cmmmu_tiny')}", "task.cmmmu.protocol=raw"]
    assert main(["eval", *words]) == 0
    asked = sorted(path.name for path in (tmp_path / "evals" / model.name).iterdir())
    assert asked == ["cmmmu-val-raw", "mmmu-val-yi"]
    line = json.loads(
        (tmp_path / "evals" / model.name / asked[0] / "scored.jsonl").open().readline()
    )
    assert len(line["picture"]) == 16


@pytest.fixture
def comparison(model, tmp_path, monkeypatch) -> list[str]:
    """Words of a comparison whose one run is finished, and a file of two questions."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model.parent.parent, tmp_path / "c/yivl_llava/seed0")
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(2)]
    (tmp_path / "vqa.json").write_text(json.dumps(records))
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: {})
    monkeypatch.setattr(comparison_report, "REPORT_FILES", ("report.md", "report.json"))
    untrained = [f"stages.{stage}.steps=0" for stage in ("align_224", "align_448", "chat")]
    return ["compare", "recipe=yivl_llava", *untrained, "seeds=1", "run=c", "tasks=own,vqa.json"]


def ask_here(monkeypatch) -> list[str]:
    """Let jobs run in this process; return their titles as they come."""
    titles: list[str] = []

    def run_jobs(jobs, _slots, _is_ready, on_start, on_end):
        for job in jobs:
            titles.append(job.title)
            on_start(job)
            job.log_file.parent.mkdir(exist_ok=True)
            job.log_file.write_text("vlbench: the last line\n")
            on_end(job, main([job.verb, *job.overrides]))

    monkeypatch.setattr(task_jobs, "train_jobs", run_jobs)
    return titles


def test_runs_are_asked_once_and_the_report_has_it(comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0
    said = capsys.readouterr().out
    assert "every run is then asked llava_json-vqa (2): 2 questions to go" in said
    assert titles == ["yivl_llava, seed 0, tasks"]
    report = json.loads(Path("c/report.json").read_text())
    assert [task["task"] for task in report["tasks"]] == ["unseen pairs", "vqa.json"]
    assert "### vqa.json" in Path("c/report.md").read_text()
    assert report["tasks"][1]["pictures"] == 1  # two questions about one image
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0
    assert len(titles) == 1 and "vqa (2): 0 questions to go" in capsys.readouterr().out
    scored = next(Path("c").rglob("scored.jsonl"))
    scored.with_name("report.txt").unlink()  # as if it had been killed before its end
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0 and len(titles) == 2


def test_answers_of_an_earlier_checkpoint_are_not_those_of_the_run(comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0 and len(titles) == 1
    folder = next(Path("c").rglob("scored.jsonl")).parents[1]
    folder.rename(folder.with_name("0-align_224-000001"))  # asked while the run trained
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0 and len(titles) == 2
    assert folder.is_dir()


def test_a_file_with_brackets_in_its_name_is_asked_once(comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    Path("vqa.json").rename("vqa[1].json")
    words = [*comparison[:-1], "tasks=vqa[1].json"]
    assert main(words) == 0 and main(words) == 0 and len(titles) == 1


def test_runs_are_asked_again_with_blank_images(comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0 and len(titles) == 1
    words = [*comparison, "tasks.vqa.limit=2", "tasks.vqa.blank=true"]
    assert main(words) == 0 and len(titles) == 2
    assert next(Path("c").rglob("blank.jsonl")).read_text().count("\n") == 2
    assert main(words) == 0 and len(titles) == 2


@pytest.mark.parametrize("kept", ["", "first line", "all"])
def test_a_blank_pass_that_was_killed_goes_on(kept, comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    assert main([*comparison, "tasks.vqa.limit=2"]) == 0 and len(titles) == 1
    scores = next(Path("c").rglob("scores.json"))
    before = scores.read_text()
    words = [*comparison, "tasks.vqa.limit=2", "tasks.vqa.blank=true"]
    assert main(words) == 0 and "blank" in json.loads(scores.read_text())
    blank = scores.with_name("blank.jsonl")
    lines = blank.read_text().splitlines(keepends=True)
    blank.write_text("".join(lines[: {"": 0, "first line": 1, "all": 2}[kept]]))
    scores.write_text(before)  # the report is older as well
    assert main(words) == 0 and len(titles) == 3
    assert blank.read_text() == "".join(lines) and "blank" in json.loads(scores.read_text())
    assert main(words) == 0 and len(titles) == 3


def test_tasks_that_cannot_be_asked_are_named_and_fail_the_command(comparison, monkeypatch, capsys):
    titles = ask_here(monkeypatch)
    assert main(comparison) == 0
    Path("vqa.json").write_text(Path("vqa.json").read_text().replace("What?", "Which?"))
    assert main(comparison) == 1 and len(titles) == 2
    sentence = "yivl_llava, seed 0, tasks: not asked (the last line)."
    assert sentence in Path("c/report.md").read_text()
    assert sentence in capsys.readouterr().err


def test_finished_runs_that_a_command_does_not_name_are_named(comparison, monkeypatch, capsys):
    ask_here(monkeypatch)
    assert main(comparison) == 0 and "Not in this report" not in Path("c/report.md").read_text()
    for name in ("yivl_llava/seed1", "earlier/seed0"):
        shutil.copytree("c/yivl_llava/seed0", Path("c") / name)
    assert main(comparison) == 0
    told = "does not name their rows or seeds: earlier/seed0, yivl"
    assert told in Path("c/report.md").read_text().replace("\\", "")
    assert told in json.loads(Path("c/report.json").read_text())["notes"][-1]


def test_a_script_for_slurm_asks_what_is_trained(comparison, capsys):
    assert main([*comparison, "jobs=slurm"]) == 0
    assert "1 runs, one GPU each" in capsys.readouterr().out
    command = "vlbench eval model=c/yivl_llava/seed0 task=vqa.json ;;"
    assert Path("c/array.sh").read_text().count(command) == 1


def test_the_plan_says_what_tasks_cost(comparison, monkeypatch, capsys):
    shutil.rmtree("c")
    cost = {"seconds": 10.0, "memory": 10**9, "question_seconds": 30.0}
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: cost)
    assert main([*comparison, "dry_run=true"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "then asked" in line]
    assert lines == [
        "  every run is then asked llava_json-vqa (2): 2 questions to go, about 60 s in all if "
        "their answers are as short as those of the runs' own questions"
    ]
    assert not Path("c").exists()
    grid = parse_grid(comparison[1:])
    assert grid.tasks == "own,vqa.json" and task_jobs.make_eval_jobs(grid, []) == []
