"""Identity is the number of a record in its source; an id is a label that several may have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlbench.__main__ import main
from vlbench.compare.report.finished_runs import COMPARED_SET, load_finished_run
from vlbench.config import recipe as recipes
from vlbench.evaluate.heldout_questions import final_questions
from vlbench.evaluate.tasks.benchmark_records import read_mmmu_records

GOLDENS = Path(__file__).parent / "goldens" / "evaluation"
COLOURS = ("red", "green", "blue")


def record(number: int, name: str = "same", with_image: bool = True, **more) -> dict:
    """Return a record with an answer of its own."""
    turns = [{"from": "human", "value": f"Question {number}?"}]
    turns.append({"from": "gpt", "value": f"answer {number}"})
    image = {"image": f"{COLOURS[number % 3]}.png"} if with_image else {}
    return {"id": name, **image, "conversations": turns, **more}


@pytest.fixture
def write(tmp_path):
    """Write records and the images that they name; return the file."""
    for name in COLOURS:
        Image.new("RGB", (40, 40), name).save(tmp_path / f"{name}.png")

    def write(records: list[dict], name: str = "data.json") -> Path:
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    return write


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def test_records_with_one_id_are_questions_of_their_own(write, model, tmp_path):
    file = write([record(n) for n in range(6)])
    assert main(["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}"]) == 0
    asked = lines(tmp_path / "out/scored.jsonl")
    assert sorted((one["record"], one["answer"][0]) for one in asked) == [
        (str(n + 1), f"answer {n}") for n in range(6)
    ]
    assert len({one["id"] for one in asked}) == 6
    assert {one["id"] for one in asked} == {f"same#{n}/1" for n in range(1, 7)}


def test_what_people_answered_belongs_to_their_record_and_not_to_its_id(write, model, tmp_path):
    several = [record(n, answers=[f"people {n}"] * 10) for n in range(3)]
    file = write([*several, record(3)])
    assert main(["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}"]) == 0
    answers = {one["record"]: set(one["answer"]) for one in lines(tmp_path / "out/scored.jsonl")}
    expected = {str(n + 1): {f"people {n}"} for n in range(3)}
    assert answers == {**expected, "4": {"answer 3"}}


def test_an_id_that_is_there_once_stays_as_it_is(write, model, tmp_path):
    file = write([record(0), record(1), record(2, "other")])
    assert main(["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}"]) == 0
    assert {one["id"] for one in lines(tmp_path / "out/answers.jsonl")} == {
        *("same#1/1", "same#2/1", "other/1")
    }


def test_an_id_that_looks_like_one_with_a_number_is_kept_apart(write, model, tmp_path):
    file = write([record(0), record(1), record(2, "same#2"), record(3, "same#1")])
    assert main(["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}"]) == 0
    asked = {one["id"]: one["answer"][0] for one in lines(tmp_path / "out/scored.jsonl")}
    assert asked == {
        "same#1#2/1": "answer 0",
        "same#2#2/1": "answer 1",
        "same#2/1": "answer 2",
        "same#1/1": "answer 3",
    }


def test_an_exam_from_before_records_were_numbered_goes_on(write, model, tmp_path):
    file = write([record(n, str(n)) for n in range(6)])
    words = ["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}", "batch=2"]
    assert main(words) == 0
    kept = tmp_path / "out/answers.jsonl"
    whole = lines(kept)
    before = [{key: one[key] for key in one if key != "record"} for one in whole[:4]]
    kept.write_text("".join(f"{json.dumps(one)}\n" for one in before))
    assert main(words) == 0
    assert lines(kept) == [*before, *whole[4:]]
    assert json.loads((tmp_path / "out/scores.json").read_text())["sets"][str(file)]["n"] == 6


def test_a_run_asks_equal_ids_of_all_its_sources_apart(write):
    first, second = (write([record(n) for n in range(2)], name) for name in ("a.json", "b.json"))
    mix = f"data.mix=[{{train: {first}}}, {{train: {second}}}]"
    recipe = recipes.load_recipe(["recipe=yivl_llava", mix])
    asked = final_questions(recipe.last_stage_data, recipe.log.questions)[1]
    ids = [one.sample.id for one in asked]
    assert len(ids) == len(set(ids)) == 4


def test_records_without_an_image_are_counted_and_named(write, model, tmp_path, capsys):
    records = [record(0, "a"), record(1, "b", with_image=False), record(2, "c", with_image=False)]
    records.append({"id": "d", "image": "none.png", "conversations": record(3)["conversations"]})
    file = write(records)
    assert main(["eval", f"model={model}", f"data={file}", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "2 samples without an image, the first: record 2 (b): has no image" in said
    assert "1 bad samples, the first: record 4 (d): " in said and "skipped.jsonl" in said
    named = [(one["id"], one["record"]) for one in lines(tmp_path / "out/skipped.jsonl")]
    assert named == [("b", "2"), ("c", "3"), ("d", "4")]
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["skipped"] == 3 and scores["sets"][str(file)]["n"] == 1


def test_a_file_of_texts_alone_says_how_many(write, model, capsys):
    file = write([record(n, str(n), with_image=False) for n in range(3)])
    assert main(["eval", f"model={model}", f"data={file}"]) == 2
    said = capsys.readouterr().err
    assert "(3 samples without an image, the first: record 1 (0)" in said
    assert len(said.splitlines()) == 1


def test_a_line_separator_in_an_answer_does_not_divide_a_line(write, model, tmp_path):
    records = [record(n, f"{n}\u2028\x85") for n in range(3)]
    words = [f"model={model}", f"data={write(records)}", f"out={tmp_path / 'out'}"]
    for _ in range(2):
        assert main(["eval", *words]) == 0
        assert len(lines(tmp_path / "out/answers.jsonl")) == 3


@pytest.fixture
def doubled(tmp_path) -> Path:
    """A split of MMMU in which two different questions have one id."""
    source = GOLDENS / "mmmu_tiny/Math/validation-00000-of-00001.parquet"
    table = pq.read_table(source)
    names = table["id"].to_pylist()
    names[1] = names[0]
    at = table.schema.get_field_index("id")
    folder = tmp_path / "data/Math"
    folder.mkdir(parents=True)
    changed = table.set_column(at, table.schema.field(at), pa.array(names, pa.string()))
    pq.write_table(changed, folder / source.name)
    return folder.parent


def test_questions_of_mmmu_with_one_id_are_asked_and_scored_each(doubled, model, tmp_path, capsys):
    records = read_mmmu_records(str(doubled), "validation")
    assert records[0].id == records[1].id and records[0].question != records[1].question
    out = tmp_path / "out"
    words = [f"model={model}", "task=mmmu", f"data={doubled}", "protocol=official", f"out={out}"]
    assert main(["eval", *words]) == 0
    assert f"2 questions share 1 ids ({records[0].id}: 2)" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    asked = lines(out / "answers.jsonl")
    assert scores["n"] == len(asked) and [one["id"] for one in asked].count(records[0].id) == 2
    words = ["task=mmmu", f"answers={out / 'answers.jsonl'}", "protocol=official"]
    assert main(["score", *words, f"out={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again/scores.json").read_text())
    assert again == {key: scores[key] for key in again}


def test_sixty_answers_with_one_id_are_sixty(tmp_path, capsys):
    line = {"id": "same", "type": "open", "answer": "yes", "response": "yes"}
    several = [{**line, "response": "yes" if n < 15 else "no"} for n in range(60)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(f"{json.dumps(one)}\n" for one in several))
    assert main(["score", "task=mmmu", f"answers={file}", "protocol=raw"]) == 0
    scores = json.loads((tmp_path / "answers.jsonl.scores/scores.json").read_text())
    assert (scores["n"], scores["correct"]) == (60, 15)
    assert "60 questions share 1 ids (same: 60)" in capsys.readouterr().out


def test_a_comparison_counts_equal_ids_of_an_old_run_one_by_one(model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model.parent.parent, run)
    first = next(one for one in lines(run / "answers.jsonl") if one["set"] == COMPARED_SET)
    several = [first | {"correct": n % 2 == 0} for n in range(60)]
    (run / "answers.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in several))
    right = load_finished_run(run).correct
    assert len(right) == 60 and sum(right.values()) == 30
