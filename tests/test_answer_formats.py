"""`score` on the files of MMMU's own code: the same figures as of the same answers in our lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.evaluate.tasks.benchmark_records import read_mmmu_records

GOLDENS = Path(__file__).parent / "goldens/evaluation"
GOLDEN = json.loads((GOLDENS / "mmmu_parse.json").read_text(encoding="utf-8"))
TINY = GOLDENS / "mmmu_tiny"
SUBJECTS = ("Accounting", "Art", "Math")


def cases() -> list[dict]:
    """Return answers as MMMU's code keeps them, with what it has read in each."""
    choices = [one for one in GOLDEN["multiple_choice"] if isinstance(one["response"], str)]
    chosen = [one for one in choices if one["official"]["pred"] != "random"][:60]
    chosen += [one for one in choices if one["official"]["pred"] == "random"][:15]
    several = []
    for number, one in enumerate([*chosen, *GOLDEN["open"][:60]]):
        letters = "index2ans" in one
        kept = {
            "id": f"validation_{SUBJECTS[number % 3]}_{number}",
            "question_type": "multiple-choice" if letters else "short-answer",
            "answer": one["answer"],
            "response": one["response"],
            "parsed_pred": one["official"]["pred"],
        }
        if letters:
            kept |= {"all_choices": one["all_choices"], "index2ans": one["index2ans"]}
        several.append(kept)
    return several


def ours(case: dict) -> dict:
    """Return a line of our own."""
    kinds = {"multiple-choice": "multiple-choice", "short-answer": "open"}
    options = [case["index2ans"][letter] for letter in case.get("all_choices", [])]
    kept = {key: case[key] for key in ("id", "answer", "response")}
    return {**kept, "type": kinds[case["question_type"]], "options": options}


def scored(file: Path, protocol: str, *words: str) -> dict:
    """Return scores.json of a file of answers; types are called as in our lines."""
    given = ["task=mmmu", f"answers={file}", f"protocol={protocol}", *words]
    assert main(["score", *given]) == 0
    scores = json.loads(Path(f"{file}.scores/scores.json").read_text())
    kinds = scores["by_type"]
    return scores | {"by_type": {k.replace("short-answer", "open"): v for k, v in kinds.items()}}


def lines(path: Path, several: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in several))
    return path


def array(path: Path, several: list[dict]) -> Path:
    path.write_text(json.dumps(several, indent=4))
    return path


def compact(path: Path, several: list[dict]) -> Path:
    path.write_text(json.dumps(several))
    return path


def mapping(path: Path, several: list[dict]) -> Path:
    path.write_text(json.dumps({one["id"]: one for one in several}, indent=1))
    return path


def folders(path: Path, several: list[dict]) -> Path:
    for name in SUBJECTS:
        (path / name).mkdir(parents=True)
        array(path / name / "output.json", [one for one in several if f"_{name}_" in one["id"]])
    return path


def arrays(file: Path, several: list[dict]) -> Path:
    """Write an array a line, as outputs of several subjects are put together."""
    halves = several[:40], several[40:]
    file.write_text("".join(json.dumps(half) + "\n" for half in halves))
    return file


def nested(file: Path, several: list[dict]) -> Path:
    """Write arrays by subject, as one object."""
    file.write_text(json.dumps({"Art": several[:40], "Math": several[40:]}))
    return file


def objects(file: Path, several: list[dict]) -> Path:
    """Write one object by its id a line."""
    file.write_text("".join(json.dumps({one["id"]: one}) + "\n" for one in several))
    return file


