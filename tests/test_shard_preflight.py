"""Shards that are missing or truncated: what a look at some samples says of all."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_shard_index import captioned, image_bytes, no_pause, write  # noqa: F401 fixtures

from vlbench.config.data_schema import MixtureSource
from vlbench.data.chosen_samples import take_part
from vlbench.data.preflight import inspect_source
from vlbench.data.shards import WebDatasetShards
from vlbench.train.quarantine import check_bad_samples

SHARDS, PER_SHARD = 40, 20


@pytest.fixture
def folder(image_bytes: bytes, tmp_path: Path) -> Path:  # noqa: F811
    """Shards, of which each tenth is truncated: five in eight hundred samples cannot be read."""
    for number in range(SHARDS):
        tar = write(tmp_path / f"{number:03d}.tar", captioned(image_bytes, ["a"] * PER_SHARD))
        if number % 10 == 9:
            tar.write_bytes(tar.read_bytes()[: -3 * 512 - 10240])
    return tmp_path


def test_a_truncated_shard_that_a_part_does_not_have_is_no_bad_sample_of_it(folder):
    shards = WebDatasetShards(folder / "*.tar")
    assert len(shards.truncated_samples()) == SHARDS // 10
    part, _ = take_part(shards, MixtureSource(train="x", sampling=f"first:{PER_SHARD}"), 0)
    report = inspect_source(part)
    assert report.bad_samples == [] and report.bad_sample_count == 0
    last, _ = take_part(shards, MixtureSource(train="x", sampling=f"end:{PER_SHARD // 2}"), 0)
    report = inspect_source(last)
    assert report.bad_sample_count == len(report.bad_samples) == 1


def test_of_some_samples_those_are_counted_that_are_among_them(folder):
    shards = WebDatasetShards(folder / "*.tar")
    report = inspect_source(shards, max_inspected_samples=200)
    inside = [bad for bad in report.bad_samples if 0 < (bad.record_number or 0) <= 100]
    assert len(report.bad_samples) == SHARDS // 10 and report.inspected_samples == 200
    assert report.bad_sample_count == max(1, len(inside)) < len(report.bad_samples)
    check_bad_samples(report.bad_samples, report.bad_sample_count, 200, "auto")  # 1 of 100 passes
    everything = inspect_source(shards)
    assert everything.bad_sample_count == len(everything.bad_samples) == SHARDS // 10


def test_missing_shards_are_named_and_counted_by_their_share(folder, tmp_path):
    paths = sorted(folder.glob("*.tar"))
    shards = WebDatasetShards(folder / "*.tar")
    for path in paths[1:-1:10]:
        path.unlink()
    report = inspect_source(shards, max_inspected_samples=100)
    assert sum("does not exist" in bad.reason for bad in report.bad_samples) == 4
    assert report.bad_sample_count == PER_SHARD  # of the one shard among the first 100 samples
