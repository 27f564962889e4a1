"""Prompts equal those of the reference byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import pytest

from vlbench.command_line.arguments import TemplateName
from vlbench.data.chat_template import CHAT_TEMPLATES, YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.errors import UserError

CASES = json.loads(
    (Path(__file__).parent / "goldens/yi_vl/tiny_a/cases.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
def test_prompt_equals_the_reference(case):
    turns = [ChatTurn(turn["role"], turn["content"]) for turn in case["conversation"]]
    prompt = CHAT_TEMPLATES["yi_vl"].render_prompt(turns)
    assert prompt == case["prompt"]
    assert hashlib.sha256(prompt.encode()).hexdigest() == case["prompt_sha256"]


def test_pieces_are_cut_around_answers():
    turns = [ChatTurn("human", "a?"), ChatTurn("assistant", " b. "), ChatTurn("human", "c?")]
    pieces = YI_VL.render_pieces([*turns, ChatTurn("assistant", "d.")])
    assert [text for text, learn in pieces if learn] == [" b.\n###", " d.\n###"]
    assert [learn for _, learn in pieces] == [False, True, False, True]
    whole = "".join(text for text, _ in pieces)
    assert whole == YI_VL.render_prompt(turns) + " d.\n###"
    assert whole.startswith(f"{YI_VL.system}\n\n### Human: a?\n### Assistant: b.\n### Human: c?")


def test_a_conversation_may_bring_its_system_prompt():
    prompt = YI_VL.render_prompt([ChatTurn("system", "Be brief."), ChatTurn("human", "Hello")])
    assert prompt == "Be brief.\n\n### Human: Hello\n### Assistant:"


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ([], "missing"),
        (["human", "assistant"], "'assistant'"),
        (["human", "system", "human"], "inside"),
    ],
)
def test_prompts_without_a_last_question_are_refused(roles, words):
    with pytest.raises(UserError, match=words):
        YI_VL.render_prompt([ChatTurn(role, "x") for role in roles])


def test_every_name_that_a_verb_or_a_recipe_takes_has_its_template():
    assert {name: CHAT_TEMPLATES[name].name for name in CHAT_TEMPLATES} == {
        name: name for name in get_args(TemplateName) if name != "auto"
    }
