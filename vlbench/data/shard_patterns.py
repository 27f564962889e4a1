"""Tar files that are named by a pattern: `dir/{000000..000123}.tar`, or all of `dir/*.tar`."""

from __future__ import annotations

import glob
import re

from braceexpand import braceexpand

from vlbench.data.remote_shards import file_exists, is_url, shown_name
from vlbench.errors import UserError

MAX_PATTERN_FILES = 1_000_000  # LAION-5B has some 600,000 tar files of 10,000 samples
BRACE_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")
BRACE_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
COUNT_BOUND = 10**18  # where counting ends


def expand_shard_pattern(pattern: str) -> list[str]:
    """Return the tar files of a pattern; a missing one is a UserError.

    Those of a `*`, which is none in a URL, are in the order of their names; `**` is folders of any
    depth.
    """
    name = shown_name(pattern)
    if "*" in pattern and not is_url(pattern):
        tars = sorted(glob.glob(pattern, recursive=True))
        if not tars:
            raise UserError(f"data {name}: there is no such file")
        return tars
    if (count := count_pattern_files(pattern)) > MAX_PATTERN_FILES:
        raise UserError(
            f"data {name}: names {count:,} files; at most {MAX_PATTERN_FILES:,} are allowed"
        )
    try:
        tars = list(braceexpand(pattern))
    except ValueError:  # UnbalancedBracesError
        reason = "unbalanced braces; expected dir/{000000..000123}.tar"
        raise UserError(f"data {name}: {reason}") from None
    missing = [tar for tar in tars if not file_exists(tar)]
    if missing:
        raise UserError(
            f"data {name}: there is no {shown_name(missing[0])} ({len(missing)} are missing)"
        )
    return tars


def count_pattern_files(pattern: str) -> int:
    """Return how many files a pattern names, or `COUNT_BOUND`, without making their names.

    Lists inside of lists, which nobody writes, are counted by their inner ones.
    """
    count = 1
    for first, last, step in BRACE_RANGE.findall(pattern):
        span = abs(_read_bounded(last) - _read_bounded(first))
        count = min(count * (span // max(1, _read_bounded(step or "1")) + 1), COUNT_BOUND)
    for alternatives in BRACE_LIST.findall(pattern):
        count = min(count * (alternatives.count(",") + 1), COUNT_BOUND)
    return count


def _read_bounded(digits: str) -> int:
    """Return a number, at most `COUNT_BOUND`; Python refuses to read more than 4,300 digits."""
    digits = digits.lstrip("0")
    return COUNT_BOUND if len(digits) > 18 else int(digits or 0)
