"""The supervision audit: what the model reads of a sample, what it learns, where pictures are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from vlbench import __version__
from vlbench.data.sample import IGNORE, IMAGE, Encoded, Form, Picture, Sample, encode
from vlbench.html import templates, uri
from vlbench.mistakes import BadSample
from vlbench.schema import Recipe

SIDE = 160  # pixels, the longest side of a thumbnail


@dataclass(frozen=True)
class Shown:
    """A sample on the page."""

    stage: str
    form: Form
    sample: Sample
    reading: Mapping[str, Any]
    """Template, tokenizer, its `decode`, tokens_per_image and max_length."""


@dataclass(frozen=True)
class Piece:
    """A run of positions of one kind."""

    kind: str
    """`read`, `learned` or `picture`."""
    text: str
    positions: int
    picture: str = ""
    """The picture as a data URI."""


def audit(shown: list[Shown], recipe: Recipe) -> str:
    """Return the page, one HTML file that needs nothing else."""
    stages = [
        (name, [_told(one) for one in some])
        for name, some in groupby(shown, key=lambda one: one.stage)
    ]
    page = templates(Path(__file__).parent).get_template("audit.html.jinja")
    return page.render(stages=stages, recipe=recipe, version=__version__)


def _told(shown: Shown) -> dict[str, Any]:
    """Return what the page says of a sample."""
    reading = shown.reading
    try:
        one = encode(
            shown.sample,
            reading["template"],
            reading["tokenizer"],
            reading["tokens_per_image"],
            reading["max_length"],
            shown.form,
        )
    except BadSample as bad:
        return {"id": shown.sample.identity, "problem": bad.reason, "pieces": [], "positions": 0}
    learned = sum(label != IGNORE for label in one.labels)
    return {
        "id": shown.sample.identity,
        "problem": "",
        "pieces": list(pieces(one, reading["decode"])),
        "positions": len(one.ids),
        "learned": learned,
        "images": len(one.sample.pictures),
    }


def pieces(one: Encoded, decode: Callable[..., str]) -> Iterator[Piece]:
    """Give the runs of a sample: places of a picture, text that is read, text that is learned.

    A token is learned where the position before it has it for a label.
    """
    kinds = []
    for place, token in enumerate(one.ids):
        before = one.labels[place - 1] if place else IGNORE
        kinds.append("picture" if token == IMAGE else "read" if before == IGNORE else "learned")
    place, shown = 0, iter(one.sample.pictures)
    for kind, run in groupby(kinds):
        length = len(list(run))
        if kind == "picture":
            for _ in range(length // one.tokens_per_image):
                picture = next(shown)
                yield Piece(kind, picture.name, one.tokens_per_image, _uri(picture))
        else:
            text = decode(one.ids[place : place + length], keep_special=True)
            yield Piece(kind, text, length)
        place += length


def _uri(picture: Picture) -> str:
    small = picture.open()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return uri(small, "JPEG", quality=80)
