"""What an optimizer step did: its loss, rate and counts, as the log and callbacks read them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlbench.data.optimizer_step import StepCounts

SEEN_COUNTS = (
    "samples",
    "images",
    "views",
    "tokens",
    "supervised_tokens",
    "truncated_samples",
    "lost_supervised_tokens",
    "reduced_samples",
)
"""The counts of a `StepReport` that are summed over the whole run."""


@dataclass
class StepReport:
    """What one optimizer step did; numbers are of the global batch."""

    steps_done: int
    """Steps of the stage that are done, this one included."""
    loss: float = math.nan
    """Loss per supervised token."""
    grad_norm: float = math.nan
    """Norm of all gradients before clipping."""
    lr: float = 0.0
    """Highest learning rate of the step."""
    tokens: int = 0
    """Positions in packed rows: text and image positions, without padding."""
    images: int = 0
    views: int = 0
    """What the vision encoder sees: as many as images, unless they are tiled."""
    samples: int = 0
    supervised_tokens: int = 0
    """Positions with a label."""
    truncated_samples: int = 0
    """Samples whose end was cut off at `language.max_length`."""
    lost_supervised_tokens: int = 0
    """Supervised tokens of these ends."""
    reduced_samples: int = 0
    """Samples with fewer tiles than they could have, for `vision.max_visual_tokens`."""
    extra: dict[str, float] = field(default_factory=dict)
    """The connector's own losses by name, each a mean over the global batch."""
    skipped: bool = False
    """True when the loss or a gradient was not finite, so no weight was changed."""

    def count_step(self, counts: StepCounts) -> None:
        """Take over the counts of a step over all processes."""
        for name in SEEN_COUNTS:
            setattr(self, name, getattr(counts, name))
