"""100 million samples in 10,000 shards: how long until a position is found, and in how much memory.

    python benchmarks/shard_lookup.py

The list of shards is real, the tar files are not there: the order needs none of them.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from result_table import write_section

SHARDS, SAMPLES = 10_000, 10_000
SEEKS = 1000


def main() -> None:
    """Print the table."""
    from vlbench.data.shards import WebDatasetShards
    from vlbench.data.shuffle import SourceMixture

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        listed = [{"file": f"{n:06d}.tar", "samples": SAMPLES} for n in range(SHARDS)]
        (Path(folder) / "shards.json").write_text(json.dumps({"version": 1, "shards": listed}))
        began = time.perf_counter()
        mixture = SourceMixture([(WebDatasetShards(folder), 1.0)], seed=0)
        opened = time.perf_counter() - began
        began = time.perf_counter()
        mixture.locate_sample(len(mixture) - 1)
        first = time.perf_counter() - began
        began = time.perf_counter()
        for number in range(SEEKS):
            mixture.locate_sample(number * len(mixture) // SEEKS)
        each = (time.perf_counter() - began) / SEEKS
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    write_section(
        "Shards",
        [
            f"| {SHARDS * SAMPLES:,} samples in {SHARDS:,} shards | |",
            "|---|---:|",
            f"| opening the list | {opened:.2f} s |",
            f"| shuffling, and the first position anywhere | {first:.2f} s |",
            f"| every further position | {1e6 * each:.0f} us |",
            f"| memory above the imports | {memory:.0f} MB |",
        ],
    )


if __name__ == "__main__":
    main()
