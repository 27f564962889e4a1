"""The supervision audit: what the model reads of a sample, what it learns, where pictures are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from vlbench.config.schema import Recipe
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.sample_encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    EncodedSample,
    SampleEncoder,
)
from vlbench.errors import BadSample
from vlbench.html_pages import image_data_uri, jinja_environment
from vlbench.version import __version__

THUMBNAIL_SIZE = 160  # pixels, the longest side of a thumbnail


@dataclass(frozen=True)
class AuditSample:
    """A sample on the page."""

    stage: str
    sample: Sample
    encoder: SampleEncoder
    """Encodes it as its stage does."""


@dataclass(frozen=True)
class SampleSpan:
    """A run of positions of one kind."""

    kind: str
    """`read`, `learned` or `picture`."""
    text: str
    position_count: int
    image_uri: str = ""
    """The picture as a data URI."""


def render_audit(
    audit_samples: list[AuditSample], recipe: Recipe, decode: Callable[..., str]
) -> str:
    """Return the page, one HTML file that needs nothing else; `decode` is the tokenizer's."""
    stages = [
        (name, [_describe_sample(one, decode) for one in some])
        for name, some in groupby(audit_samples, key=lambda one: one.stage)
    ]
    page = jinja_environment(Path(__file__).parent).get_template("audit.html.jinja")
    return page.render(stages=stages, recipe=recipe, version=__version__)


def _describe_sample(audit_sample: AuditSample, decode: Callable[..., str]) -> dict[str, Any]:
    """Return what the page says of a sample."""
    try:
        encoded = audit_sample.encoder.encode(audit_sample.sample)
    except BadSample as bad:
        return {
            "id": audit_sample.sample.unique_name,
            "problem": bad.reason,
            "pieces": [],
            "positions": 0,
        }
    return {
        "id": audit_sample.sample.unique_name,
        "problem": "",
        "pieces": list(split_into_spans(encoded, decode)),
        "positions": len(encoded.input_ids),
        "learned": encoded.supervised_token_count,
        "images": len(encoded.sample.images),
    }


def split_into_spans(encoded: EncodedSample, decode: Callable[..., str]) -> Iterator[SampleSpan]:
    """Give the runs of a sample: places of a picture, text that is read, text that is learned.

    A token is learned where the position before it has it for a label.
    """
    kinds = []
    for place, token in enumerate(encoded.input_ids):
        before = encoded.labels[place - 1] if place else IGNORE_INDEX
        kinds.append(
            "picture"
            if token == IMAGE_TOKEN_INDEX
            else "read"
            if before == IGNORE_INDEX
            else "learned"
        )
    place, shown = 0, iter(encoded.sample.images)
    for kind, run in groupby(kinds):
        length = len(list(run))
        if kind == "picture":
            for _ in range(length // encoded.tokens_per_image):
                picture = next(shown)
                yield SampleSpan(
                    kind, picture.name, encoded.tokens_per_image, _thumbnail_uri(picture)
                )
        else:
            text = decode(encoded.input_ids[place : place + length], keep_special=True)
            yield SampleSpan(kind, text, length)
        place += length


def _thumbnail_uri(lazy_image: LazyImage) -> str:
    small = lazy_image.open()
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return image_data_uri(small, "JPEG", quality=80)
