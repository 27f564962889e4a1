"""No text acts on the terminal: control characters of ids, paths and words are shown as escapes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from forked_command import run_command

from vlbench.errors import UserError
from vlbench.printable_streams import PrintableStream, QuotedPieces
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
