"""`score`: files, sums and intervals, published rows, and what is said about a wrong file."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from statistics import NormalDist

import pytest
import yaml

from vlbench.__main__ import main
from vlbench.evaluate.tasks.benchmark_types import (
    CMMMU_DOMAINS,
    MMMU_DOMAINS,
    AnsweredItem,
    ScoredItem,
    known_subject_of_id,
)
from vlbench.evaluate.tasks.score_report import (
    PUBLISHED_FILE,
    accuracy_from_counts,
    summarize_scores,
    wilson_interval,
)
from vlbench.evaluate.tasks.scoring_protocols import SCORING_PROTOCOLS

GOLDENS = Path(__file__).parent / "goldens/evaluation"
AGGREGATION = json.loads((GOLDENS / "aggregation.json").read_text(encoding="utf-8"))
LEADERBOARDS = json.loads((GOLDENS / "published.json").read_text(encoding="utf-8"))
CATEGORIES = dict(
    zip(
        [row["subject"] for row in AGGREGATION["cmmmu_yi_vl_34b_val"]["table"]],
        [*CMMMU_DOMAINS.domains, "all"],
        strict=True,
    )
)


def summed(task: str, counts: dict[str, dict[str, int]]) -> dict:
    """Return the summary of as many right and wrong answers as `counts` says."""
    scored = [
        ScoredItem(
            AnsweredItem(f"{subject}{n}", "open", [], "", "", subject), [], n < of["correct"], False
        )
        for subject, of in counts.items()
        for n in range(of["num"])
    ]
    return summarize_scores(task, scored)


def printed(scores: dict, shown: str) -> dict[str, dict]:
    """Return the summary as MMMU's own code prints it."""
    rows = {"Overall": scores, **scores["by_subject"]}
    rows |= {f"Overall-{name}": group for name, group in scores["by_domain"].items()}
    return {
        name: {"num": row["n"], "acc": float(format(row["accuracy"], shown))}
        for name, row in rows.items()
    }


@pytest.mark.parametrize(
    ("protocol", "reference"), [("official", "official"), ("lmms", "lmms_eval_head")]
)
@pytest.mark.parametrize("case", AGGREGATION["mmmu_synthetic"], ids=lambda case: case["scenario"])
def test_mmmu_adds_up_to_the_last_printed_digit(case, protocol, reference):
    shown = SCORING_PROTOCOLS["mmmu"][protocol].accuracy_format
    assert printed(summed("mmmu", case["counts"]), shown) == case[reference]


@pytest.mark.parametrize("model", AGGREGATION["mmmu_real"])
def test_real_counts_of_mmmu_add_up(model):
    golden = AGGREGATION["mmmu_real"][model]["parse_and_eval"]
    scores = summed("mmmu", golden["per_subject"])
    assert scores["correct"] == golden["overall_correct"]
    for subject, row in golden["per_subject"].items():
        assert scores["by_subject"][subject]["accuracy"] == row["acc"]


@pytest.mark.parametrize(
    "case", [*AGGREGATION["cmmmu_synthetic"], AGGREGATION["cmmmu_yi_vl_34b_val"]]
)
def test_cmmmu_adds_up_to_the_last_printed_digit(case):
    table = {CATEGORIES[row["subject"]]: row for row in case.get("official") or case["table"]}
    scores = summed("cmmmu", {name: row for name, row in table.items() if name != "all"})
    for name, row in table.items():
        group = scores if name == "all" else scores["by_domain"][name]
        told = format(group["accuracy"], SCORING_PROTOCOLS["cmmmu"]["official"].accuracy_format)
        assert (group["correct"], group["n"], told) == (
            row["correct"],
            row["num"],
            row["acc_printed"],
        )


def test_cmmmus_subcategories_add_up_as_in_lmms_eval():
    golden = AGGREGATION["cmmmu_lmms_synthetic"]
    scores = summed("cmmmu", golden["counts"])
    assert printed(scores, SCORING_PROTOCOLS["cmmmu"]["lmms"].accuracy_format) == golden["printed"]


