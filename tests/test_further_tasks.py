"""What runs were asked beside their own questions, in the report: paired, tested, never mixed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_html_report import text_of
from test_report_command import run

from vlbench.__main__ import main
from vlbench.compare.report.analysis import ComparisonResult, analyze_runs
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.html_report import render_html
from vlbench.compare.report.json_report import render_json
from vlbench.compare.report.markdown_report import render_markdown
from vlbench.compare.report.pair_families import name_significant
from vlbench.compare.report.paired_statistics import RowStatistics, holm_correction
from vlbench.text_files import format_json_lines

LINEAR = "connector.name=linear"
LAST, EARLIER = "2-chat-000450", "1-align_448-000100"
MMMU = {"task": "mmmu", "split": "val", "protocol": "yi", "revision": "sha256 1", "batch": 16}
SUBJECTS = ("Art", "Math", "History")


def finish(folder: Path) -> Path:
    """Give a made run its last checkpoint, and one before."""
    for number, name in enumerate((EARLIER, LAST), 1):
        position = {"stage": number, "name": name.split("-")[1], "step": int(name.split("-")[2])}
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "position.json").write_text(json.dumps(position))
    return folder


def write_eval(
    folder: Path, settings: dict[str, Any], lines: Iterable[dict[str, Any]], checkpoint: str = LAST
) -> Path:
    """Write into a run what `eval` writes."""
    out = folder / "eval" / checkpoint / f"{settings['task']}-{settings.get('protocol', 'x')}"
    out.mkdir(parents=True)
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "scored.jsonl").write_text(format_json_lines(lines))
    (out / "scores.json").write_text(json.dumps({"seed": 42}))
    return out


def answer_mmmu(chance: float, seed: object, count: int = 120, start: int = 0) -> list[dict]:
    rng = random.Random(str(seed))
    return [
        {
            "id": f"validation_{number}",
            "type": ("multiple-choice", "open")[number % 4 == 0],
            "subject": SUBJECTS[number % 3],
            "picture": f"picture {number // 2}",
            "correct": rng.random() < chance,
        }
        for number in range(start, start + count)
    ]


def add_unseen(folder: Path, chance: float) -> None:
    rng = random.Random(str(folder))
    with (folder / "answers.jsonl").open("a") as file:
        for number in range(80):
            one = {"set": "unseen", "id": f"u{number}", "type": "shape", "language": "en"}
            file.write(json.dumps({**one, "correct": rng.random() < chance}) + "\n")


def make_runs(home: Path, seeds: int = 3) -> dict[str, list[Path]]:
    """Make two rows: llava_mlp is better on its own questions, and at MMMU much better."""
    rows: dict[str, list[Path]] = {"llava_mlp": [], "linear": []}
    for seed in range(seeds):
        rows["llava_mlp"].append(finish(run(home / f"llava/{seed}", 0.9, seed)))
        rows["linear"].append(finish(run(home / f"linear/{seed}", 0.6, seed, LINEAR)))
    return rows


def compare(rows: dict[str, list[Path]]) -> ComparisonResult:
    return analyze_runs([load_finished_run(folder) for group in rows.values() for folder in group])


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> ComparisonResult:
    rows = make_runs(tmp_path_factory.mktemp("runs"))
    for name, chance in (("llava_mlp", 0.8), ("linear", 0.3)):
        for seed, folder in enumerate(rows[name]):
            write_eval(folder, MMMU, answer_mmmu(chance, (name, seed)))
            add_unseen(folder, 0.5)
    return compare(rows)


def test_tasks_are_paired_with_the_statistics_of_the_main_outcome(findings):
    unseen, mmmu = findings.tasks
    assert unseen.title == "unseen pairs" and mmmu.title == "mmmu val, protocol yi"
    scores = np.array(
        [
            [[line["correct"] for line in answer_mmmu(chance, (name, seed))] for seed in range(3)]
            for name, chance in (("llava_mlp", 0.8), ("linear", 0.3))
        ]
    )
    clusters = np.arange(120) // 2
    expected = RowStatistics(scores, clusters)
    assert [row.name for row in mmmu.rows] == ["llava_mlp", "linear"]
    for number, row in enumerate(mmmu.rows):
        found = (row.score, row.interval_low, row.interval_high)
        assert found == pytest.approx(expected.accuracy_interval(number))
    (pair,) = mmmu.pairs
    assert pair.difference.p_value == pytest.approx(expected.difference(0, 1).p_value)
    assert pair.is_significant and not unseen.pairs[0].is_significant
    assert mmmu.cluster_count == 60 and "60 pictures, the unit" in mmmu.scope_sentence


def test_each_family_is_corrected_over_its_own_tests(findings):
    tasks = [task.pairs[0] for task in findings.tasks]
    corrected = holm_correction([pair.difference.p_value for pair in tasks])
    assert [pair.corrected_p for pair in tasks] == corrected and tasks[0].pair_count == 2
    (main_pair,) = findings.pairs
    assert main_pair.pair_count == 1  # as if nothing else had been asked
    for groups, count in ((findings.question_groups, 4), (findings.tasks[1].groups, 5)):
        pairs = [pair for group in groups for pair in group.pairs]
        expected = holm_correction([pair.difference.p_value for pair in pairs])
        assert [pair.corrected_p for pair in pairs] == expected and len(pairs) == count
        assert all(pair.difference.uncertainty.pair_count == count for pair in pairs)
    assert {group.kind for group in findings.tasks[1].groups} == {"type", "domain"}
    assert findings.tasks[0].groups == []  # one kind is all questions again


def test_all_forms_of_the_report_hold_the_tasks(findings):
    text, seen = render_markdown(findings), text_of(render_html(findings))
    made = json.loads(render_json(findings))
    assert text.index("## Differences") < text.index("## Further tasks")
    for cell in re.findall(r"[^|\n]+", text.replace("`", "")):
        cell = cell.strip().removeprefix("- ")
        if cell and not re.fullmatch(r"[-:]+|s|unseen|shuffled|blank|#.*|What differs:", cell):
            assert cell in seen, cell
    assert "mmmu val, protocol yi (120)" in seen and "llava_mlp over linear by" in seen
    assert "over one family of tests at a time" in seen and "Further tasks" in seen
    task = made["tasks"][1]
    assert task["task"] == "mmmu val, protocol yi" and task["pairs"][0]["more_than_chance"]
    assert task["rows"][0]["score"] == findings.tasks[1].rows[0].score
    assert made["pairs"][0]["p_corrected"] == findings.pairs[0].corrected_p
    assert {kind["name"] for kind in made["kinds"]} == {"shape", "colour", "en", "zh"}


def test_a_cell_names_few_pairs_and_counts_the_others(findings):
    (pair,) = findings.tasks[1].pairs
    labels = {"llava_mlp": "A", "linear": "B"}
    one = name_significant([pair], labels)
    assert one.startswith("A over B by ") and name_significant([pair] * 5, labels).count(one) == 5
    assert name_significant([pair] * 9, labels).endswith(f"{one}; 5 more")
    assert name_significant(findings.tasks[0].pairs, labels) == "none"


def test_the_verb_writes_json(tmp_path, capsys):
    run(tmp_path / "a", 0.9, 0)
    assert main(["report", str(tmp_path), f"out={tmp_path / 'r.json'}"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["name"] == "llava_mlp"
    assert "Further tasks" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "checkpoint", "sentence"),
    [
        ({"protocol": "lmms"}, LAST, "protocol is yi for llava_mlp, lmms for linear"),
        ({"revision": "sha256 2"}, LAST, "revision is sha256 1 for llava_mlp, sha256 2 for linear"),
        ({"template": "chatml"}, LAST, "template is none for llava_mlp, chatml for linear"),
        ({}, EARLIER, f"checkpoint is last for llava_mlp, {EARLIER} for linear"),
    ],
)
def test_what_was_asked_in_another_way_is_not_paired_and_one_line_says_why(
    changes, checkpoint, sentence, tmp_path
):
    rows = make_runs(tmp_path, 1)
    write_eval(rows["llava_mlp"][0], MMMU, answer_mmmu(0.8, 1))
    write_eval(rows["linear"][0], MMMU | changes, answer_mmmu(0.8, 2), checkpoint)
    found = compare(rows)
    assert found.tasks == []
    assert found.task_remarks == [
        f"mmmu val is not compared, as the rows were not asked alike: {sentence}."
    ]
    assert sentence in render_markdown(found)
    if checkpoint == EARLIER:
        assert sentence in text_of(render_html(found))


def test_last_checkpoints_of_different_names_correspond(tmp_path):
    rows = make_runs(tmp_path, 1)
    for folder in (rows["linear"][0] / "checkpoints").iterdir():
        if folder.name == LAST:
            folder.rename(folder.with_name("2-chat-000900"))
            position = {"stage": 2, "name": "chat", "step": 900}
            (folder.with_name("2-chat-000900") / "position.json").write_text(json.dumps(position))
    write_eval(rows["llava_mlp"][0], MMMU, answer_mmmu(0.8, 1))
    write_eval(rows["linear"][0], MMMU, answer_mmmu(0.8, 2), "2-chat-000900")
    assert [task.title for task in compare(rows).tasks] == ["mmmu val, protocol yi"]


def test_both_ways_of_asking_have_sections_of_their_own(tmp_path):
    rows = make_runs(tmp_path, 1)
    for name, group in rows.items():
        write_eval(group[0], MMMU, answer_mmmu(0.8, name))
        write_eval(group[0], MMMU | {"protocol": "raw"}, answer_mmmu(0.2, name))
    found = compare(rows)
    assert [task.title for task in found.tasks] == [
        "mmmu val, protocol raw",
        "mmmu val, protocol yi",
    ]
    assert found.task_remarks == [] and found.tasks[0].matched.remarks == []


def test_questions_of_another_exam_under_the_same_ids_are_left_out(tmp_path):
    rows = make_runs(tmp_path, 1)
    for row, (folder,) in rows.items():
        with (folder / "answers.jsonl").open("a") as file:
            for number in range(40):
                truth = row if number < 10 else "red"
                one = {"set": "unseen", "id": f"u{number}", "type": "shape", "language": "en"}
                file.write(json.dumps({**one, "truth": truth, "correct": number % 2 == 0}) + "\n")
    (task,) = compare(rows).tasks
    assert task.matched.questions == [f"u{number}" for number in range(10, 40)]
    assert task.matched.remarks == [
        "10 questions left out: under the same id the true answer, text or picture differs from "
        "run to run."
    ]


def test_questions_that_one_row_was_not_asked_are_counted_named_and_left_out(tmp_path):
    rows = make_runs(tmp_path, 2)
    for seed in range(2):
        write_eval(rows["llava_mlp"][seed], MMMU, answer_mmmu(1.0, 1, count=100))
        write_eval(rows["linear"][seed], MMMU, answer_mmmu(1.0, 1, count=100, start=5))
    (task,) = compare(rows).tasks
    assert len(task.matched.questions) == 95 and task.rows[0].score == 1.0
    assert task.matched.remarks == [
        "10 questions not put to every run are left out (validation_0, validation_1, "
        "validation_2 and 7 more); not asked: 5 of llava_mlp, 5 of linear."
    ]


def test_rows_and_seeds_that_were_not_asked_are_named(tmp_path):
    rows = make_runs(tmp_path, 2)
    rows["avgpool"] = [finish(run(tmp_path / "avgpool", 0.5, 0, "connector.name=avgpool"))]
    rows["avgpool"] += [finish(run(tmp_path / "avgpool1", 0.5, 1, "connector.name=avgpool"))]
    for name in ("llava_mlp", "linear"):
        write_eval(rows[name][0], MMMU, answer_mmmu(0.5, name))
    write_eval(rows["linear"][1], MMMU, answer_mmmu(0.5, 3))
    found = compare(rows)
    (task,) = found.tasks
    assert task.matched.remarks == [
        "avgpool was not asked.",
        "Seeds that not every row was asked with are left out: 1 of linear.",
    ]
    assert task.matched.seeds == [0] and len(task.rows) == 2
    line = next(one for one in render_markdown(found).splitlines() if one.startswith("| mmmu"))
    assert len(line.split("|")) == 8 and "|  |" in line  # avgpool has an empty cell


def test_answers_may_lie_in_the_folder_of_all_answers_itself(tmp_path):
    rows = make_runs(tmp_path, 1)
    for runs in rows.values():
        out = write_eval(runs[0], MMMU, answer_mmmu(0.5, runs[0].parent.name))
        for file in list(out.iterdir()):  # as of `eval out=RUN/eval`
            file.rename(runs[0] / "eval" / file.name)
    (task,) = compare(rows).tasks
    assert len(task.rows) == len(rows)


def test_what_is_unfinished_withheld_torn_or_asked_before_is_said(tmp_path):
    rows = make_runs(tmp_path, 1)
    folder = rows["llava_mlp"][0]
    lines = answer_mmmu(0.5, 1)
    (write_eval(folder, MMMU, lines) / "scored.jsonl").unlink()
    withheld = write_eval(folder, MMMU | {"protocol": "raw"}, lines)
    (withheld / "scored.jsonl").unlink()
    (withheld / "submission.json").write_text("{}")
    torn = write_eval(folder, MMMU | {"protocol": "lmms"}, [{"id": "a"}])
    write_eval(folder, {"task": "own"}, lines)
    found = compare(rows)
    assert found.tasks == [] and len(found.task_remarks) == 4
    said = "\n".join(found.task_remarks)
    assert "not all questions are answered; the same eval goes on." in said
    assert "the true answers are withheld" in said
    assert f"{torn / 'scored.jsonl'}: holds no scored answers; it is left out." in said
    assert "asked again of the runs' own questions is not compared again" in said


def test_answers_of_another_model_are_not_taken_for_the_runs(tmp_path):
    """`eval model=OTHER out=RUN/eval/x`: the settings name the model, wherever answers lie."""
    rows = make_runs(tmp_path, 1)
    (folder,), (other,) = rows["llava_mlp"], rows["linear"]
    mine = {**MMMU, "model": f"before/it/moved/{LAST}"}
    write_eval(folder, mine, answer_mmmu(0.7, 1), "tried")
    write_eval(other, {**MMMU, "model": f"{folder}/checkpoints/{LAST}"}, answer_mmmu(0.7, 1))
    found = compare(rows)
    assert found.tasks == []
    told, _ = found.task_remarks
    assert f"eval asked another model, {folder}/checkpoints/{LAST}; it is left out" in told
    write_eval(other, {**MMMU, "model": f"{other}/checkpoints/{LAST}"}, answer_mmmu(0.9, 1), "a")
    (task,) = compare(rows).tasks
    assert task.title == "mmmu val, protocol yi" and len(task.rows) == 2
    copies = {}
    for name, runs in rows.items():
        shutil.copytree(runs[0], tmp_path / "copies" / name)
        copies[name] = [tmp_path / "copies" / name]
    (task,) = compare(copies).tasks
    assert len(task.rows) == 2


def test_of_answers_to_the_same_task_the_most_count(tmp_path):
    rows = make_runs(tmp_path, 1)
    for name, (folder,) in rows.items():
        out = write_eval(folder, MMMU, answer_mmmu(0.7, name))
        again = out.parents[1] / "tried"  # eval out=RUN/eval/tried limit=20, and nothing else
        shutil.copytree(out, again)
        (again / "scored.jsonl").write_text(format_json_lines(answer_mmmu(0.7, name, 20)))
    found = compare(rows)
    (task,) = found.tasks
    assert len(task.matched.questions) == 120 and task.matched.remarks == []
    assert len(found.task_remarks) == 2 and "mmmu val is there twice" in found.task_remarks[0]


def conversation(name: str, score: float, *answers: str) -> dict[str, Any]:
    one = {"id": name, "set": "/data/vqa.json", "type": "", "language": "en"}
    return {**one, "answer": list(answers), "correct": score == 1.0, "vqa": score}


def test_files_are_scored_as_their_answers_are(tmp_path):
    rows = make_runs(tmp_path, 1)
    several = ("one", "one", "two", "two")
    asked = [conversation("7/1", 1 / 3, *several), conversation("7/3", 1.0, *several)]
    settings = {"task": "llava_json", "revision": "sha256 1"}
    for folder in (group[0] for group in rows.values()):
        write_eval(folder, settings, asked)
        alone = [{**conversation("x/1", 1.0, "a"), "set": "a.json", "correct": False}]
        write_eval(folder, settings | {"protocol": "other"}, alone)
    tasks = {task.title: task for task in compare(rows).tasks}
    vqa, exact = tasks["vqa.json"], tasks["a.json, protocol other"]
    assert vqa.rows[0].score == pytest.approx(2 / 3) and exact.rows[0].score == 0
    assert vqa.matched.settings["score"] == "VQA accuracy"
    assert exact.matched.settings["score"] == "exact match"
    assert vqa.cluster_count == 1  # one conversation


def test_one_row_alone_has_its_scores(tmp_path):
    folder = finish(run(tmp_path / "a", 0.5, 0))
    write_eval(folder, MMMU, answer_mmmu(0.5, 1))
    found = analyze_runs([load_finished_run(folder)])
    assert found.tasks[0].rows[0].name == "llava_mlp" and found.tasks[0].pairs == []
    assert "mmmu val, protocol yi (120)" in text_of(render_html(found))
    assert "more than chance" not in render_markdown(found)
