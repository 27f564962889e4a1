"""Many tar files are indexed at the same time, and how far that is is said."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from vlbench.data import shard_indexing
from vlbench.data.shard_indexing import load_summaries
from vlbench.errors import UserError

TARS = [str(number) for number in range(64)]


def summary_of(tar: str) -> tuple[int, Counter[str], str]:
    return int(tar), Counter(), ""


def test_summaries_are_in_the_order_of_the_files_and_made_at_the_same_time(monkeypatch):
    meeting = threading.Barrier(4, timeout=60)  # four are under way at once, or it breaks

    def meet(tar: str) -> tuple[int, Counter[str], str]:
        meeting.wait()
        return summary_of(tar)

    monkeypatch.setattr(shard_indexing, "load_shard_summary", meet)
    assert [count for count, *_ in load_summaries("x", TARS)] == list(range(64))


def test_it_is_said_how_far_it_is_where_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(shard_indexing, "load_shard_summary", summary_of)
    assert len(list(load_summaries("x/*.tar", TARS))) == 64 and not capsys.readouterr().out
    monkeypatch.setattr(shard_indexing, "NOTICE_SECONDS", -1.0)
    list(load_summaries("x/*.tar", TARS))
    assert "x/*.tar: 1 of 64 tar files are indexed" in capsys.readouterr().out


def test_what_is_no_shard_ends_it_without_the_others(monkeypatch):
    read = []

    def refuse(tar: str) -> tuple[int, Counter[str], str]:
        read.append(tar)
        raise UserError(f"{tar}: is not a tar file")

    monkeypatch.setattr(shard_indexing, "load_shard_summary", refuse)
    monkeypatch.setattr(shard_indexing, "INDEXING_THREADS", 1)
    with pytest.raises(UserError, match="0: is not a tar file"):
        list(load_summaries("x", [str(number) for number in range(10_000)]))
    assert len(read) < 10_000
