"""What a person is told about the views of tiled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vlbench.data.batch_sampler import StepDataset
from vlbench.data.image_tiling import count_views
from vlbench.distributed import collectives
from vlbench.errors import BadSample

LOOKED_AT = 64  # samples at the beginning of a stage: headers of images, read in milliseconds


def describe_view_counts(counts: Mapping[int, int]) -> str:
    """Return how many images have how many views, as "3.5 on average; 3 (75%), 5 (25%)"."""
    images = sum(counts.values())
    mean = sum(views * count for views, count in counts.items()) / images
    shares = [f"{views} ({counts[views] / images:.0%})" for views in sorted(counts)]
    return f"{mean:.3g} on average; {', '.join(shares)}"


def describe_reduced(reduced: int, samples: int) -> str:
    """Return how many of so many samples had their tiles reduced to `max_visual_tokens`."""
    return (
        f"{reduced:,} of {samples:,} samples have fewer tiles than they could, for "
        "vision.max_visual_tokens"
    )


def show_views(steps: StepDataset) -> None:
    """Print how many views and positions images take in a stage, as its first samples have them.

    Nothing is printed where images are not tiled, or those samples have none.
    """
    if steps.encoder.view_layout is None or not collectives.is_rank_zero():
        return
    counts: Counter[int] = Counter()
    positions = samples = reduced = 0
    for position in range(min(LOOKED_AT, len(steps.mixture))):
        try:
            encoded = steps.encoder.encode(steps.mixture[position])
        except BadSample:  # training meets it again, and reports it
            continue
        counts.update(map(count_views, encoded.sample.images))
        positions += encoded.image_position_count
        samples += 1
        reduced += encoded.is_reduced
    if not counts:
        return
    print(
        f"  views of an image: {describe_view_counts(counts)}; {positions / samples:.4g} image "
        f"positions a sample, in the first {samples}"
    )
    if reduced:
        print(f"  {describe_reduced(reduced, samples)}")
