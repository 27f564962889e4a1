"""`python -m vlbench pack data=FILE.json images=FOLDER to=DIR`: a data set into shards, checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from vlbench.data.images import open_bytes
from vlbench.data.llava import LlavaJson
from vlbench.data.record import record_of_sample
from vlbench.data.shard_index import beside, text
from vlbench.data.shard_scan import PICTURES, scan
from vlbench.data.shards import LIST
from vlbench.files import json_lines, write_whole
from vlbench.mistakes import BadSample, Mistake
from vlbench.words import given_keys, whole

LEFT_OUT = "left_out.jsonl"
SAMPLES = 10_000  # in a shard: about a gigabyte of pictures at 448 pixels


def main(words: list[str]) -> int:
    """Write the shards of a file, and say what was left out; return the exit code."""
    given = given_keys("pack", words, ("data", "to"), ("images", "samples"))
    source = LlavaJson(Path(given["data"]).expanduser(), given.get("images"))
    samples = whole(given, "samples", SAMPLES, 1, 10**7)
    folder = Path(given["to"]).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Mistake(f"to={folder} is there already and not empty; name a new folder")
    try:
        shards, bad = pack(source, folder, samples)
    except OSError as error:
        raise Mistake(f"to={folder} cannot be written ({error.strerror})") from error
    packed = sum(shard["samples"] for shard in shards)
    print(f"{packed} samples in {len(shards)} shards in {folder}, every picture opened once")
    if bad:
        print(f"{len(bad)} left out ({folder / LEFT_OUT}), the first: {bad[0]}")
    return 0


def pack(
    source: LlavaJson, folder: Path, samples: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write `samples` to a shard; return the list of shards, and the samples that cannot be used.

    The folder appears whole: it is written under another name and then renamed.
    """
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        shards, bad = _fill(writing, source, samples)
        if folder.exists():
            folder.rmdir()
        writing.rename(folder)
    finally:  # nothing is left of what was interrupted, or found no room
        shutil.rmtree(writing, ignore_errors=True)
    return shards, bad


def _fill(
    folder: Path, source: LlavaJson, samples: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write all shards and what tells of them."""
    bad: list[BadSample] = []
    good = _members(source, bad)
    shards: list[dict[str, Any]] = []
    while True:
        tar = folder / f"{len(shards):06d}.tar"
        count = _write(tar, good, samples)
        if not count:
            tar.unlink()
            break
        found, size = scan(str(tar)), tar.stat().st_size  # as a reader finds it: it is whole
        assert len(found) == count and not found.fault, f"{tar}: wrote {count}, finds {found}"
        write_whole(Path(beside(str(tar))), text(found, (size, None)))
        shards.append({"file": tar.name, "samples": count, "bytes": size})
    if not shards:
        raise Mistake(f"{source.name}: holds no sample that can be packed; the first: {bad[0]}")
    write_whole(folder / LIST, json.dumps({"version": 1, "shards": shards}, indent=1) + "\n")
    lines = json_lines({"id": one.sample_id, "reason": one.reason} for one in bad)
    write_whole(folder / LEFT_OUT, lines)
    return shards, bad


def _write(tar: Path, good: Iterator[dict[str, Any]], samples: int) -> int:
    """Write the next samples into a tar file, and return how many there were."""
    count = 0
    with TarWriter(str(tar), encoder=False, mtime=0, user="", group="") as writer:
        while count < samples:
            members = next(good, None)
            if members is None:
                break
            writer.write(members)
            count += 1
    return count


def _members(source: LlavaJson, bad: list[BadSample]) -> Iterator[dict[str, Any]]:
    """Give what goes into a tar file of each sample: its record and the bytes of its pictures."""
    for index in tqdm(range(len(source)), desc="pack", unit="sample", disable=None):
        try:
            sample = source[index]
            members: dict[str, Any] = {"__key__": f"{index:09d}"}
            names = []
            for number, picture in enumerate(sample.pictures):
                data = Path(picture.name).read_bytes()
                open_bytes(data, f"image {picture.name}")
                names.append(f"{number}.{_kind(picture.name)}")
                members[names[-1]] = data
        except OSError as error:
            bad.append(BadSample(sample.id, f"image {error.filename}: {error.strerror}"))
            continue
        except BadSample as fault:
            bad.append(fault)
            continue
        except Mistake as mistake:
            bad.append(BadSample(sample.id, str(mistake)))
            continue
        kept = {key: source.records[index].get(key) for key in sample.unread}
        record = {**kept, **record_of_sample(sample, names)}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        yield members


def _kind(name: str) -> str:
    """Return the extension of a picture in a tar file; `jpg` for one that readers would not know.

    What it is shows in its bytes.
    """
    kind = Path(name).suffix.removeprefix(".").lower()
    return kind if kind in PICTURES else "jpg"
