"""What is wrong with the samples of a source: what training would refuse, cut, or learn twice."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tqdm import tqdm

from vlbench.data.chat_template import ChatTemplate
from vlbench.data.feature_store import content_key
from vlbench.data.record_keys import is_metadata_key
from vlbench.data.sample import IMAGE_PLACEHOLDER, LazyImage, Sample, SampleSource, sample_at
from vlbench.data.sample_encoding import IGNORE_INDEX, NoImage, SampleEncoder
from vlbench.errors import BadSample, UserError

REFUSED, CUT, TWICE, ODD = "refused", "cut", "twice", "odd"
KIND_MEANINGS = {
    REFUSED: "training leaves it out",
    CUT: "training learns its beginning",
    TWICE: "it is there more than once",
    ODD: "it can be learned, and is probably not meant so",
}
REPLACEMENT_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are no text
IMAGE_TAGS = re.compile(
    r"<\|?(image|im_(start|end|patch)|(img|video|audio)\|?>)|!\[[^\]]{0,80}\]\(", re.IGNORECASE
)
"""What begins a tag for a picture, in some program or in Markdown."""
MAX_ASPECT_RATIO = (
    32  # longest edge over shortest, from which padding leaves a strip of a patch or less
)


@dataclass(frozen=True)
class DataFinding:
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
class ImageCheck:
    """What a picture turned out to be."""

    problem: str = ""
    """Why it cannot be read."""
    content_hash: bytes = b""
    """The same for the same file."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""


def read_valid_samples(source: SampleSource) -> tuple[dict[int, Sample], list[DataFinding]]:
    """Return the well-formed samples of a source, by index, and what is wrong with the others."""
    good: dict[int, Sample] = {}
    findings = []
    for index in range(len(source)):
        try:
            good[index] = sample_at(source, index)
        except BadSample as bad:
            findings.append(
                DataFinding(REFUSED, source.name, bad.sample_id, bad.reason, record=index + 1)
            )
    return good, findings


def make_finding(
    sample: Sample, kind: str, source_name: str, description: str, stage: str = ""
) -> DataFinding:
    """Return a finding about a sample."""
    return DataFinding(
        kind,
        source_name,
        sample.id,
        description,
        stage,
        sample.origin and sample.origin.record_number,
    )


def find_unread_keys(source_name: str, samples: Mapping[int, Sample]) -> Iterator[DataFinding]:
    """Give the keys that are not read and may hold something to learn, each once."""
    counts = Counter(key for sample in samples.values() for key in sample.unread_keys)
    for key, count in counts.most_common():
        if not is_metadata_key(key):
            first = next(sample for sample in samples.values() if key in sample.unread_keys)
            yield make_finding(
                first, ODD, source_name, f"key {key!r} is not read ({count} records have it)"
            )


def reading_notes(samples: Mapping[int, Sample]) -> Iterator[str]:
    """Say what is read otherwise than it is written, though nothing is wrong with it."""
    counts = Counter(key for sample in samples.values() for key in sample.unread_keys)
    harmless = [f"{key} ({n})" for key, n in counts.most_common() if is_metadata_key(key)]
    if harmless:
        yield f"keys from which nothing is learned, with their records: {', '.join(harmless)}"
    untagged = sum(sample.is_untagged for sample in samples.values())
    if untagged:
        yield f"{untagged} records have a picture and no <image>: it is put before the question"


def check_images(images: Iterable[LazyImage], workers: int) -> dict[LazyImage, ImageCheck]:
    """Open every picture once, decoded in full, `workers` at a time."""
    different = list(dict.fromkeys(images))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        seen = tqdm(
            pool.map(_check_image, different),
            total=len(different),
            desc="pictures",
            unit="picture",
            disable=None,
        )
        return dict(zip(different, seen, strict=True))


def _check_image(lazy_image: LazyImage) -> ImageCheck:
    try:
        image = lazy_image.open()
        return ImageCheck(content_hash=content_key(lazy_image), size=image.size)
    except UserError as mistake:
        return ImageCheck(str(mistake))


