"""The supervision audit: a page with the tokens that the model reads and those with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from vlbench.data.image_folder import page_refusal
from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_tiling import TiledImage
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.sample_encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    EncodedSample,
    SampleEncoder,
)
from vlbench.data.shuffle import pick_fixed_subset
from vlbench.errors import BadSample
from vlbench.html_pages import image_data_uri, jinja_environment
from vlbench.version import __version__

CANDIDATES_PER_SAMPLE = 100
THUMBNAIL_SIZE = 160  # pixels, the longest side of a thumbnail


@dataclass(frozen=True)
class AuditSample:
    """A sample for the page."""

    stage: str
    sample: Sample
    encoder: SampleEncoder
    """The encoder of its stage."""
    transform: ImageTransform
    """The image transform of its stage."""


@dataclass(frozen=True)
class SampleSpan:
    """Consecutive positions of one kind."""

    kind: str
    """`read` (no label), `learned` (supervised) or `image`."""
    text: str
    position_count: int
    image_uri: str = ""
    """A thumbnail of what the vision encoder sees, as a data URI; "" for what no page may show."""


def render_audit(
    audit_samples: list[AuditSample], title: str, settings: str, decode: Callable[..., str]
) -> str:
    """Return the page, self-contained HTML; `decode` is the tokenizer's."""
    stages = [
        (name, [_describe_sample(sample, decode) for sample in samples])
        for name, samples in groupby(audit_samples, key=lambda sample: sample.stage)
    ]
    page = jinja_environment(Path(__file__).parent).get_template("audit.html.jinja")
    return page.render(stages=stages, title=title, settings=settings, version=__version__)


def _describe_sample(audit_sample: AuditSample, decode: Callable[..., str]) -> dict[str, Any]:
    """Return the values that the template shows for a sample."""
    try:
        encoded = audit_sample.encoder.encode(audit_sample.sample)
    except BadSample as bad:
        return {
            "id": audit_sample.sample.unique_name,
            "problem": bad.reason,
            "spans": [],
            "positions": 0,
        }
    return {
        "id": audit_sample.sample.unique_name,
        "problem": "",
        "spans": list(split_into_spans(encoded, decode, audit_sample.transform)),
        "positions": len(encoded.input_ids),
        "learned": encoded.supervised_token_count,
        "images": len(encoded.sample.images),
    }


def choose_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return up to `count` samples from all over a source, no two with the same first image.

    Of large sources a spread of `CANDIDATES_PER_SAMPLE` times as many samples is looked at.
    """
    candidates = pick_fixed_subset(samples, min(count * CANDIDATES_PER_SAMPLE, len(samples)))
    by_image: dict[str, Sample] = {}
    for number, sample in enumerate(candidates):
        image = sample.images[0].name if sample.images else f"no image {number}"
        by_image.setdefault(image, sample)
    return pick_fixed_subset(list(by_image.values()), count)


def split_into_spans(
    encoded: EncodedSample, decode: Callable[..., str], transform: ImageTransform
) -> Iterator[SampleSpan]:
    """Yield the spans of a sample: the positions of one image, text that is read or learned.

    A token is learned where the label of the position before it is this token. Tags between the
    views of an image are text that is read; the image is shown in the first of its spans.
    """
    kinds = []
    for position, token in enumerate(encoded.input_ids):
        label_before = encoded.labels[position - 1] if position else IGNORE_INDEX
        if token == IMAGE_TOKEN_INDEX:
            kinds.append("image")
        else:
            kinds.append("read" if label_before == IGNORE_INDEX else "learned")
    images = encoded.sample.images
    lengths = encoded.image_lengths or [encoded.tokens_per_image] * len(images)
    unseen, left, position = iter(zip(images, lengths, strict=True)), 0, 0
    for kind, group in groupby(kinds):
        length = rest = len(list(group))
        while kind == "image" and rest:
            uri = ""
            if not left:
                image, left = next(unseen)
                refusal = page_refusal(image)
                uri = "" if refusal else _thumbnail_uri(image, transform)
            count = min(rest, left)
            yield SampleSpan(kind, refusal or image.name, count, uri)
            rest, left = rest - count, left - count
        if kind != "image":
            text = decode(encoded.input_ids[position : position + length], keep_special=True)
            yield SampleSpan(kind, text, length)
        position += length


def _thumbnail_uri(lazy_image: LazyImage, transform: ImageTransform) -> str:
    """Return the square that the encoder sees, or the whole image of which it sees tiles."""
    opened = transform.open_image(lazy_image)
    if isinstance(lazy_image, TiledImage):
        image = opened.copy()  # which is then shrunk in place
    else:
        image = Image.fromarray(transform.resize_and_crop(opened))
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return image_data_uri(image, "JPEG", quality=80)
