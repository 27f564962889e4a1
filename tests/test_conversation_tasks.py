"""`eval` on a run's own questions and on LLaVA files: answers kept, several measures, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlbench.__main__ import main
from vlbench.command_line.arguments import EvalArguments
from vlbench.evaluate.tasks.conversation_tasks import ConversationTask
from vlbench.train import checkpoint_files


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was hardly trained, with 12 questions of its own."""
    folder = tmp_path_factory.mktemp("own") / "run"
    words = [f"stages.{name}.steps=0" for name in ("align_224", "align_448")]
    words += ["stages.chat.steps=2", "log.questions=12", "log.examples=0", "log.tensorboard=false"]
    assert main(["fit", "recipe=yivl_llava", *words, f"run={folder}"]) == 0
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Three records: one answer, two turns, and ten people's answers without a turn for them."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)

    def turns(*texts: str) -> list[dict]:
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]

    records = [
        {"id": "one", "image": "a.png", "conversations": turns("<image>\nColour?", "red")},
        {
            "id": "two",
            "image": "b.png",
            "conversations": turns("<image>\nColour?", "red", "Round?", "no"),
        },
        {
            "id": "ten",
            "image": "b.png",
            "conversations": turns("<image>\nHow many?"),
            "answers": [{"answer": "one"}] * 6 + [{"answer": "two"}] * 4,
        },
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(records))
    return file


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_about_other_images_of_the_same_names_are_not_kept(run, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), "blue").save(other / name)
    words = ["eval", f"model={run}", f"data={data}", f"out={tmp_path / 'out'}"]
    assert main([*words, f"images={data.parent}"]) == 0
    assert main([*words, f"images={other}"]) == 2
    assert "differ in pictures (sha256 " in capsys.readouterr().err


def test_a_row_that_cannot_be_read_is_left_out_and_named(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    file = tmp_path / "questions.csv"
    file.write_text("image,question,answer\na.png,Colour?\na.png,Colour?,red\n")
    task = ConversationTask("llava_json", EvalArguments(model="run", data=str(file)))
    assert [one.question.answer for one in task.all_questions] == ["red"]
    (left_out,) = task.left_out_records
    assert left_out.reason == "has 2 cells; the table has 3 columns"


def test_a_run_is_asked_its_own_questions_and_the_answers_are_those_of_its_end(run, capsys):
    assert main(["eval", f"model={run}"]) == 0
    said = capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert f"new images: {results['accuracy']:.3f} of 12 questions right" in said
    assert "unseen pairs: " in said and "by type: " in said and "VQA accuracy" in said
    folder = run / "eval" / checkpoint_files.find_checkpoint(run).name / "own"
    assert str(folder) in said
    before = {
        one["id"]: one["answer"]
        for one in lines(run / "answers.jsonl")
        if one["set"] in ("accuracy", "unseen")
    }
    after = {one["id"]: one["response"] for one in lines(folder / "answers.jsonl")}
    assert len(after) == 24 and before.items() <= after.items()


def test_a_file_is_asked_turn_by_turn_and_by_the_answers_of_several_people(run, data, capsys):
    out = data.parent / "out"
    assert main(["eval", f"model={run}", f"data={data}", f"out={out}", "blank=true"]) == 0
    assert "of 4 questions right" in capsys.readouterr().out
    asked = {one["id"]: one for one in lines(out / "scored.jsonl")}
    assert set(asked) == {"one/1", "two/1", "two/3", "ten/1"}
    assert asked["ten/1"]["answer"] == ["one"] * 6 + ["two"] * 4
    scores = json.loads((out / "scores.json").read_text())
    assert scores["sets"][str(data)]["n"] == 4 and str(data) in scores["blank"]


def test_answers_are_kept_and_not_asked_again(run, data, monkeypatch):
    out = data.parent / "out"
    given = ["eval", f"model={run}", f"data={data}", f"out={out}", "batch=2"]
    assert main(given) == 0
    whole = {name: (out / name).read_text() for name in ("answers.jsonl", "scores.json")}
    (out / "answers.jsonl").write_text(
        "".join(f"{json.dumps(o, ensure_ascii=False)}\n" for o in lines(out / "answers.jsonl")[:2])
    )
    assert main(given) == 0
    assert {name: (out / name).read_text() for name in whole} == whole


def test_another_file_is_not_mixed_with_answers_that_are_there(run, data, capsys):
    out = data.parent / "out"
    given = ["eval", f"model={run}", f"data={data}", f"out={out}"]
    assert main(given) == 0
    data.write_text(data.read_text().replace("Round?", "Square?"))
    assert main(given) == 2
    assert "holds answers under other settings; they differ in revision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=llava_jsn"], "Did you mean 'llava_json'?"),
        (["task=llava_json"], "task=llava_json needs data=FILE.json"),
        (["task=own", "data=x.json"], "data= is for task=mmmu and cmmmu and llava_json, not"),
        (["task=own", "protocol=yi"], "protocol= is for task=mmmu and cmmmu, not for own"),
        (["task=own", "images=."], "images= is for task=llava_json, not for own"),
        (["data=nowhere.json"], "data nowhere.json: there is no such file"),
    ],
)
def test_mistakes_are_one_line(words, message, run, capsys):
    assert main(["eval", f"model={run}", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_answers_that_are_null_are_none(data):
    records = [{"answers": None, **record} for record in json.loads(data.read_text())]
    data.write_text(json.dumps(records))
    task = ConversationTask("llava_json", EvalArguments(model="run", data=str(data)))
    assert [len(one.true_answers) for one in task.all_questions] == [1, 1, 1, 10]


@pytest.mark.parametrize("answers", ["red", [], [1], [{"text": "red"}]])
def test_answers_that_are_no_texts_are_named(answers, run, data, capsys):
    records = json.loads(data.read_text())
    records[2]["answers"] = answers
    data.write_text(json.dumps(records))
    assert main(["eval", f"model={run}", f"data={data}"]) == 2
    assert "ten: 'answers' must be a list of texts" in capsys.readouterr().err
