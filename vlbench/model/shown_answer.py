"""An answer with its question and images, which a notebook shows. It needs no IPython."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from PIL import Image

THUMBNAIL_SIDE = 256  # pixels, longest side of an image in a notebook
_BLOCK_STYLE = "display:flex;gap:1em;align-items:flex-start;flex-wrap:wrap"
_TEXT_STYLE = "margin:0 0 .5em;white-space:pre-wrap"


@dataclass(frozen=True)
class ShownAnswer:
    """What a model answered: `text`; printed it is that text, in a notebook also what was asked."""

    question: str
    text: str
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    """In RGB, as large as they were; turned where the model sees them turned (`data.exif`)."""

    def __str__(self) -> str:
        """Return the answer's text."""
        return self.text

    def _repr_html_(self) -> str:
        """Return the images as thumbnails beside question and answer; notebooks call this."""
        shown = "".join(f'<img src="{_thumbnail_uri(image)}" alt="image">' for image in self.images)
        question, text = (_escape_lines(one) for one in (self.question, self.text))
        return (
            f'<div style="{_BLOCK_STYLE}">{shown}<div><p style="{_TEXT_STYLE}"><b>{question}</b>'
            f'</p><p style="{_TEXT_STYLE}">{text}</p></div></div>'
        )


def _thumbnail_uri(image: Image.Image) -> str:
    from vlbench.html_pages import image_data_uri  # here: it imports Jinja

    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return image_data_uri(small, "PNG")


def _escape_lines(text: str) -> str:
    """Return a text in which nothing is a tag, an entity or an unpaired surrogate."""
    return escape(text.encode("utf-8", "replace").decode())
