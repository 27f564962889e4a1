"""How much faster is an epoch whose encoder is not run? `trainer.feature_cache` against none.

    python benchmarks/feature_cache.py

Trains a stage with a frozen encoder, several epochs over the same images, with kept features and
without, in turns, where the encoder takes most of a step's time. What comes before, computing the
features, is not timed; the losses of both must be the same to the last bit.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
from pathlib import Path

from vlbench.__main__ import main as vlbench

IMAGES, EPOCHS, BATCH, ROUNDS = 320, 3, 16, 3
WORDS = [
    "fit",
    "recipe=yivl_llava",
    "only=align_448",
    "connector.name=avgpool",
    "connector.pool=8",  # 4 tokens of an image, so that the language model has little to do
    "stages.align_448.train.vision=null",
    "stages.align_448.image_size=224",
    f"stages.align_448.steps={EPOCHS * IMAGES // BATCH}",
    f"stages.align_448.global_batch_size={BATCH}",
    f"data.samples={IMAGES}",
    "log.every_n_steps=1",
    "log.evaluate_every=1000",
    "log.questions=1",
    "log.examples=0",
    "log.tensorboard=false",
]


def fit_and_read_metrics(folder: Path, *overrides: str) -> list[dict[str, str]]:
    """Fit, and return what was logged of every step."""
    if vlbench([*WORDS, f"run={folder}", *overrides]):
        sys.exit("the run failed")
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def median_step_seconds(logged: list[dict[str, str]]) -> float:
    """Return the median time of a step after the first epoch."""
    later = logged[IMAGES // BATCH :]
    return statistics.median(float(row["step_seconds"]) for row in later)


def main() -> None:
    """Print a Markdown table."""
    plain, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            without = fit_and_read_metrics(Path(folder) / f"plain{number}")
            cache = f"trainer.feature_cache={folder}/cache{number}"
            with_ = fit_and_read_metrics(Path(folder) / f"kept{number}", cache)
            assert [row["loss"] for row in without] == [row["loss"] for row in with_]
            plain.append(median_step_seconds(without))
            kept.append(median_step_seconds(with_))
    before, after = statistics.median(plain), statistics.median(kept)
    print("\n| | seconds a step, median of rounds | spread |\n|---|---:|---:|")
    for name, found in (("encoder runs", plain), ("features are kept", kept)):
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"| {name} | {statistics.median(found):.3f} | {spread} |")
    print(
        f"\n{before / after:.1f} times as fast; the encoder is {1 - after / before:.0%} of a step"
    )


if __name__ == "__main__":
    main()
