"""What is wrong with the samples of a source: what training would refuse, cut, or learn twice."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from vlbench.data.features import content_key
from vlbench.data.record_keys import has_no_content
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
    sample_at,
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
TAGS = re.compile(
    r"<\|?(image|im_(start|end|patch)|(img|video|audio)\|?>)|!\[[^\]]{0,80}\]\(", re.IGNORECASE
)
"""What begins a tag for a picture, in some program or in Markdown."""
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
    record: int | None = None
    """Number of the record in the source, from 1."""


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
            good[index] = sample_at(source, index)
        except BadSample as bad:
            findings.append(
                Finding(REFUSED, source.name, bad.sample_id, bad.reason, record=index + 1)
            )
    return good, findings


def of(sample: Sample, kind: str, source: str, what: str, stage: str = "") -> Finding:
    """Return a finding about a sample."""
    return Finding(kind, source, sample.id, what, stage, sample.place and sample.place.record)


def left_unread(name: str, good: Mapping[int, Sample]) -> Iterator[Finding]:
    """Give the keys that are not read and may hold something to learn, each once."""
    counts = Counter(key for sample in good.values() for key in sample.unread)
    for key, count in counts.most_common():
        if not has_no_content(key):
            first = next(sample for sample in good.values() if key in sample.unread)
            yield of(first, ODD, name, f"key {key!r} is not read ({count} records have it)")


def notes(good: Mapping[int, Sample]) -> Iterator[str]:
    """Say what is read otherwise than it is written, though nothing is wrong with it."""
    counts = Counter(key for sample in good.values() for key in sample.unread)
    harmless = [f"{key} ({n})" for key, n in counts.most_common() if has_no_content(key)]
    if harmless:
        yield f"keys from which nothing is learned, with their records: {', '.join(harmless)}"
    untagged = sum(sample.untagged for sample in good.values())
    if untagged:
        yield f"{untagged} records have a picture and no <image>: it is put before the question"


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
                findings.append(of(sample, REFUSED, name, found.problem))
                break
            if picture in told:
                continue
            told.add(picture)
            other = first.setdefault(found.content, picture)
            if other != picture:
                what = f"image {picture.name} is the same picture as {other.name}"
                findings.append(of(sample, TWICE, name, what))
            if max(found.size) > THINNEST * min(found.size):
                width, height = found.size
                what = f"image {picture.name} is a strip of {width} x {height} pixels"
                findings.append(of(sample, ODD, name, what))
    return findings


def repeated(name: str, good: Mapping[int, Sample]) -> list[Finding]:
    """Return samples that are equal to an earlier one; and once, if any has an id of another.

    An id is a label: samples that share one are as good as others.
    """
    findings = []
    contents: dict[bytes, str] = {}
    ids: set[str] = set()
    same: list[tuple[Sample, int]] = []
    for index, sample in good.items():
        words = [turn.role + turn.text for turn in sample.turns]
        words += [picture.name for picture in sample.pictures]
        content = hashlib.blake2b("\0".join(words).encode(), digest_size=16).digest()
        if content in contents:
            what = f"record {index + 1} has the pictures and turns of {contents[content]}"
            findings.append(of(sample, TWICE, name, what))
        elif sample.id in ids:
            same.append((sample, index + 1))
        contents.setdefault(content, f"record {index + 1} ({sample.id})")
        ids.add(sample.id)
    if same:
        what = f"record {same[0][1]} has the id of an earlier one"
        others = f", as {len(same) - 1} others do" if len(same) > 1 else ""
        findings.append(of(same[0][0], TWICE, name, f"{what}{others} (ids are labels alone)"))
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
            elif found := TAGS.search(text):
                learned = "learned" if turn.role == "assistant" else "read"
                what = f"{where} has '{found[0]}' in it, which is {learned} as text"
            else:
                continue
            yield of(sample, ODD, name, what)
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
                findings.append(of(sample, CUT, source, what, stage))
        except NoImage:
            lengths.skipped += 1
            continue
        except BadSample as bad:
            findings.append(of(sample, REFUSED, source, bad.reason, stage))
            continue
        lengths.tokens.append(min(len(one.ids), limit))
        lengths.supervised += sum(label != IGNORE for label in one.labels[:limit])
        lengths.images += len(one.sample.pictures)
    if lengths.skipped and not lengths.tokens:
        what = "no sample has an image, and the stage learns captions"
        findings.append(Finding(ODD, source, "all", what, stage))
    return lengths, findings
