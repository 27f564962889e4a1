"""One source of a mixture: where it is, how much of it is taken, and what is asked about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, Field

from vlbench.config.key_types import MAX_COUNT, Count, PathText, RecipeSection, key

SAMPLING_PATTERN = re.compile(r"(?:(first|end|random):)?(\d{1,12}(?:\.\d{1,12})?%|\d{1,12})")
IMAGE_TAGS = ("<image>", "<image_placeholder>")


@dataclass(frozen=True)
class SourceSampling:
    """The part of a source that is used, in LLaVA-OneVision's words."""

    order: str
    """`first`, `end` or `random`."""
    count: int | None = None
    """How many samples; None for a percentage."""
    percentage: Fraction = Fraction(100)

    def count_of(self, sample_count: int) -> int:
        """Return how many of a source's samples are used; percentages are rounded up."""
        if self.count is not None:
            return min(self.count, sample_count)
        return -(-sample_count * self.percentage // 100)


def parse_sampling(text: str) -> SourceSampling | None:
    """Return what `all`, `first:N`, `end:N%`, `random:N` or `N%` says; None for all samples."""
    if text == "all":
        return None
    match = SAMPLING_PATTERN.fullmatch(text)
    amount = match[2] if match else ""
    if match and amount.endswith("%") and 0 < Fraction(amount[:-1]) <= 100:
        return SourceSampling(match[1] or "random", percentage=Fraction(amount[:-1]))
    if match and match[1] and amount.isdigit() and 0 < int(amount) <= MAX_COUNT:
        return SourceSampling(match[1], int(amount))
    raise ValueError(
        "must be all, first:N, end:N or random:N, where N is a number above 0 or a percentage as "
        f"10%, or N% for random:N%, given '{text}'"
    )


def _check_sampling(text: str) -> str:
    parse_sampling(text)
    return text


def _check_prompt(prompt: str) -> str:
    tag = next((tag for tag in IMAGE_TAGS if tag in prompt), "")
    if tag:
        raise ValueError(f"has {tag} in it; the image comes before a prompt by itself")
    if not prompt.strip():
        raise ValueError("is empty; leave it out")
    return prompt


SamplingText = Annotated[str, AfterValidator(_check_sampling)]
PromptText = Annotated[str, AfterValidator(_check_prompt)]
Prompts = Annotated[tuple[PromptText, ...], Field(min_length=1)]


class MixtureSource(RecipeSection):
    """One source of a mixture."""

    train: PathText = key("scenes, large_scenes, or data as data.train takes them")
    images: PathText | None = key("folder of its images; null: data.images", None)
    weight: float = key("how often an epoch takes each sample", 1.0, gt=0)
    sampling: SamplingText = key("all, or the samples used: first:N, end:N, random:N, N%", "all")
    cap: Count | None = key("most of its samples in an epoch, always the same; null: all", None)
    prompts: Prompts | None = key("drawn from instead of the question of a sample", None)
    needs: str | None = key("what it needs on disk, which is said where it is missing", None)


Mixture = Annotated[tuple[MixtureSource, ...], Field(min_length=1)]
