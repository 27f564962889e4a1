"""Examples as a picture: a grid of cards, each with the picture, the question and the answers.

The font is embedded (`font/README.md`), so the same examples give the same picture everywhere.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path(__file__).parent / "font/vlbench-sans.ttf"

# Lengths in pixels: three columns make 1200.
COLUMNS = 3
MARGIN, GAP, CARD = 20, 16, 376
PAD = 16  # inside a card
TEXT = CARD - 2 * PAD  # width of a card's text
LABEL = 60  # width of the column of "model" and "truth"
SHOWN = 224  # height of the pictures of a card: the sides of 112 and of 56 fit it exactly
STAGE = SHOWN + 2 * PAD  # the ground on which they stand
PICTURES = 4  # per card; how many more there are is written
TITLE_SIZE, SIZE, SMALL = 25, 17, 14  # of letters

Colour = tuple[int, int, int]
PAPER: Colour = (238, 241, 245)
WHITE: Colour = (255, 255, 255)
GROUND: Colour = (248, 249, 251)
EDGE: Colour = (213, 218, 226)
INK: Colour = (28, 32, 40)
FAINT: Colour = (104, 113, 126)
# Blue and orange are told apart by every kind of colour vision; the word is written as well.
RIGHT: Colour = (0, 105, 170)
WRONG: Colour = (198, 80, 0)

_OPEN = "(\\[{<\u2018\u201c（［｛〈《「『【〔"  # must not end a line
_CLOSE = ")\\]}>\u2019\u201d）］｝〉》」』】〕,.;:!?%，。、；：！？％\u2026"  # nor these begin one
# A line may end after any of these: Chinese has no spaces.
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_PIECE = re.compile(rf"\s+|[{_OPEN}]*(?:[{_WIDE}]|[^\s{_WIDE}]+)[{_CLOSE}]*")
_NO_DOTS = " .,\u2026，。、"  # not before an ellipsis
_LONGEST = 4000  # characters that are looked at: far more than any text here has room for


@dataclass(frozen=True)
class Example:
    """A question about pictures, the model's answer, and the true one."""

    pictures: tuple[Image.Image, ...]
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        """Say whether the answer is the true one, word for word."""
        return self.answer == self.truth


def draw_examples(examples: list[Example], path: Path, title: str) -> None:
    """Draw the examples as cards in rows of three into the PNG `path`; nothing half is ever there.

    Long texts end in an ellipsis; characters that the font lacks become boxes.
    """
    cards = [_Card(example) for example in examples]
    columns = min(COLUMNS, len(cards)) or 1
    width = 2 * MARGIN + columns * CARD + (columns - 1) * GAP
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    heading = _wrap(title, TITLE_SIZE, width - 2 * MARGIN, 2)
    top = MARGIN + _tall(heading, TITLE_SIZE) + _line(SIZE) + GAP
    bottom = top + sum(h + GAP for h in heights) - (GAP if rows else 0) + MARGIN
    sheet = Image.new("RGB", (width, bottom), PAPER)
    y = _write(sheet, MARGIN, MARGIN, heading, TITLE_SIZE, INK)
    right = sum(example.right for example in examples)
    _write(sheet, MARGIN, y, [f"{right} of {len(examples)} shown are right"], SIZE, FAINT)
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            card.draw(sheet, MARGIN + column * (CARD + GAP), top, height)
        top += height + GAP
    _save(sheet, path)


