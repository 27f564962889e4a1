"""What a report says about where information goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_command import run

from vlbench.__main__ import main
from vlbench.compare.report.analysis import analyze_runs
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.html_report import render_html
from vlbench.compare.report.information_loss import (
    LOSSES,
    KindInformation,
    LossCount,
    ShareEstimate,
    find_information_loss,
    losses_of_answers,
)

NEIGHBOURS = {"count": 10, "pictures": 300, "standard_error": 0.01, "chance": 0.03}


def add_probes(folder: Path, read: Callable[[int], list[int]], **changes: Any) -> None:
    """Give a run of 300 questions information probes, which read `read(number)`."""
    questions = [
        {"id": f"q{number}", "read": read(number), "control": [0, 0, number % 10 == 0]}
        for number in range(300)
    ]
    found = {
        "training_pictures": {"gist": 1000, "crowd": 400},
        "reads_answers": False,
        "questions": questions,
        "neighbours": {**NEIGHBOURS, "overlap": 0.5},
    }
    (folder / "information.json").write_text(json.dumps({**found, **changes}))


def of_folders(*folders: Path):
    return analyze_runs([load_finished_run(folder) for folder in folders])


def test_the_last_place_that_has_the_information_decides():
    read = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    correct = np.array([False] * 6 + [True])
    numbers = losses_of_answers(correct, read.astype(bool))
    assert [LOSSES[number] for number in numbers[:-1]] == [
        "not in the encoder",
        "lost in the connector",
        "lost in the language model",
        "there but not used",
        "lost in the language model",  # what is behind the connector was in the encoder
        "there but not used",
    ]
    assert numbers[-1] == -1


def test_wrong_answers_are_counted_by_row_and_kind(tmp_path):
    """All of them wrong: shapes (even numbers) are lost in one row's connector, else not used."""
    folders = [run(tmp_path / f"llava/{seed}", 0.0, seed) for seed in range(2)]
    folders += [
        run(tmp_path / f"linear/{seed}", 0.0, seed, "connector.name=linear") for seed in (0, 1)
    ]
    for folder in folders:
        has_lost = folder.parent.name == "linear"
        add_probes(folder, lambda n, lost=has_lost: [1, 0, 0] if lost and n % 2 == 0 else [1, 1, 1])
    information = find_information_loss(of_folders(*folders))
    rows = {row.row_name: row for row in information.rows}
    counts = {
        (name, kind.kind): [loss.answers for loss in kind.losses]
        for name, row in rows.items()
        for kind in row.kinds
    }
    assert counts["linear", "shape"] == [0, 300, 0, 0, 0]
    assert counts["linear", "colour"] == counts["llava_mlp", "colour"] == [0, 0, 0, 300, 0]
    assert counts["linear", "all"] == [0, 300, 0, 300, 0]
    everything = rows["linear"].kinds[0]
    assert everything.kind == "all" and everything.wrong_count == 600
    share = everything.losses[1].of_questions
    assert share.share == 0.5 and 0.4 < share.low < 0.5 < share.high < 0.6
    assert [one.share for one in everything.read] == [1.0, 0.5, 0.5]
    assert everything.by_chance == pytest.approx(0.1)
    overlap = rows["linear"].neighbours
    assert overlap.share == 0.5 and overlap.low < 0.48 and information.missing == {}


def test_what_is_not_attributed_is_counted_and_named(tmp_path, capsys):
    """Of 300 wrong answers 100 are not probed, and of 200 a probe is too weak for half."""
    folder = run(tmp_path / "llava", 0.0, 0)
    add_probes(folder, lambda number: [1, 0, 0])
    file = folder / "information.json"
    found = json.loads(file.read_text())
    for one in found["questions"][:100]:
        one["unsure"] = 1
    found["questions"] = found["questions"][:200]
    found["not_probed"] = {"the features are not finite": [f"q{n}" for n in range(200, 300)]}
    file.write_text(json.dumps(found))
    (row,) = find_information_loss(of_folders(folder)).rows
    everything = row.kinds[0]
    assert [loss.answers for loss in everything.losses] == [0, 100, 0, 0, 200]
    assert [one.share for one in everything.read] == [1.0, 0.0, 0.0]  # of what is probed
    assert sorted(row.not_attributed.values()) == [100, 100]
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "wrong answers that are not attributed: 100, as the features are not finite." in said
    assert (
        "wrong answers that are not attributed: 100, as the connector's tokens have no places"
        in said
    )


