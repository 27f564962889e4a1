"""Checks of single samples: what training refuses, cuts, or reads in an unintended way."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from vlbench.check.findings import CUT, ODD, REFUSED, DataFinding, make_finding
from vlbench.data.caption_rest import CaptionRest
from vlbench.data.chat_template import ChatTemplate
from vlbench.data.feature_store import content_key
from vlbench.data.image_tiling import count_views
from vlbench.data.sample import IMAGE_PLACEHOLDER, LazyImage, Sample
from vlbench.data.sample_encoding import NoImage, SampleEncoder
from vlbench.errors import BadSample, UserError

REPLACEMENT_CHARACTER = "\ufffd"  # decoders write it for invalid bytes
IMAGE_TAGS = re.compile(
    r"<\|?(image|im_(start|end|patch)|(img|video|audio)\|?>)|!\[[^\]]{0,80}\]\(", re.IGNORECASE
)
"""The beginning of an image tag of other programs, or of an image in Markdown."""


@dataclass(frozen=True)
class ImageCheck:
    """The result of opening an image."""

    problem: str = ""
    """Why it cannot be read; "" if it can."""
    content_hash: bytes = b""
    """Equal for files with the same content."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""


def check_image(lazy_image: LazyImage) -> ImageCheck:
    """Open and fully decode an image."""
    try:
        image = lazy_image.open()
        return ImageCheck(content_hash=content_key(lazy_image), size=image.size)
    except UserError as error:
        return ImageCheck(str(error))


def find_odd_text(
    source_name: str, sample: Sample, template: ChatTemplate
) -> Iterator[DataFinding]:
    """Yield a finding about the first text that a model probably reads otherwise than intended."""
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
        return


@dataclass
class StageCheck:
    """A source as a stage reads it: token counts of its samples."""

    stage: str
    source_name: str
    encoder: SampleEncoder
    token_counts: array[int] = field(default_factory=lambda: array("q"))
    """Positions of each sample, image positions included."""
    supervised_tokens: int = 0
    image_count: int = 0
    view_counts: Counter[int] = field(default_factory=Counter)
    """How many images have that many views, where images are tiled."""
    reduced_samples: int = 0
    """Samples with fewer tiles than they could have, for `vision.max_visual_tokens`."""
    skipped_samples: int = 0
    """Samples without an image, in a stage that trains on captions."""
    beyond_captions: CaptionRest = field(default_factory=CaptionRest)
    """What is left out of the others there."""

    def __post_init__(self) -> None:
        self._unlimited = replace(self.encoder, max_length=1 << 40)

    def check_sample(self, sample: Sample) -> Iterator[DataFinding]:
        """Encode a sample as the stage does; yield a finding if it is cut or refused."""
        max_length = self.encoder.max_length
        try:
            # without a limit first, which tells how much is cut off
            encoded = self._unlimited.encode(sample)
            full_length = len(encoded.input_ids)
            if full_length > max_length:
                encoded = self.encoder.encode(sample)  # BadSample where the cut is not allowed
                problem = f"has {full_length} tokens, and language.max_length is {max_length}"
                yield make_finding(sample, CUT, self.source_name, problem, self.stage)
        except NoImage:
            self.skipped_samples += 1
            return
        except BadSample as bad:
            yield make_finding(sample, REFUSED, self.source_name, bad.reason, self.stage)
            return
        if self.encoder.sample_format == "caption":
            self.beyond_captions.add(sample)
        self.token_counts.append(len(encoded.input_ids))
        self.supervised_tokens += encoded.supervised_token_count
        self.image_count += len(encoded.sample.images)
        if self.encoder.view_layout:
            self.view_counts.update(map(count_views, encoded.sample.images))
            self.reduced_samples += encoded.is_reduced

    def finish(self) -> Iterator[DataFinding]:
        """Yield a finding if the stage cannot use any sample."""
        if self.skipped_samples and not self.token_counts:
            problem = "no sample has an image, and the stage learns captions"
            yield DataFinding(ODD, self.source_name, "all", problem, self.stage)
