"""A letter is no answer where the options that it is one of are shown nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlbench.data.conversation_files import ConversationFiles
from vlbench.errors import BadSample

QUESTION = "Which colour is it?"
LISTED = {"options": ["red", "blue"]}
ARC = {"choices": {"label": ["A", "B"], "text": ["red", "blue"]}}
LETTERED = {"A": "red", "B": "blue", "hint": ""}


def read(folder: Path, record: dict[str, Any]) -> ConversationFiles:
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    (folder / "rows.json").write_text(json.dumps([{"image": "a.jpg", **record}]))
    return ConversationFiles(folder / "rows.json")


@pytest.mark.parametrize(
    "options", [LISTED, LETTERED, ARC, {"choices": LISTED["options"]}, {"options": {"B": "blue"}}]
)
@pytest.mark.parametrize("answer", ["B", "(B)", "B."])
def test_the_letter_of_an_option_that_is_not_shown_is_refused(options, answer, tmp_path):
    with pytest.raises(BadSample, match="the question does not show them: write them into"):
        read(tmp_path, {"question": QUESTION, "answer": answer, **options})[0]


@pytest.mark.parametrize(
    "record",
    [
        {"question": f"{QUESTION}\nA. red\nB. blue", "answer": "B", **LISTED},
        {"question": f"{QUESTION} Red (A) or blue (B)?", "answer": "B", "options": ["red"] * 2},
        {"question": QUESTION, "answer": "blue", **LETTERED},  # the text, which needs no options
        {"question": "Which letter is it?", "answer": "C", **LISTED},  # none of them
        {"question": "Which letter is it?", "answer": "A"},
        {"question": "Which letter is it?", "answer": "A", "A": 3},  # a key, and no options
    ],
)
def test_what_can_be_answered_stays(record, tmp_path):
    assert read(tmp_path, record)[0].turns[1].text == record["answer"]


def test_a_table_of_multiple_choice_names_the_columns(tmp_path):
    (tmp_path / "rows.tsv").write_text(
        f"image\tquestion\tA\tB\tanswer\na.jpg\t{QUESTION}\tred\tblue\tA\n"
    )
    with pytest.raises(BadSample, match="the answer is 'A', one of the options A B"):
        ConversationFiles(tmp_path / "rows.tsv")[0]
