"""Checks of samples: what training refuses, cuts, repeats, or reads in an unintended way."""

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
    CUT: "it is too long; training uses its beginning",
    TWICE: "it is repeated",
    ODD: "it can be learned from, but probably not as intended",
}
REPLACEMENT_CHARACTER = "\ufffd"  # decoders write it for invalid bytes
IMAGE_TAGS = re.compile(
    r"<\|?(image|im_(start|end|patch)|(img|video|audio)\|?>)|!\[[^\]]{0,80}\]\(", re.IGNORECASE
)
"""The beginning of an image tag of other programs, or of an image in Markdown."""
MAX_ASPECT_RATIO = 32  # longest edge / shortest; beyond it, padding leaves a strip of one patch


@dataclass(frozen=True)
class DataFinding:
    """One problem of a sample or a source."""

    kind: str
    """One of the keys of `KIND_MEANINGS`."""
    source: str
    sample: str
    what: str
    """The problem, as a clause."""
    stage: str = ""
    """The stage that has the problem; empty for all stages."""
    record: int | None = None
    """Number of the record in the source, from 1."""


@dataclass(frozen=True)
class ImageCheck:
    """The result of opening an image."""

    problem: str = ""
    """Why it cannot be read; "" if it can."""
    content_hash: bytes = b""
    """Equal for files with the same content."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""


def read_valid_samples(source: SampleSource) -> tuple[dict[int, Sample], list[DataFinding]]:
    """Return index -> well-formed sample, and the findings about the others."""
    samples: dict[int, Sample] = {}
    findings = []
    for index in range(len(source)):
        try:
            samples[index] = sample_at(source, index)
        except BadSample as bad:
            findings.append(
                DataFinding(REFUSED, source.name, bad.sample_id, bad.reason, record=index + 1)
            )
    return samples, findings


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
    """Yield a finding for each record key that is not read and may be meant for training."""
    counts = Counter(key for sample in samples.values() for key in sample.unread_keys)
    for key, count in counts.most_common():
        if not is_metadata_key(key):
            first = next(sample for sample in samples.values() if key in sample.unread_keys)
            yield make_finding(
                first, ODD, source_name, f"key {key!r} is not read ({count} records have it)"
            )


def reading_notes(samples: Mapping[int, Sample]) -> Iterator[str]:
    """Yield notes on records that are correct, but are read in another way than written."""
    counts = Counter(key for sample in samples.values() for key in sample.unread_keys)
    metadata = [f"{key} ({count})" for key, count in counts.most_common() if is_metadata_key(key)]
    if metadata:
        yield f"keys that are not used, with the number of records: {', '.join(metadata)}"
    untagged = sum(sample.is_untagged for sample in samples.values())
    if untagged:
        yield f"{untagged} records have an image and no <image>: it is put before the question"


def check_images(images: Iterable[LazyImage], workers: int) -> dict[LazyImage, ImageCheck]:
    """Open and fully decode every image once, with `workers` threads."""
    unique_images = list(dict.fromkeys(images))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checks = tqdm(
            pool.map(_check_image, unique_images),
            total=len(unique_images),
            desc="images",
            unit="image",
            disable=None,
        )
        return dict(zip(unique_images, checks, strict=True))


def _check_image(lazy_image: LazyImage) -> ImageCheck:
    try:
        image = lazy_image.open()
        return ImageCheck(content_hash=content_key(lazy_image), size=image.size)
    except UserError as error:
        return ImageCheck(str(error))


def find_image_problems(
    source_name: str, samples: Mapping[int, Sample], image_checks: Mapping[LazyImage, ImageCheck]
) -> list[DataFinding]:
    """Return findings about images that are unreadable, repeated under other names, or strips."""
    findings = []
    first_with_content: dict[bytes, LazyImage] = {}
    done: set[LazyImage] = set()
    for sample in samples.values():
        for image in dict.fromkeys(sample.images):
            check = image_checks[image]
            if check.problem:
                findings.append(make_finding(sample, REFUSED, source_name, check.problem))
                break
            if image in done:
                continue
            done.add(image)
            first = first_with_content.setdefault(check.content_hash, image)
            if first != image:
                problem = f"image {image.name} has the same content as {first.name}"
                findings.append(make_finding(sample, TWICE, source_name, problem))
            if max(check.size) > MAX_ASPECT_RATIO * min(check.size):
                width, height = check.size
                problem = f"image {image.name} is a strip of {width} x {height} pixels"
                findings.append(make_finding(sample, ODD, source_name, problem))
    return findings


def find_duplicates(source_name: str, samples: Mapping[int, Sample]) -> list[DataFinding]:
    """Return findings about samples equal to an earlier one, and one for all repeated ids.

    An id is only a label: samples that share one are trained on like others.
    """
    findings = []
    contents: dict[bytes, str] = {}
    ids: set[str] = set()
    repeated_ids: list[tuple[Sample, int]] = []
    for index, sample in samples.items():
        parts = [turn.role + turn.text for turn in sample.turns]
        parts += [image.name for image in sample.images]
        content = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
        if content in contents:
            problem = f"record {index + 1} has the images and turns of {contents[content]}"
            findings.append(make_finding(sample, TWICE, source_name, problem))
        elif sample.id in ids:
            repeated_ids.append((sample, index + 1))
        contents.setdefault(content, f"record {index + 1} ({sample.id})")
        ids.add(sample.id)
    if repeated_ids:
        sample, record = repeated_ids[0]
        others = f", as {len(repeated_ids) - 1} others do" if len(repeated_ids) > 1 else ""
        problem = f"record {record} has the id of an earlier one{others} (ids are only labels)"
        findings.append(make_finding(sample, TWICE, source_name, problem))
    return findings


def find_odd_texts(
    source_name: str, samples: Mapping[int, Sample], template: ChatTemplate
) -> Iterator[DataFinding]:
    """Yield findings about texts that a model probably reads in another way than intended."""
    for sample in samples.values():
        for number, turn in enumerate(sample.turns, 1):
            text = turn.text.replace(IMAGE_PLACEHOLDER, "")
            if template.stop in text:
                problem = f"has '{template.stop}' in it, which ends an answer"
            elif REPLACEMENT_CHARACTER in text:
                problem = "has U+FFFD in it: it was decoded with the wrong encoding"
            elif tag := IMAGE_TAGS.search(text):
                use = "learned" if turn.role == "assistant" else "read"
                problem = f"has '{tag[0]}' in it, which is {use} as text"
            else:
                continue
            yield make_finding(sample, ODD, source_name, f"turn {number} {problem}")
            break


@dataclass
class StageTokenCounts:
    """Token counts of the samples of a source in a stage."""

    token_counts: list[int]
    """Positions of each sample, image positions included."""
    supervised_tokens: int = 0
    image_count: int = 0
    skipped_samples: int = 0
    """Samples without an image, in a stage that trains on captions."""


def encode_samples(
    source_name: str,
    stage: str,
    samples: Iterable[Sample],
    encoder: SampleEncoder,
) -> tuple[StageTokenCounts, list[DataFinding]]:
    """Encode samples as a stage does; return token counts, and findings about cuts and refusals."""
    lengths, findings = StageTokenCounts([]), []
    unlimited, max_length = replace(encoder, max_length=1 << 40), encoder.max_length
    for sample in samples:
        try:
            # without a limit first, which tells how much is cut off
            encoded = unlimited.encode(sample)
            if len(encoded.input_ids) > max_length:
                encoder.encode(sample)  # raises BadSample where the cut is not allowed
                problem = (
                    f"has {len(encoded.input_ids)} tokens, and language.max_length is {max_length}"
                )
                findings.append(make_finding(sample, CUT, source_name, problem, stage))
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
        problem = "no sample has an image, and the stage learns captions"
        findings.append(DataFinding(ODD, source_name, "all", problem, stage))
    return lengths, findings
