"""Peak memory of training, against Hugging Face's Trainer and between ways to recompute.

    python benchmarks/memory.py

Processes of their own train the model of `small.py` for a few steps. What a process held before it
trained (Python, libraries, weights) is shown apart: it is the same on both sides.
"""

from __future__ import annotations

from table import keep, measure

SIDES = {
    "vlbench, rows of 2048": ("ours", "micro=2048"),
    "vlbench, rows of 2048, selective": ("ours", "micro=2048", "checkpointing=selective"),
    "vlbench, rows of 2048, full": ("ours", "micro=2048", "checkpointing=full"),
    "Trainer, batches of 8": ("theirs", "micro=8"),
    "Trainer, batches of 8, grouped by length": ("theirs", "micro=8", "grouped=true"),
    "Trainer, batches of 8, recomputed": ("theirs", "micro=8", "checkpointing=full"),
}


def main() -> None:
    """Print the table."""
    found = {name: measure("one.py", *words, "steps=5") for name, words in SIDES.items()}
    ours = next(iter(found.values()))
    lines = [
        "| | peak | above what was there before | vlbench takes | tokens/s |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one['peak'] / 1e9:.2f} GB | {(one['peak'] - one['before']) / 1e9:.2f} GB "
            f"| {ours['peak'] / one['peak']:.2f} x | {one['tokens_per_second']:.0f} |"
        )
    keep("Memory", lines)


if __name__ == "__main__":
    main()