def find_image_problems(
    source_name: str, samples: Mapping[int, Sample], image_checks: Mapping[LazyImage, ImageCheck]
) -> list[DataFinding]:
    """Return what is wrong with pictures, and pictures that are there under several names."""
    findings = []
    first: dict[bytes, LazyImage] = {}
    told: set[LazyImage] = set()
    for sample in samples.values():
        for picture in dict.fromkeys(sample.images):
            found = image_checks[picture]
            if found.problem:
                findings.append(make_finding(sample, REFUSED, source_name, found.problem))
                break
            if picture in told:
                continue
            told.add(picture)
            other = first.setdefault(found.content_hash, picture)
            if other != picture:
                what = f"image {picture.name} is the same picture as {other.name}"
                findings.append(make_finding(sample, TWICE, source_name, what))
            if max(found.size) > MAX_ASPECT_RATIO * min(found.size):
                width, height = found.size
                what = f"image {picture.name} is a strip of {width} x {height} pixels"
                findings.append(make_finding(sample, ODD, source_name, what))
    return findings


def find_duplicates(source_name: str, samples: Mapping[int, Sample]) -> list[DataFinding]:
    """Return samples that are equal to an earlier one; and once, if any has an id of another.

    An id is a label: samples that share one are as good as others.
    """
    findings = []
    contents: dict[bytes, str] = {}
    ids: set[str] = set()
    same: list[tuple[Sample, int]] = []
    for index, sample in samples.items():
        words = [turn.role + turn.text for turn in sample.turns]
        words += [picture.name for picture in sample.images]
        content = hashlib.blake2b("\0".join(words).encode(), digest_size=16).digest()
        if content in contents:
            what = f"record {index + 1} has the pictures and turns of {contents[content]}"
            findings.append(make_finding(sample, TWICE, source_name, what))
        elif sample.id in ids:
            same.append((sample, index + 1))
        contents.setdefault(content, f"record {index + 1} ({sample.id})")
        ids.add(sample.id)
    if same:
        what = f"record {same[0][1]} has the id of an earlier one"
        others = f", as {len(same) - 1} others do" if len(same) > 1 else ""
        findings.append(
            make_finding(same[0][0], TWICE, source_name, f"{what}{others} (ids are labels alone)")
        )
    return findings


def find_odd_texts(
    source_name: str, samples: Mapping[int, Sample], template: ChatTemplate
) -> Iterator[DataFinding]:
    """Give texts that a model would read otherwise than they were meant."""
    for sample in samples.values():
        for number, turn in enumerate(sample.turns, 1):
            where, text = f"turn {number}", turn.text.replace(IMAGE_PLACEHOLDER, "")
            if template.stop in text:
                what = f"{where} has '{template.stop}' in it, which ends an answer"
            elif REPLACEMENT_CHARACTER in text:
                what = f"{where} has U+FFFD in it: it was decoded with the wrong encoding"
            elif found := IMAGE_TAGS.search(text):
                learned = "learned" if turn.role == "assistant" else "read"
                what = f"{where} has '{found[0]}' in it, which is {learned} as text"
            else:
                continue
            yield make_finding(sample, ODD, source_name, what)
            break


@dataclass
class StageTokenCounts:
    """What the samples of a source become in a stage."""

    token_counts: list[int]
    """Positions of each sample, places included."""
    supervised_tokens: int = 0
    image_count: int = 0
    skipped_samples: int = 0
    """Samples without an image in a stage of captions."""


def encode_samples(
    source_name: str,
    stage: str,
    samples: Iterable[Sample],
    encoder: SampleEncoder,
) -> tuple[StageTokenCounts, list[DataFinding]]:
    """Encode samples as a stage would; return their lengths, and those that are cut or refused."""
    lengths, findings = StageTokenCounts([]), []
    unlimited, max_length = replace(encoder, max_length=1 << 40), encoder.max_length
    for sample in samples:
        try:
            # without a limit first, which tells how much is cut off
            encoded = unlimited.encode(sample)
            if len(encoded.input_ids) > max_length:
                encoder.encode(sample)  # raises BadSample where the cut is not allowed
                what = (
                    f"has {len(encoded.input_ids)} tokens, and language.max_length is {max_length}"
                )
                findings.append(make_finding(sample, CUT, source_name, what, stage))
        except NoImage:
            lengths.skipped_samples += 1
            continue
        except BadSample as bad:
            findings.append(make_finding(sample, REFUSED, source_name, bad.reason, stage))
            continue
        lengths.token_counts.append(min(len(encoded.input_ids), max_length))
        lengths.supervised_tokens += sum(
            label != IGNORE_INDEX for label in encoded.labels[:max_length]
        )
        lengths.image_count += len(encoded.sample.images)
    if lengths.skipped_samples and not lengths.token_counts:
        what = "no sample has an image, and the stage learns captions"
        findings.append(DataFinding(ODD, source_name, "all", what, stage))
    return lengths, findings
