"""No text acts on the terminal: control characters of ids, paths and words are shown as escapes."""

from __future__ import annotations

import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked_command import run_command

import vlbench
from vlbench import text_files
from vlbench.errors import UserError
from vlbench.printable_streams import PrintableStream, QuotedPieces
from vlbench.text_files import format_json, format_json_lines, write_for_people
from vlbench.text_tables import format_table, markdown_text

HOSTILE = "x\x1b[2J\r\x9b31m\u202egnp\x07\nvlbench: all is well"
ACTING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def hostile_words(folder: Path) -> dict[str, list[str]]:
    record = {"id": HOSTILE, "image": HOSTILE, "conversations": [{"from": HOSTILE, "value": "a"}]}
    (folder / "data.json").write_text(json.dumps([record]))
    answer = {"id": HOSTILE, "answer": "A", "options": ["a", "b"], "response": HOSTILE}
    answers = [answer, {**answer, "question_type": HOSTILE}, {"id": HOSTILE}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    fit = ["fit", "recipe=yivl_llava"]
    return {
        "verb": [HOSTILE],
        "recipe": ["fit", f"recipe={HOSTILE}"],
        "key": [*fit, f"{HOSTILE}=1"],
        "value": [*fit, f"seed={HOSTILE}"],
        "connector": [*fit, f"connector.name={HOSTILE}"],
        "weights": [*fit, f"language.weights={HOSTILE}"],
        "data file": [*fit, f"data.train={HOSTILE}"],
        "record": [*fit, "data.train=data.json", "data.images=."],
        "checked record": ["check", "data.train=data.json", "data.images=."],
        "answers": ["score", "task=mmmu", "answers=answers.jsonl", "protocol=official"],
        "model": ["chat", f"model={HOSTILE}"],
        "evaluated model": ["eval", f"model={HOSTILE}", "task=mmmu"],
        "run": ["report", HOSTILE],
        "listed": ["list", HOSTILE],
        "row": ["compare", "recipe=yivl_llava", f"connectors={HOSTILE}"],
    }


NAMES = (
    *("verb", "recipe", "key", "value", "connector", "weights", "data file", "record", "answers"),
    *("checked record", "model", "evaluated model", "run", "listed", "row"),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_hostile_word_is_answered_with_is_printable(name: str, tmp_path: Path) -> None:
    outcome = run_command(hostile_words(tmp_path)[name], tmp_path)
    outcome.assert_modest()
    assert outcome.words and "Traceback" not in outcome.words, outcome.words
    assert not ACTING.search(outcome.words), ascii(outcome.words)
    forged = re.search("^(vlbench: )?(all is well|vlbench: all)", outcome.words, re.MULTILINE)
    assert not forged, outcome.words


def test_a_stream_escapes_all_but_line_ends_and_the_returns_of_bars() -> None:
    inner = io.StringIO()
    stream = PrintableStream(inner, carries_bars=True)
    print(f"id {HOSTILE}", file=stream)
    stream.write("\r 50%|#####     |\r")
    first, rest = inner.getvalue().split("\n", 1)
    assert "\\x1b[2J\\r\\x9b31m\\u202egnp\\x07\\nvlbench: all is well" in first
    assert rest == "\r 50%|#####     |\r" and not ACTING.search(first)
    plain = io.StringIO()
    PrintableStream(plain, carries_bars=False).write("\rover\tit\n中文 é\n")
    assert plain.getvalue() == "\\rover\\tit\n中文 é\n"


def test_lines_of_errors_tables_and_markdown_stay_lines() -> None:
    error = UserError(f"row {HOSTILE}", "second")
    assert len(str(error).split("\n")) == 2 and not ACTING.search(str(error))
    assert len(format_table([["a", HOSTILE], ["b", "c"]])) == 2
    assert not ACTING.search(markdown_text(HOSTILE)) and "\n" not in markdown_text(HOSTILE)
    assert markdown_text("a|b`c`") == "a\\|b'c'"


def test_markdown_holds_no_tags_and_no_links() -> None:
    shown = markdown_text("<img src=x> </a> <!-- x [a](http://b) ![c](d) p < 0.1 [0, 1]")
    assert shown == "\\<img src=x> \\</a> \\<!-- x [a]\\(http://b) ![c]\\(d) p < 0.1 [0, 1]"


def test_json_for_people_shows_escapes_and_means_the_same() -> None:
    value = {HOSTILE: [HOSTILE, "\x7f\x85\u2028\u2066 中文 \u0301", 1.5]}
    for text in (format_json(value), format_json(value, indent=1), format_json_lines([value])):
        assert json.loads(text) == value and not ACTING.search(text) and "中文" in text
    assert json.loads(format_json(["\ud800"])) == ["\ud800"]
    assert format_json(["\ud800"]).encode()


def test_a_text_for_people_shows_escapes(tmp_path: Path) -> None:
    write_for_people(tmp_path / "report.txt", f"one {HOSTILE}\ntwo \udc80\n")
    text = (tmp_path / "report.txt").read_text()
    assert not ACTING.search(text) and "\\x1b[2J" in text and "two \\udc80\n" in text


RAW_JSON = {
    "text_files.py": "format_json itself",
    "errors.py": "a word of a message, which escapes it",
    "strict_values.py": "a word of a command, which what prints it escapes",
    "evaluate/tasks/answer_files.py": "a word of a message, which escapes it",
    "evaluate/tasks/benchmark_types.py": "a word of a message, which escapes it",
    "evaluate/tasks/answer_formats.py": "looks for halves of surrogate pairs",
    "evaluate/tasks/conversation_tasks.py": "a hash",
    "model/weights/tensor_layout.py": "the header of a safetensors file",
    "train/checkpoint_files.py": "preprocess.json, whose bytes are compared",
}


def test_every_file_of_json_is_written_by_what_escapes() -> None:
    package = Path(text_files.__file__).parent
    raw = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if "ensure_ascii=False" in file.read_text() and "miniatures" not in file.parts
    }
    assert raw == RAW_JSON.keys(), raw ^ RAW_JSON.keys()


def test_what_check_and_score_write_shows_escapes(tmp_path: Path) -> None:
    words = hostile_words(tmp_path)
    run_command([*words["checked record"], "recipe=yivl_llava", "out=checked"], tmp_path)
    good = {"id": "validation_Art_1", "answer": "7", "options": [], "question_type": "open"}
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(json.dumps({**good, "response": HOSTILE}) + "\n")
    run_command([*words["answers"], "out=scored"], tmp_path)
    files = [file for name in ("checked", "scored") for file in (tmp_path / name).iterdir()]
    names = {file.name for file in files}
    assert {"report.txt", "findings.jsonl", "audit.html", "bad.txt", "scored.jsonl"} <= names
    for file in files:
        text = file.read_text()
        assert not ACTING.search(text), (file.name, ascii(ACTING.search(text)))


def test_what_is_called_from_python_prints_escapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streams of threads that overlap are put back by the last one."""
    before = sys.stdout

    def fit_keys(keys: dict[str, object]) -> None:
        if keys["recipe"] == "outer":
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(vlbench.fit, ["inner"] * 2))
        print(HOSTILE)

    monkeypatch.setattr("vlbench.python_fit.fit_keys", fit_keys)
    vlbench.fit("outer")
    assert sys.stdout is before
    said = capsys.readouterr().out
    assert said.count("\\x1b[2J") == 3 and not ACTING.search(said)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_no_line_of_an_answer_in_pieces_begins_as_a_message(size: int) -> None:
    text = "vlbench: done\nvlbench: saved\nvlb and vlbench: here\n\nvlbench:"
    written: list[str] = []
    shown = QuotedPieces(written.append)
    for start in range(0, len(text), size):
        shown(text[start : start + size])
    shown.finish()
    whole = "".join(written)
    assert not any(line.startswith("vlbench:") for line in whole.splitlines())
    assert whole.replace("\\", "") == text