def test_probes_that_do_not_read_right_answers_are_doubted(tmp_path, capsys):
    """All answers are right, and behind the connector half of them are read."""
    folder = run(tmp_path / "llava", 1.0, 0)
    add_probes(folder, lambda number: [1, number % 4 < 2, 1])
    (row,) = find_information_loss(of_folders(folder)).rows
    assert row.kinds[0].read_of_right == (1.0, 0.5, 1.0) and not row.kinds[0].is_trusted
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "1.00 / 0.50 / 1.00" in said and "colour 50%: about 0 of 0" in said
    add_probes(folder, lambda number: [1, 1, 1])
    assert main(["report", str(folder)]) == 0
    assert "read only a part" not in capsys.readouterr().out


def test_what_weak_probes_may_have_missed_is_estimated():
    """Of right answers half are read; of wrong ones 10 are, so about 10 more were there."""
    share = ShareEstimate(0.5, 0.4, 0.6)
    losses = tuple(LossCount(count, share) for count in (5, 30, 4, 6, 0))
    kind = KindInformation("crowd", 300, (share,) * 3, (1.0, 0.5, 0.5), 0.0, 45, losses)
    assert not kind.is_trusted and kind.missed_count == 10
    few = KindInformation("crowd", 300, (share,) * 3, (), 0.0, 45, losses)
    assert few.is_trusted and few.missed_count == 0


def test_tables_are_in_both_reports(tmp_path, capsys):
    folders = [
        run(tmp_path / "llava", 0.5, 0),
        run(tmp_path / "linear", 0.2, 0, "connector.name=linear"),
    ]
    add_probes(folders[0], lambda number: [1, 1, number % 3 == 0])
    add_probes(folders[1], lambda number: [1, 0, 1], reads_answers=True)
    outputs = [f"out={tmp_path / name}" for name in ("report.html", "report.json")]
    assert main(["report", *map(str, folders), *outputs]) == 0
    text, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for shown in (text, page):
        assert "What the connector loses" in shown and "1,000 for gist, 400 for crowd" in shown
        assert "linear: image positions hold no visual tokens" in shown
        assert "colour (150)" in shown and "0.500 (0.480 to 0.520)" in shown
    line = next(one for one in text.splitlines() if one.startswith("| linear | all (300)"))
    assert "| 0 (0.0, 0.0 to" in line and line.count("|") == 9
    information = json.loads((tmp_path / "report.json").read_text())["information"]
    (told,) = [row for row in information["rows"] if row["name"] == "linear"]
    assert told["kinds"][0]["name"] == "all" and told["kinds"][0]["read"]["connector"]["share"] == 0
    assert told["neighbours"]["kept"]["share"] == 0.5 and information["missing"] == {}


def test_rows_without_probes_are_left_out_and_said(tmp_path, capsys):
    folders = [
        run(tmp_path / "llava", 0.5, 0),
        run(tmp_path / "linear", 0.2, 0, "connector.name=linear"),
    ]
    assert "What the connector loses" not in render_html(of_folders(*folders))
    assert "log.information_probes=true writes it" in render_html(of_folders(*folders))
    add_probes(folders[0], lambda number: [1, 1, 1])
    assert "linear has no information probes: no information.json" in render_html(
        of_folders(*folders)
    )
    add_probes(folders[1], lambda number: [1, 1, 1], left_out="the features are not finite")
    assert main(["report", *map(str, folders)]) == 0
    said = capsys.readouterr().out
    assert "linear has no information probes: the features are not finite." in said
    assert "| llava_mlp | all (300) |" in said and "| linear | all" not in said


@pytest.mark.parametrize(
    "changes", [{"questions": [{"id": "q1", "read": [1], "control": [0]}]}, {"neighbours": None}]
)
def test_a_file_that_is_no_result_of_probes_is_one_line(changes, tmp_path, capsys):
    folder = run(tmp_path / "llava", 0.5, 0)
    add_probes(folder, lambda number: [1, 1, 1], **changes)
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "information.json: holds no information probes" in said
    assert len(said.splitlines()) == 1


def test_why_no_run_could_be_probed_is_said(tmp_path, capsys):
    reason = "0 questions are about rendered scenes, 100 needed"
    folders = [run(tmp_path / name, 0.5, seed) for seed, name in enumerate("ab")]
    for folder in folders:
        add_probes(folder, lambda number: [1, 1, 1], left_out=reason)
    said = f"llava_mlp has no information probes: {reason}."
    page = render_html(of_folders(*folders))
    assert said in page and "log.information_probes=true writes it" not in page
    assert main(["report", *map(str, folders)]) == 0
    assert said in capsys.readouterr().out
