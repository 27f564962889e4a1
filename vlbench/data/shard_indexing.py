"""Many tar files at the start: their indexes are looked for, or made, at the same time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vlbench.data.shard_index import load_shard_summary

INDEXING_THREADS = 16  # they wait for a disk or a server, most of the time
NOTICE_SECONDS = 30.0  # between two lines about how far it is


def load_summaries(name: str, tars: Sequence[str]) -> Iterator[tuple[int, Counter[str], str]]:
    """Yield what `load_shard_summary` says of each tar file, in their order.

    Reading the headers of 10,000 samples takes a second, and more over a network: of many files
    without an index, which `name` names, it is said how far that is.
    """
    start, told = time.monotonic(), 0.0
    pool = ThreadPoolExecutor(INDEXING_THREADS)
    try:
        for done, summary in enumerate(pool.map(load_shard_summary, tars), start=1):
            yield summary
            seconds = time.monotonic() - start
            if seconds - told > NOTICE_SECONDS:
                told, left = seconds, seconds * (len(tars) - done) / done
                print(
                    f"{name}: {done:,} of {len(tars):,} tar files are indexed, which is done once "
                    f"where indexes can be kept beside them; about {left / 60:,.0f} minutes left",
                    flush=True,
                )
    finally:
        pool.shutdown(cancel_futures=True)