def test_the_domains_are_the_official_ones():
    official = AGGREGATION["meta"]["domain_map"]
    assert {name: list(subjects) for name, subjects in MMMU_DOMAINS.domains.items()} == official
    assert known_subject_of_id("mmmu", "validation_Diagnostics_and_Laboratory_Medicine_12") == (
        "Diagnostics_and_Laboratory_Medicine"
    )
    assert (
        known_subject_of_id("mmmu", "my_own_7") == known_subject_of_id("cmmmu", "1900") == "unknown"
    )


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (0, 30), (7, 30), (326, 900), (900, 900)])
def test_intervals_are_wilsons(correct, n):
    share, weight = correct / n, NormalDist().inv_cdf(0.975) ** 2 / n
    middle = (share + weight / 2) / (1 + weight)
    reach = sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    known = (max(0.0, middle - reach), min(1.0, middle + reach))
    assert wilson_interval(correct, n) == pytest.approx(known, abs=1e-12)
    assert accuracy_from_counts(correct, n).to_dict()["interval"] == pytest.approx(known, abs=1e-4)


def test_published_rows_are_those_of_the_leaderboards():
    rows = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))
    for name in ("val", "test"):
        for model, row in rows["mmmu"][name]["rows"].items():
            assert row == list(LEADERBOARDS[f"mmmu_{name}_2024_02"]["rows"][model].values())[:7]
    for model, row in rows["cmmmu"]["test"]["rows"].items():
        known = dict(LEADERBOARDS["cmmmu"]["rows"][model])
        assert rows["cmmmu"]["val"]["rows"][model] == [known.pop("Validation Overall")]
        assert row == list(known.values())[:7]


CHOICE = {
    "id": "validation_Art_1",
    "type": "multiple-choice",
    "options": ["red", "blue"],
    "answer": "B",
    "response": "(B)",
}
OPEN = {"id": "o1", "type": "open", "answer": ["2", "two"], "response": "nan", "mine": [1]}


def run(folder: Path, *lines: object, task: str = "mmmu", words: tuple[str, ...] = ()) -> int:
    """Write a file of `lines` and score it."""
    file = folder / "answers.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    given = {word.partition("=")[0] for word in words}
    defaults = (f"task={task}", f"answers={file}", "protocol=official")
    return main(["score", *[w for w in defaults if w.partition("=")[0] not in given], *words])


def test_files_and_table(tmp_path, capsys):
    lost = {**CHOICE, "id": "validation_Math_2", "response": "who\u2028knows"}
    assert run(tmp_path, CHOICE, "", lost, OPEN) == 0
    folder = tmp_path / "answers.jsonl.scores"
    lines = (folder / "scored.jsonl").read_text(encoding="utf-8").split("\n")
    kept = [json.loads(line) for line in lines if line]
    assert kept[0] == {**CHOICE, "prediction": "B", "correct": True, "fallback": False}
    assert kept[1]["response"] == lost["response"] and kept[1]["fallback"]
    assert kept[2] == {**OPEN, "prediction": ["nan"], "correct": False, "fallback": False}
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert (scores["task"], scores["protocol"], scores["seed"]) == ("mmmu", "official", 42)
    assert (scores["n"], scores["fallback"], scores["unread"]) == (3, 1, 0)
    assert {name: row["n"] for name, row in scores["by_type"].items()} == {
        "multiple-choice": 2,
        "open": 1,
    }
    assert set(scores["by_subject"]) == {"Art", "Math", "unknown"}
    assert scores["by_domain"]["Art and Design"]["accuracy"] == 1
    assert scores["by_domain"]["Business"]["n"] == 0
    said = capsys.readouterr().out
    assert "1 answers drawn at random" in said and "Yi-VL-34B" in said and str(folder) in said


def test_seed_and_folder_can_be_chosen(tmp_path):
    lost = [{**CHOICE, "id": f"q{n}", "response": ""} for n in range(40)]
    drawn = []
    for seed in ("1", "2", "1"):
        out = tmp_path / f"of{len(drawn)}"
        assert run(tmp_path, *lost, words=(f"seed={seed}", f"out={out}")) == 0
        drawn.append((out / "scored.jsonl").read_text(encoding="utf-8"))
    assert drawn[0] == drawn[2] != drawn[1]
    assert run(tmp_path, *lost, words=("protocol=strict",)) == 0
    strict = json.loads((tmp_path / "answers.jsonl.scores/scores.json").read_text())
    assert (strict["accuracy"], strict["fallback"], strict["unread"]) == (0, 0, 40)


