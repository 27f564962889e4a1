"""Peak memory of training, against Hugging Face's Trainer and between ways to recompute.

    python benchmarks/memory.py

Processes of their own train the model of `benchmark_model.py` on the conversations of `step.py`:
a peak is that of the longest batch. What a process held before it trained (Python, libraries,
weights) is shown apart: it is the same on both sides.
"""

from __future__ import annotations

from result_table import run_script, write_section

SIDES = {
    "vlbench, rows of 2048": ("ours", "micro=2048"),
    "vlbench, rows of 2048, selective": (
        "ours",
        "micro=2048",
        "activation_checkpointing=selective",
    ),
    "vlbench, rows of 2048, full": ("ours", "micro=2048", "activation_checkpointing=full"),
    "Trainer, batches of 8": ("theirs", "micro=8"),
    "Trainer, batches of 8, grouped by length": ("theirs", "micro=8", "grouped=true"),
    "Trainer, batches of 8, recomputed": ("theirs", "micro=8", "activation_checkpointing=full"),
}


def main() -> None:
    """Print the table."""
    found = {name: run_script("measure_training.py", *words) for name, words in SIDES.items()}
    ours = next(iter(found.values()))
    lines = [
        "| | peak | vlbench takes | above what was there before | vlbench takes | tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, one in found.items():
        more, own = (side["peak"] - side["before"] for side in (one, ours))
        lines.append(
            f"| {name} | {one['peak'] / 1e9:.2f} GB | {ours['peak'] / one['peak']:.2f} x "
            f"| {more / 1e9:.2f} GB | {own / more:.2f} x | {one['tokens_per_second']:.0f} |"
        )
    write_section("Memory", lines)


if __name__ == "__main__":
    main()
