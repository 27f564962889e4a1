"""Training steps against Hugging Face's Trainer: tokens per second and peak memory, in one run.

    python benchmarks/step.py [part=chat|align|projector] [rounds=3] [neighbour=0|1]

Both train the model of `benchmark_model.py` with the same weights on the same conversations, in
float32: on processors without bf16 that is the peer at its best (`bf16=true` for the other). The
Trainer takes the better of two batch sizes. Tokens are real ones: padding is not counted.
With `neighbour=1` every side is measured alone and beside a process that is always busy, in turns
(10 minutes on two cores, with fewer steps); the Trainer's batches have 8 conversations.
"""

from __future__ import annotations

import sys
from typing import Any

from result_table import format_spread, measure_in_turns, median_figure, run_script, write_section

Measured = dict[str, list[dict[str, Any]]]
ROW = "2048"  # positions in one of our rows
MICRO = ("8", "16")  # conversations in a batch of the Trainer, of 16 in a step
NEIGHBOUR_STEPS = "6"  # of a measurement beside a busy process, two of them not counted
BESIDE = ", beside a busy process"


def main() -> None:
    """Measure in turns, and print a table."""
    given = dict(word.split("=") for word in sys.argv[1:])
    part, rounds = given.get("part", "chat"), int(given.get("rounds", 3))
    bf16 = f"bf16={given.get('bf16', 'false')}"

    def trainer_command(micro: str, grouped: bool) -> tuple[str, ...]:
        grouping = f"grouped={'true' if grouped else 'false'}"
        return ("measure_training.py", "theirs", f"part={part}", f"micro={micro}", bf16, grouping)

    if given.get("neighbour") == "1":
        sides = {
            "vlbench": ("measure_training.py", "ours", f"part={part}", f"micro={ROW}", bf16),
            "Trainer": trainer_command(MICRO[0], False),
            "Trainer, grouped by length": trainer_command(MICRO[0], True),
        }
        measure_beside_neighbour(part, rounds, sides)
        return
    best = max(
        MICRO, key=lambda micro: run_script(*trainer_command(micro, False))["tokens_per_second"]
    )
    sides = {
        "vlbench": ("measure_training.py", "ours", f"part={part}", f"micro={ROW}", bf16),
        f"Trainer, batches of {best}": trainer_command(best, False),
        f"Trainer, batches of {best}, grouped by length": trainer_command(best, True),
    }
    if part == "projector":
        kept = ("measure_training.py", "ours", f"part={part}", f"micro={ROW}", bf16, "kept=true")
        sides = {"vlbench, features are known": kept, **sides}
    found = measure_in_turns(rounds, sides)
    ours = found["vlbench"]
    lines = [
        "| | tokens/s, median | spread | vlbench is faster by | peak memory | vlbench takes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, measured in found.items():
        ratio = median_figure(ours, "tokens_per_second") / median_figure(
            measured, "tokens_per_second"
        )
        memory = median_figure(ours, "peak") / median_figure(measured, "peak")
        lines.append(
            f"| {name} | {median_figure(measured, 'tokens_per_second'):.0f} "
            f"| {format_spread(measured, 'tokens_per_second')} | {ratio:.2f} x "
            f"| {median_figure(measured, 'peak') / 1e9:.2f} GB | {memory:.2f} x |"
        )
    first, second = list(found)[-3], list(found)[-2]
    pairs = zip(found[first][0]["losses"], found[second][0]["losses"], strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    lines += ["", f"Losses of the same steps are at most {apart:.1e} apart (the first two sides)."]
    if part == "projector":
        first, peer_name = list(found)[0], list(found)[2]
        times = median_figure(found[first], "tokens_per_second") / median_figure(
            found[peer_name], "tokens_per_second"
        )
        lines.append(f"With known features vlbench is {times:.2f} x as fast as the {peer_name}.")
    write_section(f"Step: {TITLES[part]}", lines)


def measure_beside_neighbour(part: str, rounds: int, sides: dict[str, tuple[str, ...]]) -> None:
    """Measure every side alone and beside a busy process, and print a table."""
    steps = f"steps={NEIGHBOUR_STEPS}"
    alone = {name: (*words, steps) for name, words in sides.items()}
    beside = {name + BESIDE: (*words, "neighbour=1") for name, words in alone.items()}
    found = measure_in_turns(rounds, alone | beside)
    lines = [
        "| tokens/s, medians | alone | spread | vlbench is faster by | beside a busy process "
        "| spread | vlbench is faster by | of its own speed alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    key, first = "tokens_per_second", next(iter(sides))
    for name in sides:
        cells, medians = [], []
        for suffix in ("", BESIDE):
            measured = found[name + suffix]
            medians.append(median_figure(measured, key))
            ratio = median_figure(found[first + suffix], key) / medians[-1]
            cells += [f"{medians[-1]:.0f}", format_spread(measured, key), f"{ratio:.2f} x"]
        lines.append(f"| {name} | {' | '.join(cells)} | {medians[1] / medians[0]:.0%} |")
    write_section(f"Beside a busy process: {TITLES[part]}", lines)


TITLES = {
    "chat": "every part is trained",
    "align": "vision encoder and connector are trained, the language model is frozen",
    "projector": "the connector alone is trained",
}

if __name__ == "__main__":
    main()
