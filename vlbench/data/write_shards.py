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
from vlbench.data.pack_progress import LEFT_OUT_FILE, PackProgress, holds_finished_shards
from vlbench.data.record_images import EmbeddedImage
from vlbench.data.record_keys import find_unread_keys
from vlbench.data.sample import LazyImage, Sample
from vlbench.data.shard_index import IMAGE_EXTENSIONS, format_index, index_path, scan_tar
from vlbench.data.shard_list import SHARD_LIST_FILE
from vlbench.errors import BadSample, UserError
from vlbench.new_folder import check_new_folder, write_new_folder
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import format_json, write_atomically


def run_pack(arguments: PackArguments) -> int:
    """Write the shards of a file, and print what was left out; return the exit code."""
    source = ConversationFiles(arguments.data, arguments.images, arguments.allow_outside)
    folder = Path(arguments.out)
    check_new_folder(folder)
    try:
        progress = pack_dataset(source, folder, arguments.samples)
    except OSError as error:
        raise explain_unwritable(error, f"out={folder}") from error
    packed = sum(shard["samples"] for shard in progress.shards)
    print(f"{packed} samples in {len(progress.shards)} shards in {folder}, every image opened once")
    if progress.left_out_count:
        left_out = f"{progress.left_out_count} left out ({folder / LEFT_OUT_FILE})"
        print(f"{left_out}, the first: {progress.first_left_out}")
    if progress.dropped_keys:
        keys = ", ".join(sorted(progress.dropped_keys))
        print(f"not carried over, as they name images by the paths that they had: {keys}")
    if progress.dropped_turn_keys:
        keys = ", ".join(sorted(progress.dropped_turn_keys))
        print(f"not carried over, as turns have their role and text alone: {keys}")
    return 0


def pack_dataset(source: ConversationFiles, folder: Path, samples_per_shard: int) -> PackProgress:
    """Write the shards of a source; return what was written and left out.

    The folder appears complete: it is written under a temporary name and then renamed. Shards that
    were finished when an earlier `pack` of the same data was stopped are kept.
    """
    with write_new_folder(folder, holds_finished_shards) as writing:
        return _write_all_shards(writing, source, samples_per_shard)


def _write_all_shards(
    folder: Path, source: ConversationFiles, samples_per_shard: int
) -> PackProgress:
    """Write all shards, their indexes, the list of shards and the list of bad samples."""
    progress = PackProgress(folder, _describe_job(source, samples_per_shard))
    shards = progress.shards
    if shards:
        print(f"going on after {len(shards)} shards, at record {progress.next_index + 1}")
    bad_samples: list[BadSample] = []
    members = _sample_members(source, progress, bad_samples)
    while True:
        tar = folder / f"{len(shards):06d}.tar"
        count, last_index = _write_tar(tar, members, samples_per_shard)
        progress.add_left_out(bad_samples)
        bad_samples.clear()
        if not count:
            tar.unlink()
            break
        scan, size = scan_tar(str(tar)), tar.stat().st_size  # read back, as a check
        assert len(scan) == count and not scan.fault, f"{tar}: wrote {count}, read {scan}"
        write_atomically(Path(index_path(str(tar))), format_index(scan, (size, None)))
        progress.add_shard({"file": tar.name, "samples": count, "bytes": size}, last_index + 1)
    if not shards:
        raise UserError(
            f"{source.name}: holds no sample that can be packed; the first: "
            f"{progress.first_left_out}"
        )
    shard_list = json.dumps({"version": 1, "shards": shards}, indent=1) + "\n"
    write_atomically(folder / SHARD_LIST_FILE, shard_list)
    progress.finish()
    return progress


def _describe_job(source: ConversationFiles, samples_per_shard: int) -> dict[str, Any]:
    """Return what is equal only for a `pack` that would write the same shards."""
    return {
        "version": 1,
        "data": source.name,
        "stamps": [list(stamp) for stamp in source.records.stamps],
        "images": str(source.image_folder or ""),
        "allow_outside": source.allow_outside,
        "samples": samples_per_shard,
    }


def _write_tar(
    tar: Path, sample_members: Iterator[tuple[int, dict[str, Any]]], samples_per_shard: int
) -> tuple[int, int]:
    """Write the next samples into a tar file; return their number, and the last one's record."""
    count, index = 0, -1
    with TarWriter(str(tar), encoder=False, mtime=0, user="", group="") as writer:
        while count < samples_per_shard:
            found = next(sample_members, None)
            if found is None:
                break
            index, members = found
            writer.write(members)
            count += 1
    return count, index


def _sample_members(
    source: ConversationFiles, progress: PackProgress, bad_samples: list[BadSample]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each sample's record number and members: its record, and the bytes of its images."""
    start = progress.next_index
    numbers = range(start, len(source))
    for index in tqdm(numbers, "pack", len(source), initial=start, unit="sample", disable=None):
        try:
            sample = source[index]
            members: dict[str, Any] = {"__key__": f"{index:09d}"}
            image_names = []
            for number, image in enumerate(sample.images):
                assert isinstance(image, ImageFile | EmbeddedImage), "shards hold files"
                data = image.read_bytes()
                open_image_bytes(data, f"image {image.name}")
                image_names.append(f"{number}.{_image_extension(image)}")
                members[image_names[-1]] = data
        except BadSample as bad:
            bad_samples.append(bad)
            continue
        except UserError as error:
            bad_samples.append(BadSample(sample.id, str(error)))
            continue
        unread = _unread_values(source, index, sample)
        progress.dropped_turn_keys |= set(sample.unread_keys) - unread.keys()
        kept = {key: unread[key] for key in unread if _is_read_again(key, unread, image_names)}
        progress.dropped_keys |= unread.keys() - kept
        record = {**kept, **record_from_sample(sample, image_names)}
        members["json"] = format_json(record).encode()
        yield index, members


def _unread_values(source: ConversationFiles, index: int, sample: Sample) -> dict[str, Any]:
    """Return the keys of a record that are not read, with their values as JSON has them.

    Those of its turns and of parts of a content (`turn KEY`) are left out.
    """
    if not sample.unread_keys:
        return {}
    original = source.read_record(index)
    values = {key: original[key] for key in sample.unread_keys if key in original}
    unread: dict[str, Any] = json.loads(json.dumps(values, default=str))  # dates of Parquet files
    return unread


def _is_read_again(key: str, unread: dict[str, Any], image_names: list[str]) -> bool:
    """Tell whether a key is metadata in a shard, too, where images have other names.

    A path of an image is metadata beside the image; beside `0.jpg` it is an image that is not read.
    """
    try:
        find_unread_keys("", {key: unread[key]}, (), image_names)
    except BadSample:
        return False
    return True


def _image_extension(image: LazyImage) -> str:
    """Return the extension of an image in a tar file, `jpg` for one that readers do not know.

    Readers detect the format by content.
    """
    extension = Path(image.name).suffix.removeprefix(".").lower()
    return extension if extension in IMAGE_EXTENSIONS else "jpg"