WRITERS = {
    one.__name__: one for one in (lines, array, compact, mapping, folders, arrays, nested, objects)
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("protocol", ["official", "lmms", "strict", "raw", "yi"])
def test_every_shape_gives_the_figures_of_our_lines(
    write: Callable[[Path, list[dict]], Path], protocol, tmp_path
):
    several = sorted(cases(), key=lambda one: SUBJECTS.index(one["id"].split("_")[1]))
    expected = scored(lines(tmp_path / "ours.jsonl", [ours(one) for one in several]), protocol)
    assert expected["n"] == len(several)
    assert scored(write(tmp_path / "theirs.json", several), protocol) == expected


def test_what_was_read_already_is_taken_as_it_is(tmp_path):
    several = [one for one in cases() if one["parsed_pred"] != "random"]
    expected = scored(lines(tmp_path / "ours.jsonl", [ours(one) for one in several]), "official")
    read = [{key: one[key] for key in one if key != "response"} for one in several]
    again = scored(array(tmp_path / "parsed_output.json", read), "official")
    assert again == expected


def test_answers_by_id_are_scored_with_the_questions_of_the_benchmark(tmp_path):
    records = read_mmmu_records(str(TINY), "validation")
    answers = {one.id: "B" if n % 2 else "the answer is 3.5" for n, one in enumerate(records)}
    file = tmp_path / "total_val_output.json"
    file.write_text(json.dumps(answers))
    own = [
        {
            "id": one.id,
            "type": one.type,
            "options": list(one.options),
            "answer": list(one.answer) if isinstance(one.answer, tuple) else one.answer,
            "response": answers[one.id],
        }
        for one in records
    ]
    for protocol in ("official", "yi"):
        expected = scored(lines(tmp_path / "ours.jsonl", own), protocol)
        assert scored(file, protocol, f"data={TINY}") == expected
    # as main_eval_only.py has it: types and truths alone, and letters compared as they are
    truths = {
        one["id"]: {"question_type": one["type"], "ground_truth": one["answer"]} for one in own
    }
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(truths))
    assert scored(file, "yi", f"data={tmp_path / 'answer_dict_val.json'}") == expected


def test_a_file_to_submit_is_scored_where_the_answers_are_known(tmp_path, model):
    out = tmp_path / "out"
    words = [f"model={model}", "task=cmmmu", f"data={GOLDENS / 'cmmmu_tiny'}", f"out={out}"]
    assert main(["eval", *words]) == 0
    kept = [json.loads(one) for one in (out / "answers.jsonl").read_text().split("\n") if one]
    expected = json.loads((out / "scores.json").read_text())
    for key in ("response", "answer"):  # the two ways of CMMMU's eval_script.py
        file = lines(
            tmp_path / f"{key}.jsonl",
            [{"id": int(o["id"]), "type": o["type"], key: o["response"]} for o in kept],
        )
        given = ["task=cmmmu", f"answers={file}", "protocol=yi", f"data={GOLDENS / 'cmmmu_tiny'}"]
        assert main(["score", *given]) == 0
        again = json.loads(Path(f"{file}.scores/scores.json").read_text())
        assert again == {name: expected[name] for name in again}


