"""Examples as one PNG: a grid of cards, each with the images, the question and the answers.

The font is embedded (`font/README.md`), so the same examples give the same PNG everywhere.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlbench.text_files import replace_when_written

FONT_FILE = Path(__file__).parent / "font/vlbench-sans.ttf"

# Lengths in pixels: three columns make 1200.
MAX_COLUMNS = 3
PAGE_MARGIN, CARD_GAP, CARD_WIDTH = 20, 16, 376
CARD_PADDING = 16  # inside a card
TEXT_WIDTH = CARD_WIDTH - 2 * CARD_PADDING  # width of a card's text
LABEL_WIDTH = 60  # width of the column of "model" and "truth"
IMAGE_HEIGHT = 224  # height of the images of a card, a multiple of sides of 112 and 56
IMAGE_AREA_HEIGHT = IMAGE_HEIGHT + 2 * CARD_PADDING  # of their background
MAX_IMAGES = 4  # per card; the number of further ones is written
TITLE_SIZE, TEXT_SIZE, SMALL_TEXT_SIZE = 25, 17, 14  # font sizes

Colour = tuple[int, int, int]
PAGE_COLOUR: Colour = (238, 241, 245)
WHITE: Colour = (255, 255, 255)
IMAGE_AREA_COLOUR: Colour = (248, 249, 251)
EDGE_COLOUR: Colour = (213, 218, 226)
TEXT_COLOUR: Colour = (28, 32, 40)
FAINT_COLOUR: Colour = (104, 113, 126)
# Blue and orange differ for every kind of colour vision; the word is written as well.
CORRECT_COLOUR: Colour = (0, 105, 170)
WRONG_COLOUR: Colour = (198, 80, 0)

_OPENING_MARKS = "(\\[{<\u2018\u201c（［｛〈《「『【〔"  # must not end a line
# must not begin one
_CLOSING_MARKS = ")\\]}>\u2019\u201d）］｝〉》」』】〕,.;:!?%，。、；：！？％\u2026"
# A line may end after any of these: Chinese has no spaces.
_CJK_RANGES = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_UNBREAKABLE_PIECE = re.compile(
    rf"\s+|[{_OPENING_MARKS}]*(?:[{_CJK_RANGES}]|[^\s{_CJK_RANGES}]+)[{_CLOSING_MARKS}]*"
)
_NOT_BEFORE_ELLIPSIS = " .,\u2026，。、"  # not before an ellipsis
_MAX_CHARACTERS = 4000  # of a text that are laid out: far more than there is room for


@dataclass(frozen=True)
class AnsweredExample:
    """A question about images, the model's answer, and the true one."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    truth: str

    @property
    def is_correct(self) -> bool:
        """Whether the answer is the true one, word for word."""
        return self.answer == self.truth


def draw_examples(examples: list[AnsweredExample], path: Path, title: str) -> None:
    """Draw the examples as cards, three a row, into the PNG `path`, which is written atomically.

    Long texts end in an ellipsis; characters that the font lacks become boxes.
    """
    cards = [_ExampleCard(example) for example in examples]
    columns = min(MAX_COLUMNS, len(cards)) or 1
    width = 2 * PAGE_MARGIN + columns * CARD_WIDTH + (columns - 1) * CARD_GAP
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    heading = _wrap_text(title, TITLE_SIZE, width - 2 * PAGE_MARGIN, 2)
    top = PAGE_MARGIN + _block_height(heading, TITLE_SIZE) + _line_height(TEXT_SIZE) + CARD_GAP
    bottom = top + sum(h + CARD_GAP for h in heights) - (CARD_GAP if rows else 0) + PAGE_MARGIN
    sheet = Image.new("RGB", (width, bottom), PAGE_COLOUR)
    y = _draw_lines(sheet, PAGE_MARGIN, PAGE_MARGIN, heading, TITLE_SIZE, TEXT_COLOUR)
    right = sum(example.is_correct for example in examples)
    _draw_lines(
        sheet,
        PAGE_MARGIN,
        y,
        [f"{right} of {len(examples)} shown are right"],
        TEXT_SIZE,
        FAINT_COLOUR,
    )
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            card.draw_card(sheet, PAGE_MARGIN + column * (CARD_WIDTH + CARD_GAP), top, height)
        top += height + CARD_GAP
    _save_png(sheet, path)


def _save_png(sheet: Image.Image, path: Path) -> None:
    with replace_when_written(path) as temporary:
        sheet.save(temporary, format="PNG")


