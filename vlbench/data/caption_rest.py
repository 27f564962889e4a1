"""What a stage of captions leaves out of its samples: further answers and images."""

from __future__ import annotations

from dataclasses import dataclass

from vlbench.data.sample import Sample


@dataclass
class CaptionRest:
    """Counts of what is beside the captions of samples that were looked at."""

    samples: int = 0
    """Samples that have more than a caption and its image."""
    answers: int = 0
    images: int = 0

    def add(self, sample: Sample) -> None:
        """Count what a sample has beside its caption."""
        answers, images = sample.beyond_caption
        self.samples += bool(answers or images)
        self.answers += answers
        self.images += images

    def describe(self, inspected: str) -> str:
        """Return what is left out of `inspected` ("4 samples"), "" for nothing."""
        if not self.samples:
            return ""
        return (
            f"of {self.samples:,} of {inspected} further answers ({self.answers:,}) and images "
            f"({self.images:,}) are left out: a caption is the answer behind the first image"
        )
