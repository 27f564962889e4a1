"""What is paired is the same question: neither an id, nor a picture's file name, makes it so."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from test_report_command import run

from vlbench.__main__ import main
from vlbench.compare.experiment.design_power import describe_power
from vlbench.compare.experiment.grid import parse_grid
from vlbench.config.recipe import load_recipe
from vlbench.data.data_sources import open_held_out
from vlbench.evaluate.heldout_questions import EvalQuestion, collect_questions, scene_questions
from vlbench.evaluate.run_results import _write_answers

COUNT = 30


def write_data(folder: Path, colour: str = "red", text: str = "What is it?", count: int = COUNT):
    """Write conversations about pictures, each with a name, a shade and two turns of its own."""
    folder.mkdir()
    records = []
    for number in range(count):
        Image.new("RGB", (20, 20 + number), colour).save(folder / f"{number}.png")
        turns = [("human", f"<image>\n{text}"), ("gpt", "Yes."), ("human", "Sure?"), ("gpt", "No.")]
        conversation = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": number, "image": f"{number}.png", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def questions_of(file: Path) -> list[EvalQuestion]:
    words = ["recipe=yivl_llava", f"data.val={file}", f"data.images={file.parent}"]
    held_out = open_held_out(load_recipe(words).last_stage_data)
    return collect_questions(held_out, 1000)[0]


def compare_answers(tmp_path: Path, *asked: list[EvalQuestion]) -> int:
    """Report rows that have answered these questions, all right."""
    for number, questions in enumerate(asked):
        folder = run(tmp_path / f"row{number}/0", 1.0, 0, f"connector.depth={number + 1}")
        right = [question.answer for question in questions]
        _write_answers(folder / "answers.jsonl", {"accuracy": questions}, {"accuracy": right})
    return main(["report", *(str(tmp_path / f"row{number}") for number in range(len(asked)))])


def test_other_pictures_of_the_same_names_are_not_paired(tmp_path, capsys):
    asked = [questions_of(write_data(tmp_path / colour, colour)) for colour in ("red", "blue")]
    assert compare_answers(tmp_path, *asked) == 2
    assert "true answers, texts or pictures differ, as of 0/1" in capsys.readouterr().err


def test_other_questions_about_the_same_pictures_are_not_paired(tmp_path, capsys):
    first = questions_of(write_data(tmp_path / "first"))
    other = questions_of(write_data(tmp_path / "other", text="Is it red?"))
    assert compare_answers(tmp_path, first, [*other[:2], *first[2:]]) == 0
    assert "2 questions are left out, as under the same id" in capsys.readouterr().out


def test_pictures_that_were_renamed_are_the_same_questions(tmp_path, capsys):
    first = questions_of(write_data(tmp_path / "first"))
    file = write_data(tmp_path / "moved")
    for number in range(COUNT):
        (tmp_path / f"moved/{number}.png").rename(tmp_path / f"moved/new{number}.png")
    file.write_text(file.read_text().replace('"image": "', '"image": "new'))
    assert compare_answers(tmp_path, first, questions_of(file)) == 0
    assert "left out" not in capsys.readouterr().out


def test_every_question_has_its_own_checksum(tmp_path):
    for asked in (questions_of(write_data(tmp_path / "a")), scene_questions("new")):
        assert len({(one.sample.id, one.checksum) for one in asked}) == len(asked)
        assert len({one.checksum for one in asked}) > len(asked) * 0.9


def test_the_plan_counts_the_questions_and_pictures_of_held_out_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, held = (
        write_data(tmp_path / name, count=count) for name, count in (("t", 6), ("v", 12))
    )
    words = ["recipe=yivl_llava,yivl_qformer", "run=c", f"data.train={train}", "data.images=v"]
    first, *lines = describe_power(parse_grid([*words, f"data.val={held}"]))
    assert "with 24 questions about 12 pictures" in first
    assert "about" in lines[0] and "rough figure" in lines[-1]
    limited = describe_power(parse_grid([*words, f"data.val={held}", "log.questions=10"]))
    assert "with 10 questions about 5 pictures" in limited[0]
    absent = describe_power(parse_grid([*words, "data.val=none.json"]))
    assert "with 1,000 questions" in absent[0] and "rough figure" not in absent[-1]