class _ExampleCard:
    """One example with its text broken into lines, which gives its height before it is drawn."""

    def __init__(self, example: AnsweredExample) -> None:
        self.example = example
        self.question_lines = _wrap_text(example.question, TEXT_SIZE, TEXT_WIDTH, 4)
        self.answer_lines = _wrap_text(
            _clean_text(example.answer) or "(nothing)", TEXT_SIZE, TEXT_WIDTH - LABEL_WIDTH, 6
        )
        self.truth_lines = _wrap_text(example.truth, TEXT_SIZE, TEXT_WIDTH - LABEL_WIDTH, 4)
        lines = (self.question_lines, self.answer_lines, self.truth_lines)
        self.height = (
            IMAGE_AREA_HEIGHT
            + 2 * CARD_PADDING
            + 2 * (CARD_PADDING // 2)
            + sum(_block_height(block, TEXT_SIZE) for block in lines)
        )

    def draw_card(self, sheet: Image.Image, x: int, y: int, height: int) -> None:
        """Draw it with the top left corner at (x, y), `height` pixels high."""
        colour, verdict = (
            (CORRECT_COLOUR, "right") if self.example.is_correct else (WRONG_COLOUR, "wrong")
        )
        _draw_rounded_box(sheet, (x, y, x + CARD_WIDTH, y + height), 10, EDGE_COLOUR)
        _draw_rounded_box(sheet, (x + 1, y + 1, x + CARD_WIDTH - 1, y + height - 1), 9, WHITE)
        _draw_rounded_box(
            sheet, (x + 1, y + 1, x + CARD_WIDTH - 1, y + IMAGE_AREA_HEIGHT), 9, IMAGE_AREA_COLOUR
        )
        sheet.paste(
            colour, (x + 1, y + IMAGE_AREA_HEIGHT - 3, x + CARD_WIDTH - 1, y + IMAGE_AREA_HEIGHT)
        )
        _paste_images(sheet, self.example.images, x + CARD_PADDING, y + CARD_PADDING - 2)
        _draw_badge(
            sheet, verdict, x + CARD_WIDTH - CARD_PADDING, y + IMAGE_AREA_HEIGHT - 2, colour
        )
        x, y = x + CARD_PADDING, y + IMAGE_AREA_HEIGHT + CARD_PADDING
        y = (
            _draw_lines(sheet, x, y, self.question_lines, TEXT_SIZE, TEXT_COLOUR)
            + CARD_PADDING // 2
        )
        _draw_lines(sheet, x, y, ["model"], SMALL_TEXT_SIZE, FAINT_COLOUR, TEXT_SIZE)
        y = (
            _draw_lines(sheet, x + LABEL_WIDTH, y, self.answer_lines, TEXT_SIZE, colour)
            + CARD_PADDING // 2
        )
        _draw_lines(sheet, x, y, ["truth"], SMALL_TEXT_SIZE, FAINT_COLOUR, TEXT_SIZE)
        _draw_lines(sheet, x + LABEL_WIDTH, y, self.truth_lines, TEXT_SIZE, TEXT_COLOUR)


def _paste_images(sheet: Image.Image, images: Sequence[Image.Image], x: int, y: int) -> None:
    """Place the images side by side in the middle of TEXT_WIDTH x IMAGE_HEIGHT pixels."""
    note = "" if images else "no image"
    if len(images) > MAX_IMAGES:
        note = f"+{len(images) - MAX_IMAGES}"
    gap = CARD_PADDING // 2
    note_width = _text_length(note, SMALL_TEXT_SIZE) + (gap if note and images else 0)
    count = max(1, min(len(images), MAX_IMAGES))
    max_width = int(TEXT_WIDTH - note_width - gap * (count - 1)) // count
    scaled = [_scale_image(image, max_width, IMAGE_HEIGHT) for image in images[:MAX_IMAGES]]
    images_width = sum(image.width + gap for image in scaled) - gap * bool(scaled)
    x += int(TEXT_WIDTH - images_width - note_width) // 2
    for image in scaled:
        sheet.paste(image, (x, y + (IMAGE_HEIGHT - image.height) // 2))
        x += image.width + gap
    if note:
        _draw_lines(
            sheet,
            x,
            y + (IMAGE_HEIGHT - _line_height(SMALL_TEXT_SIZE)) // 2,
            [note],
            SMALL_TEXT_SIZE,
            FAINT_COLOUR,
        )


def _scale_image(image: Image.Image, max_width: int, max_height: int) -> Image.Image:
    """Scale an image into width x height; a tiny one by a whole factor, so pixels stay square."""
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip
        image = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    image = image.convert("RGB")
    scale = min(max_width / image.width, max_height / image.height)
    if scale >= 2:
        size = (image.width * int(scale), image.height * int(scale))
        return image.resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def _draw_badge(
    sheet: Image.Image, word: str, right_edge: int, center_y: int, colour: Colour
) -> None:
    """Draw a word on a rounded badge that ends at `right_edge`, centred on `center_y`."""
    left = right_edge - round(_text_length(word, SMALL_TEXT_SIZE)) - 24
    _draw_rounded_box(sheet, (left - 2, center_y - 15, right_edge + 2, center_y + 15), 15, WHITE)
    _draw_rounded_box(sheet, (left, center_y - 13, right_edge, center_y + 13), 13, colour)
    _draw_lines(
        sheet,
        left + 12,
        center_y - _line_height(SMALL_TEXT_SIZE) // 2,
        [word],
        SMALL_TEXT_SIZE,
        WHITE,
    )


def _draw_rounded_box(
    sheet: Image.Image, box: tuple[int, int, int, int], radius: int, colour: Colour
) -> None:
    size = (box[2] - box[0], box[3] - box[1])
    sheet.paste(colour, box, _rounded_mask(size, radius))


@functools.lru_cache(maxsize=64)
def _rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """Return a mask of a rounded rectangle, smooth: drawn four times as large, then shrunk."""
    large = Image.new("L", (size[0] * 4, size[1] * 4))
    box = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(box, radius * 4, fill=255)
    return large.reduce(4)


@functools.cache
def _load_font(text_size: int) -> ImageFont.FreeTypeFont:
    # Every build of pillow has the basic layout, and the font has no kerning that it would ignore.
    return ImageFont.truetype(FONT_FILE, text_size, layout_engine=ImageFont.Layout.BASIC)


def _line_height(size: int) -> int:
    """Return the height of a line of text."""
    return round(size * 1.45)


def _block_height(lines: Sequence[str], size: int) -> int:
    return len(lines) * _line_height(size)


def _text_length(text: str, size: int) -> float:
    return _load_font(size).getlength(text)


def _draw_lines(
    sheet: Image.Image,
    x: int,
    y: int,
    lines: Sequence[str],
    size: int,
    colour: Colour,
    baseline_size: int = 0,
) -> int:
    """Write lines downwards, and return the y below them.

    Args:
        sheet: What is drawn on.
        x: The left edge, in pixels.
        y: The top of the first line, in pixels.
        lines: Texts that fit the width.
        size: The font size.
        colour: The colour of the text.
        baseline_size: The font size whose line spacing and baselines are used; 0: `size`.
    """
    draw, step = ImageDraw.Draw(sheet), _line_height(baseline_size or size)
    for line in lines:
        baseline = y + round((baseline_size or size) * 1.08)
        draw.text((x, baseline), line, colour, _load_font(size), anchor="ls")
        y += step
    return y


def _wrap_text(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """Break a text into `max_lines` lines of `width` pixels or fewer; ellipsis where it is cut."""
    lines = [""]
    for piece in _split_breakable(_clean_text(text), size, width):
        if _text_length(lines[-1] + piece.rstrip(), size) > width:
            if len(lines) == max_lines:
                lines[-1] = _cut_with_ellipsis(lines[-1], size, width)
                break
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return [line.rstrip() for line in lines]


def _split_breakable(text: str, size: int, width: int) -> Iterator[str]:
    """Split a text where a line may end; a piece too long for a line, at every character."""
    for piece in _UNBREAKABLE_PIECE.findall(text):
        yield from [piece] if _text_length(piece, size) <= width else piece


def _cut_with_ellipsis(line: str, size: int, width: int) -> str:
    line = line.rstrip(_NOT_BEFORE_ELLIPSIS)
    while line and _text_length(line + "\u2026", size) > width:
        line = line[:-1].rstrip(_NOT_BEFORE_ELLIPSIS)
    return line + "\u2026"


def _clean_text(text: str) -> str:
    """Put a text on one line without invisible characters; lone surrogates become U+FFFD."""
    text = " ".join(unicodedata.normalize("NFC", text[:_MAX_CHARACTERS]).split())
    kinds = ((c, unicodedata.category(c)) for c in text)
    return "".join("\ufffd" if k == "Cs" else c for c, k in kinds if k not in ("Cc", "Cf"))
