"""What an epoch of a mixture is made of: samples, tokens and images of each source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlbench.check.sample_checks import StageCheck
from vlbench.check.source_pass import SourceSummary
from vlbench.data.shuffle import SourceMixture

NOUNS = ("samples", "tokens", "images")
WIDTHS = (11, 15, 11)  # of the numbers: 10^8 samples of a thousand tokens


@dataclass(frozen=True)
class EpochShare:
    """What an epoch takes of one source and can learn from."""

    source_name: str
    samples: float
    tokens: float
    images: float

    @property
    def amounts(self) -> tuple[float, float, float]:
        """Samples, tokens and images."""
        return self.samples, self.tokens, self.images


def epoch_shares(
    mixture: SourceMixture, checks: Sequence[StageCheck], summaries: Sequence[SourceSummary]
) -> list[EpochShare]:
    """Return what an epoch takes of each source: its part of what was found in all of the source.

    `checks` and `summaries` are of the mixture's sources. What is bad or skipped in the stage does
    not count. The numbers are exact where an epoch takes every sample equally often, and
    expectations elsewhere.
    """
    shares = []
    for drawn, check, summary in zip(mixture.epoch_shares, checks, summaries, strict=True):
        times = drawn / max(1, summary.read_samples)  # how often an epoch takes a sample
        amounts = (len(check.token_counts), sum(check.token_counts), check.image_count)
        shares.append(EpochShare(check.source_name, *(times * amount for amount in amounts)))
    return shares


def share_lines(
    mixture: SourceMixture, checks: Sequence[StageCheck], summaries: Sequence[SourceSummary]
) -> Iterator[str]:
    """Yield a table of the sources of a stage, with their shares of an epoch."""
    shares = epoch_shares(mixture, checks, summaries)
    totals = [sum(column) for column in zip(*(share.amounts for share in shares), strict=True)]
    sums = (f"{total:,.0f} {noun}" for total, noun in zip(totals, NOUNS, strict=True))
    yield f"  an epoch of the mixture: {', '.join(sums)}, in shares"
    yield "    " + " ".join(
        f"{noun:>{width + 8}}" for noun, width in zip(NOUNS, WIDTHS, strict=True)
    )
    for share in shares:
        cells = zip(share.amounts, totals, WIDTHS, strict=True)
        columns = (
            f"{amount:>{width},.0f} {_percent(amount, total)}" for amount, total, width in cells
        )
        yield f"    {' '.join(columns)}  {share.source_name}"


def _percent(amount: float, total: float) -> str:
    return f"{100 * amount / total if total else 0:>5.1f} %"