JUDGE = {"id": 1, "type": "判断", "answer": "对", "response": "对"}
LETTERS = {"id": 1, "type": "选择", "answer": "A", "response": "A", "options": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("task", "lines", "words", "expected"),
    [
        ("mmmu", [CHOICE], ["answers=none.jsonl"], "none.jsonl: No such file"),
        ("mmmu", [], [], "holds no answers"),
        ("mmmu", ["{"], [], "line 1 is not JSON"),
        ("mmmu", ["[1]"], [], "line 1 is not a JSON object"),
        ("mmmu", ['{"id": "\\ud800"}'], [], "line 1 has half of a surrogate pair"),
        ("mmmu", [{"id": 1, "type": "open"}], [], "line 1 has no answer and no response"),
        ("mmmu", [{**OPEN, "id": None}], [], "id must be text or a whole number"),
        ("mmmu", [{**OPEN, "type": "opne"}], [], "Did you mean 'open'?"),
        ("mmmu", [JUDGE], [], "mmmu has multiple-choice, open, short-answer"),
        ("mmmu", [{**CHOICE, "options": []}], [], "needs options"),
        ("mmmu", [{**CHOICE, "options": "AB"}], [], "must be a list of at most 26 texts"),
        ("mmmu", [{**CHOICE, "answer": "C"}], [], "the answer is 'C', but the options are A to B"),
        ("mmmu", [{**CHOICE, "answer": "AB"}], [], "the answer is 'AB'"),
        ("mmmu", [{**OPEN, "answer": 5}], [], "it must be text, or a list of texts"),
        ("mmmu", [{**OPEN, "answer": None}], [], "nothing to score against"),
        ("mmmu", [{**OPEN, "answer": ""}], [], "nothing to score against"),
        ("mmmu", [{**OPEN, "answer": "?"}], [], "use the submission file"),
        ("mmmu", [{**OPEN, "response": None}], [], "o1: response is null; it must be text"),
        ("cmmmu", [{**JUDGE, "answer": "yes"}], [], "it must be 对 or 错"),
        ("cmmmu", [{**LETTERS, "options": ["a"] * 5}], [], "a list of at most 4 texts"),
        ("cmmmu", [{**LETTERS, "answer": "AE"}], [], "the options are A to D"),
        ("cmmmu", [{**LETTERS, "options": [None], "response": "x"}], [], "option A is null"),
        ("cmmmu", [{**JUDGE, "answer": ["对"]}], [], "it must be text"),
        ("mmmu", [OPEN], ["protocol=offical"], "Did you mean 'official'?"),
        ("mmmu", [OPEN], ["task=mmmmu"], "Did you mean 'mmmu'?"),
        ("mmmu", [OPEN], ["sead=1"], "Did you mean 'seed'?"),
        ("mmmu", [OPEN], ["seed=x"], "seed must be a whole number"),
        ("mmmu", [OPEN], ["out=answers.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_are_one_clear_line(task, lines, words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(Path(), *lines, task=task, words=tuple(words)) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("vlbench: ") and expected in said[0], said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({**CHOICE, "id": "x", "answer": "C"}, "line 2 (x): the answer is 'C'"),
        ({**OPEN, "id": "x", "response": None}, "x: response is null; it must be text"),
        (CHOICE, "line 2 (validation_Art_1): line 1 has this id as well"),
    ],
)
def test_the_rest_of_a_file_is_scored_and_bad_lines_are_counted_and_named(
    bad, expected, tmp_path, capsys
):
    assert run(tmp_path, CHOICE, bad, OPEN) == 0
    told = capsys.readouterr()
    errors = told.err.splitlines()
    assert len(errors) == 1 and expected in errors[0] and "1 of 3 lines left out" in told.out
    folder = tmp_path / "answers.jsonl.scores"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert (scores["n"], scores["bad"], scores["correct"]) == (2, 1, 1)
    assert expected in (folder / "bad.txt").read_text(encoding="utf-8")
    assert run(tmp_path, CHOICE, OPEN) == 0  # mended: nothing is left of what was wrong
    assert (folder / "bad.txt").read_text() == ""


def test_a_line_that_is_no_utf_8_costs_itself_alone(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps(CHOICE).encode(), b'{"id": "\xb8"}', json.dumps(OPEN).encode()]
    file.write_bytes(b"\n".join(lines))
    assert main(["score", "task=mmmu", f"answers={file}", "protocol=strict"]) == 0
    told = capsys.readouterr()
    assert "line 2 is not UTF-8 text" in told.err and "1 of 3 lines left out" in told.out


def test_all_mistakes_of_a_file_are_said_but_not_a_thousand(tmp_path, capsys):
    assert run(tmp_path, *["{"] * 30) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21 and "line 20 " in said[19] and "10 more mistakes" in said[20]