def _save(sheet: Image.Image, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        sheet.save(temporary, format="PNG")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Card:
    """One example with its lines broken; its height is known before it is drawn."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.question = _wrap(example.question, SIZE, TEXT, 4)
        self.answer = _wrap(_clean(example.answer) or "(nothing)", SIZE, TEXT - LABEL, 6)
        self.truth = _wrap(example.truth, SIZE, TEXT - LABEL, 4)
        lines = (self.question, self.answer, self.truth)
        self.height = STAGE + 2 * PAD + 2 * (PAD // 2) + sum(_tall(one, SIZE) for one in lines)

    def draw(self, sheet: Image.Image, x: int, y: int, height: int) -> None:
        """Draw it with the top left corner at (x, y), `height` pixels high."""
        colour, verdict = (RIGHT, "right") if self.example.right else (WRONG, "wrong")
        _rounded(sheet, (x, y, x + CARD, y + height), 10, EDGE)
        _rounded(sheet, (x + 1, y + 1, x + CARD - 1, y + height - 1), 9, WHITE)
        _rounded(sheet, (x + 1, y + 1, x + CARD - 1, y + STAGE), 9, GROUND)
        sheet.paste(colour, (x + 1, y + STAGE - 3, x + CARD - 1, y + STAGE))
        _show(sheet, self.example.pictures, x + PAD, y + PAD - 2)
        _badge(sheet, verdict, x + CARD - PAD, y + STAGE - 2, colour)
        x, y = x + PAD, y + STAGE + PAD
        y = _write(sheet, x, y, self.question, SIZE, INK) + PAD // 2
        _write(sheet, x, y, ["model"], SMALL, FAINT, SIZE)
        y = _write(sheet, x + LABEL, y, self.answer, SIZE, colour) + PAD // 2
        _write(sheet, x, y, ["truth"], SMALL, FAINT, SIZE)
        _write(sheet, x + LABEL, y, self.truth, SIZE, INK)


def _show(sheet: Image.Image, pictures: Sequence[Image.Image], x: int, y: int) -> None:
    """Place the pictures side by side in the middle of a stage of TEXT x SHOWN pixels."""
    more = "" if pictures else "no picture"
    if len(pictures) > PICTURES:
        more = f"+{len(pictures) - PICTURES}"
    gap = PAD // 2
    length = _length(more, SMALL) + (gap if more and pictures else 0)
    count = max(1, min(len(pictures), PICTURES))
    room = int(TEXT - length - gap * (count - 1)) // count
    fitted = [_fit(picture, room, SHOWN) for picture in pictures[:PICTURES]]
    x += int(TEXT - sum(one.width + gap for one in fitted) + gap * bool(fitted) - length) // 2
    for one in fitted:
        sheet.paste(one, (x, y + (SHOWN - one.height) // 2))
        x += one.width + gap
    if more:
        _write(sheet, x, y + (SHOWN - _line(SMALL)) // 2, [more], SMALL, FAINT)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scale a picture into width x height; a tiny one by a whole number, its pixels kept square."""
    if picture.mode.startswith("I"):  # 16-bit gray, which convert() would clip
        picture = picture.convert("I").point(lambda level: level * (1 / 257)).convert("L")
    picture = picture.convert("RGB")
    scale = min(width / picture.width, height / picture.height)
    if scale >= 2:
        size = (picture.width * int(scale), picture.height * int(scale))
        return picture.resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def _badge(sheet: Image.Image, word: str, right: int, middle: int, colour: Colour) -> None:
    """Draw a word on a pill that ends at x = `right` and is centred on y = `middle`."""
    left = right - round(_length(word, SMALL)) - 24
    _rounded(sheet, (left - 2, middle - 15, right + 2, middle + 15), 15, WHITE)
    _rounded(sheet, (left, middle - 13, right, middle + 13), 13, colour)
    _write(sheet, left + 12, middle - _line(SMALL) // 2, [word], SMALL, WHITE)


def _rounded(
    sheet: Image.Image, box: tuple[int, int, int, int], radius: int, colour: Colour
) -> None:
    size = (box[2] - box[0], box[3] - box[1])
    sheet.paste(colour, box, _rounded_mask(size, radius))


@functools.lru_cache(maxsize=64)
def _rounded_mask(size: tuple[int, int], radius: int) -> Image.Image:
    """Return a mask of a rounded rectangle, smooth: drawn four times as large, then shrunk."""
    large = Image.new("L", (size[0] * 4, size[1] * 4))
    whole = (0, 0, large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle(whole, radius * 4, fill=255)
    return large.reduce(4)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of pillow, and the font has no kerning that it would miss.
    return ImageFont.truetype(FONT, size, layout_engine=ImageFont.Layout.BASIC)


def _line(size: int) -> int:
    """Return the height of a line of text."""
    return round(size * 1.45)


def _tall(lines: Sequence[str], size: int) -> int:
    return len(lines) * _line(size)


def _length(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _write(
    sheet: Image.Image,
    x: int,
    y: int,
    lines: Sequence[str],
    size: int,
    colour: Colour,
    beside: int = 0,
) -> int:
    """Write lines from (x, y) down, return the y below; share the baselines of size `beside`."""
    draw, step = ImageDraw.Draw(sheet), _line(beside or size)
    for line in lines:
        baseline = y + round((beside or size) * 1.08)
        draw.text((x, baseline), line, colour, _font(size), anchor="ls")
        y += step
    return y


def _wrap(text: str, size: int, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels; what is cut ends in an ellipsis."""
    lines = [""]
    for piece in _pieces(_clean(text), size, width):
        if _length(lines[-1] + piece.rstrip(), size) > width:
            if len(lines) == most:
                lines[-1] = _cut(lines[-1], size, width)
                break
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return [line.rstrip() for line in lines]


def _pieces(text: str, size: int, width: int) -> Iterator[str]:
    """Split a text where a line may end; what is too long for a line, after every character."""
    for piece in _PIECE.findall(text):
        yield from [piece] if _length(piece, size) <= width else piece


def _cut(line: str, size: int, width: int) -> str:
    line = line.rstrip(_NO_DOTS)
    while line and _length(line + "\u2026", size) > width:
        line = line[:-1].rstrip(_NO_DOTS)
    return line + "\u2026"


def _clean(text: str) -> str:
    """Put a text on one line; leave out what is invisible, and half characters become U+FFFD."""
    text = " ".join(unicodedata.normalize("NFC", text[:_LONGEST]).split())
    kinds = ((c, unicodedata.category(c)) for c in text)
    return "".join("\ufffd" if k == "Cs" else c for c, k in kinds if k not in ("Cc", "Cf"))
