"""Long answers are parsed in linear time, and as by the patterns of the benchmarks' own scorers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from forked_command import run_command

from vlbench.evaluate.tasks.answer_parsing import FILL_IN_NUMBER_PATTERNS, OPEN_NUMBER_PATTERNS

REFERENCE_PATTERNS = {
    OPEN_NUMBER_PATTERNS: (
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])",
    ),
    FILL_IN_NUMBER_PATTERNS: (
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d*\.\d+|\d+)(?![eE][+-]?\d)(?!，\d)",
    ),
}


@pytest.mark.parametrize("patterns", REFERENCE_PATTERNS, ids=["open", "fill in"])
def test_the_patterns_find_what_those_of_the_scorers_find(patterns: tuple[re.Pattern]) -> None:
    generator = random.Random(0)
    for _ in range(60_000):
        text = "".join(generator.choices("0123.,-+eE，x ٣", k=generator.randint(1, 14)))
        for ours, theirs in zip(patterns[1:], REFERENCE_PATTERNS[patterns], strict=True):
            assert ours.findall(text) == re.findall(theirs, text), (text, theirs)


# 100,000 digits took 7 minutes where each of them was a start of a search for the end
LONG = {
    "digits": "1" * 400_000,
    "digits before a letter": "1" * 400_000 + "e5x",
    "brackets": "[" * 400_000,
    "dots": "1." * 200_000,
    "signs": "-" * 400_000,
    "thousands": "1,111" * 80_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_answer_is_scored_in_time(name: str, tmp_path: Path) -> None:
    record = {"id": "validation_Art_1", "answer": "7", "options": [], "response": LONG[name]}
    record |= {"question_type": "open"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(record) + "\n")
    outcome = run_command(
        ["score", "task=mmmu", "answers=answers.jsonl", "protocol=official"], tmp_path
    )
    outcome.assert_modest()
    assert outcome.code == 0, outcome.words
