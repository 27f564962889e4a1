"""What is wrong with the samples of a source: what training would refuse, cut, or learn twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from vlbench.data.features import content_key
from vlbench.data.sample import (
    IGNORE,
    PLACEHOLDER,
    Encoder,
    Form,
    NoImage,
    Picture,
    Sample,
    Source,
    encode,
)
from vlbench.data.template import Template
from vlbench.mistakes import BadSample, Mistake

REFUSED, CUT, TWICE, ODD = "refused", "cut", "twice", "odd"
MEANING = {
    REFUSED: "training leaves it out",
    CUT: "training learns its beginning",
    TWICE: "it is there more than once",
    ODD: "it can be learned, and is probably not meant so",
}
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no text
THINNEST = 32  # longest edge over shortest, from which padding leaves a strip of a patch or less


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """One of MEANING."""
    source: str
    sample: str
    what: str
    stage: str = ""
    """The stage in which it is so; empty where it is so in all."""


@dataclass(frozen=True)
class Seen:
    """What a picture turned out to be."""

    problem: str = ""
    """Why it cannot be read."""
    content: bytes = b""
    """The same for the same file."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""


def samples_of(source: Source) -> tuple[dict[int, Sample], list[Finding]]:
    """Return the well-formed samples of a source, by index, and what is wrong with the others."""
    good: dict[int, Sample] = {}
    findings = []
    for index in range(len(source)):
        try:
            good[index] = source[index]
        except BadSample as bad:
            findings.append(Finding(REFUSED, source.name, bad.sample_id, bad.reason))
    return good, findings


def look(pictures: Iterable[Picture], workers: int) -> dict[Picture, Seen]:
    """Open every picture once, decoded in full, `workers` at a time."""
    different = list(dict.fromkeys(pictures))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        seen = tqdm(
            pool.map(_look, different),
            total=len(different),
            desc="pictures",
            unit="picture",
            disable=None,
        )
        return dict(zip(different, seen, strict=True))


def _look(picture: Picture) -> Seen:
    try:
        image = picture.open()
        return Seen(content=content_key(picture), size=image.size)
    except Mistake as mistake:
        return Seen(str(mistake))


def of_pictures(
    name: str, good: Mapping[int, Sample], seen: Mapping[Picture, Seen]
) -> list[Finding]:
    """Return what is wrong with pictures, and pictures that are there under several names."""
    findings = []
    first: dict[bytes, Picture] = {}
    told: set[Picture] = set()
    for sample in good.values():
        for picture in dict.fromkeys(sample.pictures):
            found = seen[picture]
            if found.problem:
                findings.append(Finding(REFUSED, name, sample.id, found.problem))
                break
            if picture in told:
                continue
            told.add(picture)
            other = first.setdefault(found.content, picture)
            if other != picture:
                what = f"image {picture.name} is the same picture as {other.name}"
                findings.append(Finding(TWICE, name, sample.id, what))
            if max(found.size) > THINNEST * min(found.size):
                width, height = found.size
                what = f"image {picture.name} is a strip of {width} x {height} pixels"
                findings.append(Finding(ODD, name, sample.id, what))
    return findings


def repeated(name: str, good: Mapping[int, Sample]) -> list[Finding]:
    """Return samples that are equal to an earlier one, or have its id and are not."""
    findings = []
    contents: dict[bytes, str] = {}
    ids: set[str] = set()
    for index, sample in good.items():
        words = [turn.role + turn.text for turn in sample.turns]
        words += [picture.name for picture in sample.pictures]
        content = hashlib.blake2b("\0".join(words).encode(), digest_size=16).digest()
        if content in contents:
            what = f"record {index + 1} has the pictures and turns of {contents[content]}"
            findings.append(Finding(TWICE, name, sample.id, what))
        elif sample.id in ids:
            what = f"record {index + 1} has the id of an earlier one"
            findings.append(Finding(TWICE, name, sample.id, what))
        contents.setdefault(content, f"record {index + 1} ({sample.id})")
        ids.add(sample.id)
    return findings


def odd_texts(name: str, good: Mapping[int, Sample], template: Template) -> Iterator[Finding]:
    """Give texts that a model would read otherwise than they were meant."""
    for sample in good.values():
        for number, turn in enumerate(sample.turns, 1):
            where, text = f"turn {number}", turn.text.replace(PLACEHOLDER, "")
            if template.stop in text:
                what = f"{where} has '{template.stop}' in it, which ends an answer"
            elif REPLACEMENT in text:
                what = f"{where} has U+FFFD in it: it was decoded with the wrong encoding"
            elif turn.role == "human" and "<image" in text:
                what = f"{where} has '<image' in it, which is read as text"
            else:
                continue
            yield Finding(ODD, name, sample.id, what)
            break


@dataclass
class Lengths:
    """What the samples of a source become in a stage."""

    tokens: list[int]
    """Positions of each sample, places included."""
    supervised: int = 0
    images: int = 0
    skipped: int = 0
    """Samples without an image in a stage of captions."""


def encoded(
    source: str,
    stage: str,
    good: Iterable[Sample],
    reading: Mapping[str, Any],
    form: Form,
) -> tuple[Lengths, list[Finding]]:
    """Encode samples as a stage would; return their lengths, and those that are cut or refused.

    `reading` holds template, tokenizer, tokens_per_image and max_length.
    """
    lengths, findings = Lengths([]), []
    template, limit = reading["template"], reading["max_length"]
    tokenizer: Encoder = reading["tokenizer"]
    for sample in good:
        try:
            # without a limit first: what is cut off is known by it
            one = encode(sample, template, tokenizer, reading["tokens_per_image"], 1 << 40, form)
            if len(one.ids) > limit:
                encode(sample, template, tokenizer, reading["tokens_per_image"], limit, form)
                what = f"has {len(one.ids)} tokens, and language.max_length is {limit}"
                findings.append(Finding(CUT, source, sample.id, what, stage))
        except NoImage:
            lengths.skipped += 1
            continue
        except BadSample as bad:
            findings.append(Finding(REFUSED, source, sample.id, bad.reason, stage))
            continue
        lengths.tokens.append(min(len(one.ids), limit))
        lengths.supervised += sum(label != IGNORE for label in one.labels[:limit])
        lengths.images += len(one.sample.pictures)
    return lengths, findings
