"""`python -m vlbench pack data=FILE.json images=FOLDER out=DIR`: a data set as shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from vlbench.command_line.arguments import PackArguments
from vlbench.data.conversation_files import LlavaJson
from vlbench.data.conversation_record import record_from_sample
from vlbench.data.image_processing import open_image_bytes
from vlbench.data.shard_index import IMAGE_EXTENSIONS, format_index, index_path, scan_tar
from vlbench.data.shards import SHARD_LIST_FILE
from vlbench.errors import BadSample, UserError
from vlbench.text_files import format_json_lines, write_atomically

LEFT_OUT_FILE = "left_out.jsonl"


def run_pack(arguments: PackArguments) -> int:
    """Write the shards of a file, and say what was left out; return the exit code."""
    source = LlavaJson(Path(arguments.data), arguments.images)
    folder = Path(arguments.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={folder} is there already and not empty; name a new folder")
    try:
        shards, bad = pack_dataset(source, folder, arguments.samples)
    except OSError as error:
        raise UserError(f"out={folder} cannot be written ({error.strerror})") from error
    packed = sum(shard["samples"] for shard in shards)
    print(f"{packed} samples in {len(shards)} shards in {folder}, every picture opened once")
    if bad:
        print(f"{len(bad)} left out ({folder / LEFT_OUT_FILE}), the first: {bad[0]}")
    return 0


def pack_dataset(
    source: LlavaJson, folder: Path, samples_per_shard: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write `samples` to a shard; return the list of shards, and the samples that cannot be used.

    The folder appears whole: it is written under another name and then renamed.
    """
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        shards, bad = _write_all_shards(writing, source, samples_per_shard)
        if folder.exists():
            folder.rmdir()
        writing.rename(folder)
    finally:  # nothing is left of what was interrupted, or found no room
        shutil.rmtree(writing, ignore_errors=True)
    return shards, bad


def _write_all_shards(
    folder: Path, source: LlavaJson, samples_per_shard: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write all shards and what tells of them."""
    bad: list[BadSample] = []
    good = _sample_members(source, bad)
    shards: list[dict[str, Any]] = []
    while True:
        tar = folder / f"{len(shards):06d}.tar"
        count = _write_tar(tar, good, samples_per_shard)
        if not count:
            tar.unlink()
            break
        found, size = scan_tar(str(tar)), tar.stat().st_size  # as a reader finds it: it is whole
        assert len(found) == count and not found.fault, f"{tar}: wrote {count}, finds {found}"
        write_atomically(Path(index_path(str(tar))), format_index(found, (size, None)))
        shards.append({"file": tar.name, "samples": count, "bytes": size})
    if not shards:
        raise UserError(f"{source.name}: holds no sample that can be packed; the first: {bad[0]}")
    write_atomically(
        folder / SHARD_LIST_FILE, json.dumps({"version": 1, "shards": shards}, indent=1) + "\n"
    )
    lines = format_json_lines({"id": one.sample_id, "reason": one.reason} for one in bad)
    write_atomically(folder / LEFT_OUT_FILE, lines)
    return shards, bad


def _write_tar(tar: Path, sample_members: Iterator[dict[str, Any]], samples_per_shard: int) -> int:
    """Write the next samples into a tar file, and return how many there were."""
    count = 0
    with TarWriter(str(tar), encoder=False, mtime=0, user="", group="") as writer:
        while count < samples_per_shard:
            members = next(sample_members, None)
            if members is None:
                break
            writer.write(members)
            count += 1
    return count


def _sample_members(source: LlavaJson, bad_samples: list[BadSample]) -> Iterator[dict[str, Any]]:
    """Give what goes into a tar file of each sample: its record and the bytes of its pictures."""
    for index in tqdm(range(len(source)), desc="pack", unit="sample", disable=None):
        try:
            sample = source[index]
            members: dict[str, Any] = {"__key__": f"{index:09d}"}
            names = []
            for number, picture in enumerate(sample.images):
                data = Path(picture.name).read_bytes()
                open_image_bytes(data, f"image {picture.name}")
                names.append(f"{number}.{_image_extension(picture.name)}")
                members[names[-1]] = data
        except OSError as error:
            bad_samples.append(BadSample(sample.id, f"image {error.filename}: {error.strerror}"))
            continue
        except BadSample as fault:
            bad_samples.append(fault)
            continue
        except UserError as mistake:
            bad_samples.append(BadSample(sample.id, str(mistake)))
            continue
        kept = {key: source.records[index].get(key) for key in sample.unread_keys}
        record = {**kept, **record_from_sample(sample, names)}
        members["json"] = json.dumps(record, ensure_ascii=False).encode()
        yield members


def _image_extension(file_name: str) -> str:
    """Return the extension of a picture in a tar file; `jpg` for one that readers would not know.

    What it is shows in its bytes.
    """
    kind = Path(file_name).suffix.removeprefix(".").lower()
    return kind if kind in IMAGE_EXTENSIONS else "jpg"
