"""The texts of mappings: places for values, forms, boxes, patterns of lines."""

from __future__ import annotations

from typing import Any

import pytest

from vlbench.data.annotation_mapping import BoxText
from vlbench.data.box_texts import box_text
from vlbench.data.mapping_texts import LinePattern, parse_template
from vlbench.errors import BadSample, UserError

VALUES: dict[str, Any] = {
    "n": 7,
    "half": 0.5,
    "whole": 3.0,
    "name": "a b",
    "deep": {"er": [{"x": "p"}, {"x": "q"}, {"x": "q"}, {"x": "p"}]},
    "url": "https://x/y/VG_100K_2/1.tar.jpg?size=3",
    "bare": "noext",
    "猫": "cat",
    "mixed": ["2", 2, 1],
}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{n}", "7"),
        ("{n:03}-{n:012}", "007-000000000007"),
        ("{half} {whole}", "0.5 3"),
        ("{{{name}}}", "{a b}"),
        ("{deep.er.x:majority}", "p"),
        ("{mixed:majority}", "2"),
        ("{url:folder}/{url:suffix}", "VG_100K_2/.jpg"),
        ("[{bare:suffix}{bare:folder}]", "[]"),
        ("{猫}", "cat"),
        ("", ""),
    ],
)
def test_places_are_filled(text: str, filled: str) -> None:
    assert parse_template(text).fill(VALUES) == filled


@pytest.mark.parametrize(
    "text",
    ["{}", "{n!r}", "{n[0]}", "{n.}", "{.n}", "{a b}", "{n:}}", "{n:x}", "{n:10}", "}", "{n"],
)
def test_other_places_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_template(text)


@pytest.mark.parametrize("value", [None, True, [], {}, float("nan")])
def test_what_is_no_text_is_not_filled_in(value: Any) -> None:
    with pytest.raises(BadSample, match="'v' is .*; expected a text or a number"):
        parse_template("{v}").fill({"v": value})


BOXES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"xywh": ("b",)}, {"b": [10, 20, 30, 40]}, "[0.1, 0.45, 0.4, 0.85]"),
    ({"xyxy": ("b",)}, {"b": [10, 20, 30, 40]}, "[0.1, 0.45, 0.3, 0.65]"),
    ({"xyxy": ("b",), "frame": "image"}, {"b": [10, 20, 30, 40]}, "[0.1, 0.4, 0.3, 0.8]"),
    ({"xywh": tuple("xyuv")}, dict(x=0, y=0, u=100, v=50), "[0.0, 0.25, 1.0, 0.75]"),
    ({"xyxy": ("b",)}, {"b": [-5, 0, 200, 50.4]}, "[0.0, 0.25, 1.0, 0.75]"),
]


@pytest.mark.parametrize(("declared", "values", "text"), BOXES)
def test_a_box_is_shares_of_the_padded_picture(declared, values, text) -> None:
    box = BoxText(**declared, size=("w", "h"))
    assert box_text({"w": 100, "h": 50, **values}, box) == text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"b": [1, 2, 3], "w": 9, "h": 9}, "'b' has 3 numbers; a box has 4"),
        ({"b": [1, 2, 3, "4"], "w": 9, "h": 9}, 'is a text ."4".; expected a number'),
        ({"b": [1, 2, 3, 4], "w": 0, "h": 9}, "the picture's size is 0 x 9"),
        ({"b": [1, 2, 3, 4], "w": 9}, "has no 'h'"),
    ],
)
def test_what_is_no_box_is_told(values, words) -> None:
    with pytest.raises(BadSample, match=words):
        box_text(values, BoxText(xywh=("b",), size=("w", "h")))


def test_a_line_is_cut_at_what_stands_between_names() -> None:
    pattern = LinePattern("{image}#{n}\t{text}")
    assert pattern.read_line("a#1.jpg#0\tb\tc#2") == {
        "image": "a",
        "n": "1.jpg#0",
        "text": "b\tc#2",
    }
    assert LinePattern("{image}| {n}| {text}").read_line("a| 1| b ")["text"] == "b "
    for line in ("a#0", "#0\tb", "a#0\t"):
        with pytest.raises(UserError, match="the line is a text"):
            pattern.read_line(line)
