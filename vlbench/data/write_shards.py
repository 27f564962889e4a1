"""`python -m vlbench pack data=FILE.json images=FOLDER out=DIR`: a data set as shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from vlbench.command_line.arguments import PackArguments
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.conversation_record import record_from_sample
from vlbench.data.image_processing import ImageFile, open_image_bytes
from vlbench.data.record_images import EmbeddedImage
from vlbench.data.shard_index import IMAGE_EXTENSIONS, format_index, index_path, scan_tar
from vlbench.data.shards import SHARD_LIST_FILE
from vlbench.errors import BadSample, UserError
from vlbench.new_folder import write_new_folder
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import format_json, format_json_lines, write_atomically

LEFT_OUT_FILE = "left_out.jsonl"


def run_pack(arguments: PackArguments) -> int:
    """Write the shards of a file, and print what was left out; return the exit code."""
    source = ConversationFiles(arguments.data, arguments.images, arguments.allow_outside)
    folder = Path(arguments.out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out={folder} exists and is not empty; name a new folder")
    try:
        shards, bad_samples = pack_dataset(source, folder, arguments.samples)
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error
    packed = sum(shard["samples"] for shard in shards)
    print(f"{packed} samples in {len(shards)} shards in {folder}, every image opened once")
    if bad_samples:
        left_out = f"{len(bad_samples)} left out ({folder / LEFT_OUT_FILE})"
        print(f"{left_out}, the first: {bad_samples[0]}")
    return 0


def pack_dataset(
    source: ConversationFiles, folder: Path, samples_per_shard: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write the shards of a source; return the list of shards, and the bad samples.

    The folder appears complete: it is written under a temporary name and then renamed.
    """
    with write_new_folder(folder) as writing:
        return _write_all_shards(writing, source, samples_per_shard)


def _write_all_shards(
    folder: Path, source: ConversationFiles, samples_per_shard: int
) -> tuple[list[dict[str, Any]], list[BadSample]]:
    """Write all shards, their indexes, the list of shards and the list of bad samples."""
    bad_samples: list[BadSample] = []
    members = _sample_members(source, bad_samples)
    shards: list[dict[str, Any]] = []
    while True:
        tar = folder / f"{len(shards):06d}.tar"
        count = _write_tar(tar, members, samples_per_shard)
        if not count:
            tar.unlink()
            break
        scan, size = scan_tar(str(tar)), tar.stat().st_size  # read back, as a check
        assert len(scan) == count and not scan.fault, f"{tar}: wrote {count}, read {scan}"
        write_atomically(Path(index_path(str(tar))), format_index(scan, (size, None)))
        shards.append({"file": tar.name, "samples": count, "bytes": size})
    if not shards:
        raise UserError(
            f"{source.name}: holds no sample that can be packed; the first: {bad_samples[0]}"
        )
    shard_list = json.dumps({"version": 1, "shards": shards}, indent=1) + "\n"
    write_atomically(folder / SHARD_LIST_FILE, shard_list)
    lines = format_json_lines({"id": bad.sample_id, "reason": bad.reason} for bad in bad_samples)
    write_atomically(folder / LEFT_OUT_FILE, lines)
    return shards, bad_samples


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


def _sample_members(
    source: ConversationFiles, bad_samples: list[BadSample]
) -> Iterator[dict[str, Any]]:
    """Yield the members of each sample: its record and the bytes of its images."""
    for index in tqdm(range(len(source)), desc="pack", unit="sample", disable=None):
        try:
            sample = source[index]
            members: dict[str, Any] = {"__key__": f"{index:09d}"}
            image_names = []
            for number, image in enumerate(sample.images):
                assert isinstance(image, ImageFile | EmbeddedImage), "shards hold files"
                data = image.read_bytes()
                open_image_bytes(data, f"image {image.name}")
                image_names.append(f"{number}.{_image_extension(image.name)}")
                members[image_names[-1]] = data
        except BadSample as bad:
            bad_samples.append(bad)
            continue
        except UserError as error:
            bad_samples.append(BadSample(sample.id, str(error)))
            continue
        original = source.read_record(index)
        unread = {key: original.get(key) for key in sample.unread_keys}
        record = {**unread, **record_from_sample(sample, image_names)}
        members["json"] = format_json(record).encode()
        yield members


def _image_extension(file_name: str) -> str:
    """Return the extension of an image in a tar file, `jpg` for one that readers do not know.

    Readers detect the format by content.
    """
    extension = Path(file_name).suffix.removeprefix(".").lower()
    return extension if extension in IMAGE_EXTENSIONS else "jpg"