CHOICE = {
    "id": "validation_Art_1",
    "question_type": "multiple-choice",
    "all_choices": ["A", "B"],
    "index2ans": {"A": "x", "B": "y"},
    "answer": "A",
    "response": "A",
}


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (json.dumps({"a_Art_1": "B"}), [], "answers without their questions; say data="),
        ("[]", [], "holds no answers"),
        ("{}\n{}\n", [], "answers without their questions"),
        ("[5]", [], "line 1 is not a JSON object"),
        ("[[5]]\n", [], "line 1 is not a JSON object"),
        (json.dumps({"a_Art_1": "B"}), [f"data={TINY}"], "data= has no question of this id"),
        (json.dumps([CHOICE], indent=1)[:-5], [], "is not JSON"),
        (json.dumps([{**CHOICE, "index2ans": {"A": "x"}}]), [], "index2ans has no B"),
        (json.dumps([{**CHOICE, "index2ans": None}]), [], "all_choices without index2ans"),
        (json.dumps([{**CHOICE, "all_choices": ["B", "A"]}]), [], "the letters from A on"),
        (json.dumps([{**CHOICE, "question_type": "mutiple-choice"}]), [], "type is"),
        (json.dumps([CHOICE]), ["data=nowhere"], "data is 'nowhere'"),
        (json.dumps([CHOICE]), [f"data={TINY}", "split=vall"], "no split 'vall'"),
        (json.dumps([CHOICE]), ["splt=val"], "Did you mean 'split'?"),
    ],
)
def test_mistakes_are_one_line(text, words, message, tmp_path, capsys):
    file = tmp_path / "answers.json"
    file.write_text(text)
    assert main(["score", "task=mmmu", f"answers={file}", "protocol=official", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0], said


def test_a_binary_file_is_one_line(capsys):
    file = next((TINY / "Art").glob("*.parquet"))
    assert main(["score", "task=mmmu", f"answers={file}", "protocol=raw"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "is no text: its byte " in said[0]


def test_a_folder_without_answers_and_split_without_data_are_refused(tmp_path, capsys):
    given = ["task=mmmu", f"answers={tmp_path}", "protocol=official"]
    assert main(["score", *given]) == 2
    assert "a folder without SUBJECT/output.json" in capsys.readouterr().err
    file = lines(tmp_path / "ours.jsonl", [ours(cases()[0])])
    given = ["task=mmmu", f"answers={file}", "protocol=official", "split=val"]
    assert main(["score", *given]) == 2
    assert "split= is for data=" in capsys.readouterr().err


def test_questions_of_one_id_are_told_apart_or_refused(tmp_path, capsys):
    truths = [CHOICE, {**CHOICE, "answer": "B"}]
    (tmp_path / "data.json").write_text(json.dumps(truths))
    file = tmp_path / "answers.json"
    file.write_text(json.dumps({CHOICE["id"]: "A"}))
    words = [f"answers={file}", f"data={tmp_path / 'data.json'}", "protocol=official"]
    assert main(["score", "task=mmmu", *words]) == 2
    assert "several questions of the id validation_Art_1" in capsys.readouterr().err


def test_questions_without_an_answer_are_counted(tmp_path, capsys):
    """CMMMU's own scorer refuses such a file, and MMMU's leaves out what is missing."""
    ids = [f"validation_Art_{number}" for number in range(1, 6)]
    truths = {one: {"question_type": "multiple-choice", "ground_truth": "A"} for one in ids}
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(truths))
    words = ["task=mmmu", "protocol=yi", f"data={tmp_path / 'answer_dict_val.json'}"]
    for answered, expected in ((ids[:2], 1), (ids, 0)):
        file = tmp_path / f"{len(answered)}.json"
        file.write_text(json.dumps(dict.fromkeys(answered, "A")))
        assert main(["score", *words, f"answers={file}"]) == 0
        told = [one for one in capsys.readouterr().out.splitlines() if "have no answer" in one]
        assert len(told) == expected
    file = tmp_path / "2.json"
    assert main(["score", *words, f"answers={file}"]) == 0
    assert "3 of the 5 questions of data= have no answer here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "subject"),
    [
        ({"category": "商业"}, "商业"),
        ({"category": "商业", "subcategory": "经济"}, "经济"),
        ({"category": "商业", "subcategory": "?"}, "商业"),
        ({}, "unknown"),
    ],
)
def test_cmmmus_own_keys_name_the_subject(keys, subject, tmp_path):
    record = {"id": 1, "type": "判断", "answer": "对", "response": "对", **keys}
    file = lines(tmp_path / "answers.jsonl", [record])
    assert main(["score", "task=cmmmu", f"answers={file}", "protocol=official"]) == 0
    scores = json.loads(Path(f"{file}.scores/scores.json").read_text())
    assert list(scores["by_subject"]) == [subject]


@pytest.mark.parametrize("wrap", [list, lambda said: [said]], ids=["texts", "lists"])
def test_what_lmms_eval_has_logged_is_scored_by_any_protocol(wrap, tmp_path, capsys):
    """Its responses, and not the letters that it has parsed or drawn."""
    truths, logged = {}, []
    for number, response in enumerate(["A", "The answer is (B).", "no idea"], 1):
        one = f"validation_Art_{number}"
        truths[one] = {**CHOICE, "id": one}
        metric = {"id": one, "subdomain": "Art", "question_type": "multiple-choice"}
        metric |= {"answer": "A", "parsed_pred": ["A"]}
        line = {"doc_id": number, "resps": [[response]], "filtered_resps": wrap([response])}
        logged.append({**line, "target": "A", "mmmu_acc": metric, "submission": {one: "A"}})
    (tmp_path / "data.json").write_text(json.dumps(list(truths.values())))
    file = lines(tmp_path / "20260810_101112_samples_mmmu_val.jsonl", logged)
    words = ["task=mmmu", f"answers={file}", "protocol=strict", f"data={tmp_path / 'data.json'}"]
    assert main(["score", *words]) == 0, capsys.readouterr().err
    scores = json.loads(Path(f"{file}.scores/scores.json").read_text())
    assert (scores["n"], scores["correct"], scores["unread"]) == (3, 1, 1)
    assert list(scores["by_subject"]) == ["Art"]
