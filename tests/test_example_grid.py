"""The figure of examples: readable in two languages, tidy whatever is put in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from vlbench.data import scene_text
from vlbench.evaluate import example_grid
from vlbench.evaluate.example_grid import (
    CARD_GAP,
    CARD_PADDING,
    CARD_WIDTH,
    FONT_FILE,
    IMAGE_AREA_HEIGHT,
    PAGE_MARGIN,
    AnsweredExample,
    draw_examples,
)

RED = Image.new("RGB", (112, 112), (200, 30, 40))
LONG = {
    "english": "The red star is at the top left of the picture. " * 20,
    "chinese": "红色的星形在图片的左上角，蓝色的圆形在右下角。" * 20,
    "mixed": "红色的star在左上角（top left），“yes”！" * 20,
    "unbroken": "W" * 2_000_000,
    "marks": "。" * 500,
}


def drawn(folder: Path, *examples: AnsweredExample, title: str = "title") -> np.ndarray:
    """Draw examples and read them back, [height, width, 3]."""
    draw_examples(list(examples), folder / "examples.png", title)
    with Image.open(folder / "examples.png") as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def example(question: str = "q", answer: str = "a", truth: str = "a", image=RED) -> AnsweredExample:
    """Make an example about one image."""
    return AnsweredExample((image,), question, answer, truth)


def colours(pixels: np.ndarray) -> set[tuple[int, ...]]:
    """Return the colours that occur."""
    return {tuple(map(int, c)) for c in np.unique(pixels.reshape(-1, 3), axis=0)}


def test_three_columns_are_1200_pixels_wide_and_no_temporary_file_stays(tmp_path):
    twelve = drawn(tmp_path, *[example()] * 12)
    assert twelve.shape[1] == 1200
    four = drawn(tmp_path, *[example()] * 4)
    assert twelve.shape[0] > four.shape[0] > drawn(tmp_path, example()).shape[0]
    assert [p.name for p in tmp_path.iterdir()] == ["examples.png"]


def test_no_examples_give_the_title_alone(tmp_path):
    assert drawn(tmp_path).shape[0] < IMAGE_AREA_HEIGHT


def test_every_chinese_character_looks_different(tmp_path):
    images = [drawn(tmp_path, example(c)) for c in "红蓝黄绿圆方，？"]
    images += [drawn(tmp_path, example("\U0001f43c"))]
    for i, one in enumerate(images):
        assert all((one != other).any() for other in images[:i])


def test_characters_without_a_glyph_are_the_same_box(tmp_path):
    panda, cat = (drawn(tmp_path, example(c)) for c in "\U0001f43c\U0001f431")
    assert (panda == cat).all()
    assert (panda != drawn(tmp_path, example(""))).any()
    half = drawn(tmp_path, example("\ud800"))  # half a character, as a broken decoder gives
    assert (half == panda).all()


def test_the_font_holds_all_words_of_the_rendered_world():
    font = ImageFont.truetype(FONT_FILE, 17, layout_engine=ImageFont.Layout.BASIC)
    source = Path(scene_text.__file__).read_text(encoding="utf-8")
    latin = "".join(map(chr, range(0x21, 0x7F))) + "\u2026\u201c\u201d\u2018\u2019\u00e9\u00fc"
    box = bytes(font.getmask("\U0001f43c"))
    assert [c for c in sorted(set(source + latin) - {"\n"}) if bytes(font.getmask(c)) == box] == []


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_stay_in_their_card(kind, tmp_path):
    text = LONG[kind]
    pixels = drawn(tmp_path, example(text, text, text), title=text)
    bottom = pixels.shape[0] - PAGE_MARGIN
    inside = pixels[bottom - 150 : bottom - 12]
    right = PAGE_MARGIN + CARD_WIDTH
    assert colours(inside[:, right - CARD_PADDING + 1 : right - 1]) == {example_grid.WHITE}
    assert colours(inside[:, PAGE_MARGIN + 1 : PAGE_MARGIN + CARD_PADDING - 1]) == {
        example_grid.WHITE
    }
    assert colours(
        pixels[bottom - CARD_PADDING + 2 : bottom - 1, PAGE_MARGIN + 12 : right - 12]
    ) == {example_grid.WHITE}
    assert colours(pixels[:, right:]) == colours(pixels[bottom:]) == {example_grid.PAGE_COLOUR}


def test_a_long_text_makes_its_card_higher_and_its_row_with_it(tmp_path):
    long, short = example(answer=LONG["chinese"]), example()
    both = drawn(tmp_path, long, short)
    assert len(both) == len(drawn(tmp_path, long)) > len(drawn(tmp_path, short))
    second = both[
        -PAGE_MARGIN - 12 - CARD_PADDING, PAGE_MARGIN + CARD_WIDTH + CARD_GAP + 1 : -PAGE_MARGIN - 1
    ]
    assert colours(second) == {example_grid.WHITE}


def test_lines_break_at_spaces_and_between_chinese_characters_but_not_before_marks():
    words = "one two three " * 9
    assert " ".join(example_grid._wrap_text(words, 17, 120, 99)) == words.strip()
    chinese = LONG["chinese"][:100]
    for width in range(90, 130, 3):
        lines = example_grid._wrap_text(chinese, 17, width, 99)
        assert "".join(lines) == chinese
        assert all(line[0] not in "，。" for line in lines)
        assert all(len(a) > 3 for a, _ in pairwise(lines))
    assert all(line[-1] != "（" for line in example_grid._wrap_text("左（右）" * 20, 17, 110, 99))


def test_a_cut_text_ends_in_an_ellipsis_and_a_fitting_one_does_not():
    assert example_grid._wrap_text("a b", 17, 100, 1) == ["a b"]
    assert example_grid._wrap_text("", 17, 100, 1) == [""]
    (line,) = example_grid._wrap_text("A long text, and longer still.", 17, 100, 1)
    assert line.endswith("\u2026") and "A long text\u2026".startswith(line[:-1])
    assert example_grid._wrap_text("a\n\n b\x00\u200b\tc", 17, 100, 1) == ["a b c"]


def test_right_and_wrong_differ_in_colour(tmp_path):
    right, wrong = colours(drawn(tmp_path, example())), colours(drawn(tmp_path, example("q", "b")))
    assert example_grid.CORRECT_COLOUR in right and example_grid.WRONG_COLOUR not in right
    assert example_grid.WRONG_COLOUR in wrong and example_grid.CORRECT_COLOUR not in wrong


ODD = {
    "1x1": Image.new("RGB", (1, 1), (9, 200, 9)),
    "strip": Image.new("RGB", (30000, 2), (9, 200, 9)),
    "tall": Image.new("RGB", (2, 30000), (9, 200, 9)),
    "gray": Image.new("L", (40, 30), 77),
    "bilevel": Image.new("1", (40, 30), 1),
    "gray16": Image.fromarray(np.full((30, 40), 77 * 257, np.uint16)),
    "gray32": Image.new("I", (40, 30), 77 * 257),
    "palette": Image.new("RGB", (40, 30), (9, 200, 9)).convert("P"),
    "rgba": Image.new("RGBA", (40, 30), (9, 200, 9, 255)),
    "cmyk": Image.new("RGB", (40, 30), (9, 200, 9)).convert("CMYK"),
    "large": Image.new("RGB", (3000, 2000), (9, 200, 9)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_shown_in_their_colour(kind, tmp_path):
    shown = colours(drawn(tmp_path, example(image=ODD[kind])))
    if kind.startswith("gray"):
        assert (77, 77, 77) in shown
    elif kind not in ("bilevel", "palette"):
        assert (9, 200, 9) in shown


def test_tiny_images_keep_sharp_pixels(tmp_path):
    board = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8))
    plain, shown = (colours(drawn(tmp_path, example(image=i))) for i in (RED, board))
    assert shown - plain <= {(0, 0, 0), (255, 255, 255)}


@pytest.mark.parametrize("count", [0, 2, 3, 4, 9])
def test_any_number_of_images_fits_the_card(count, tmp_path):
    pixels = drawn(tmp_path, AnsweredExample((RED,) * count, "q", "a", "a"))
    red = np.flatnonzero((pixels == (200, 30, 40)).all(-1).any(0))
    assert len(red) > 200 if count else len(red) == 0
    assert (
        not count
        or PAGE_MARGIN + CARD_PADDING <= red[0] <= red[-1] < PAGE_MARGIN + CARD_WIDTH - CARD_PADDING
    )


def test_a_failure_leaves_the_old_figure_and_nothing_else(tmp_path, monkeypatch):
    before = drawn(tmp_path, example())

    def broken(self: Image.Image, path: Path, **options: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        draw_examples([example("other")], tmp_path / "examples.png", "title")
    assert [p.name for p in tmp_path.iterdir()] == ["examples.png"]
    with Image.open(tmp_path / "examples.png") as image:
        assert (np.asarray(image) == before).all()
