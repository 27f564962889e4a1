"""Tar files as people have them: replaced, truncated, joined, with odd names, links, no texts."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vlbench.__main__ import main
from vlbench.data import shards as shards_module
from vlbench.data.preflight import inspect_source
from vlbench.data.sample import sample_at
from vlbench.data.scene_world import make_scene
from vlbench.data.shard_index import index_path, load_shard_index
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError

TURNS = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def image_bytes() -> bytes:
    content = io.BytesIO()
    make_scene("files", 0, 0).open().save(content, "JPEG")
    return content.getvalue()


def write(
    file: Path, members: list[tuple[str, bytes]], how: int = tarfile.GNU_FORMAT, mode: str = "w"
) -> Path:
    with tarfile.open(file, mode, format=how) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def captioned(image_bytes: bytes, captions: list[str]) -> list[tuple[str, bytes]]:
    return [
        (f"{number}.{kind}", content)
        for number, caption in enumerate(captions)
        for kind, content in (("jpg", image_bytes), ("txt", caption.encode()))
    ]


def record(**keys: Any) -> bytes:
    return json.dumps({"id": "a", "conversations": TURNS, **keys}).encode()


def captions(shards: WebDatasetShards) -> list[str]:
    """Return the captions of samples; of a bad one the reason."""
    found = []
    for number in range(len(shards)):
        try:
            sample = shards[number]
            assert all(image.open() for image in sample.images)
            found.append(sample.caption_text)
        except BadSample as bad:
            found.append(bad.reason)
    return found


SIX = ["nought", "one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    "again",
    [
        ["nought and more", *SIX[1:5], "5"],
        SIX[::-1],
        [*SIX, "six"],
        SIX[:4],
    ],
    ids=["captions", "order", "longer", "shorter"],
)
def test_a_tar_that_was_made_again_is_indexed_again(again, image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    assert captions(WebDatasetShards(tar)) == SIX
    write(tar, captioned(image_bytes, again))
    assert captions(WebDatasetShards(tar)) == again
    shards_module._cached_index.cache_clear()  # as another process finds it
    assert captions(WebDatasetShards(tar)) == again


def test_an_index_of_another_tar_of_the_same_size_and_time_is_noticed(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    before = tar.stat()
    assert captions(WebDatasetShards(tar)) == SIX
    write(tar, captioned(image_bytes, ["nought!", *SIX[1:]]))
    os.utime(tar, ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert tar.stat().st_size == before.st_size  # tar files are padded
    found = captions(WebDatasetShards(tar))
    assert "is another file than" in found[0] and "x.tar.index" in found[0]
    assert found[1:] == SIX[1:]


@pytest.mark.parametrize("cut", ["between", "header", "data", "padding", "no end", "before txt"])
def test_a_truncated_tar_is_named_and_read_anew_when_it_is_whole(
    cut, image_bytes, tmp_path, capsys
):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        third, text = file.getmember("3.jpg"), file.getmember("3.txt")
        end = file.getmembers()[-1].offset_data + 512
    at = {
        "between": third.offset,
        "header": third.offset + 100,
        "data": third.offset_data + 100,
        "padding": third.offset - 100,
        "no end": end,
        "before txt": text.offset,
    }[cut]
    tar.write_bytes(content[:at])
    whole = 6 if cut == "no end" else 3
    for _ in range(2):  # by reading it, and by its index
        shards = WebDatasetShards(tar)
        found = captions(shards)
        assert found[:whole] == SIX[:whole] and len(found) == whole + 1
        assert "x.tar: is truncated: it ends at byte" in found[-1]
        assert f"; {whole} samples before that can be read" in found[-1]
        (known,) = inspect_source(shards).bad_samples
        with pytest.raises(BadSample) as met:
            sample_at(shards, whole)
        assert (known.record_identity, str(known)) == (met.value.record_identity, str(met.value))
    words = ["recipe=yivl_llava", f"data.train={tar}", "only=chat"]
    assert main(["fit", *words, f"run={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert (
        "is truncated" in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
    )
    tar.write_bytes(content)
    assert (
        captions(WebDatasetShards(tar)) == SIX
        and not inspect_source(WebDatasetShards(tar)).bad_samples
    )


def test_bytes_behind_the_end_are_named(image_bytes, tmp_path):
    one = write(tmp_path / "one.tar", captioned(image_bytes, SIX[:2])).read_bytes()
    tar = tmp_path / "both.tar"
    tar.write_bytes(one + one)
    found = captions(WebDatasetShards(tar))
    assert found[:2] == SIX[:2] and "two tar files in one" in found[2] and len(found) == 3


def test_a_header_that_is_overwritten_is_named(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as file:
        at = file.getmember("3.jpg").offset
    content[at : at + 512] = b"x" * 512
    tar.write_bytes(content)
    found = captions(WebDatasetShards(tar))
    assert found[:3] == SIX[:3] and f"at byte {at} there is no header" in found[3]


@pytest.mark.parametrize(
    "truncate", [lambda text: "", lambda text: text[:-30], lambda text: "nonsense\n" + text, None]
)
def test_a_truncated_or_older_index_is_made_anew(truncate, image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    load_shard_index(str(tar))
    index = Path(index_path(str(tar)))
    text = index.read_text()
    old = '["0", {"jpg": [512, 9], "txt": [9216, 1]}]\n'
    index.write_text(truncate(text) if truncate else old)
    shards_module._cached_index.cache_clear()
    assert captions(WebDatasetShards(tar)) == SIX and index.read_text() == text


def test_many_that_index_at_once_agree_and_leave_nothing(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX * 20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(load_shard_index(str(tar)).entries), range(24)))
    assert all(one == found[0] for one in found) and len(found[0]) == 120
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar", "x.tar.index"]


def test_an_index_takes_little_memory(image_bytes, tmp_path):
    tar, count = tmp_path / "a.tar", 500
    write(tar, captioned(image_bytes, ["thing"] * count))
    load_shard_index(str(tar))
    tracemalloc.start()
    scan = load_shard_index(str(tar))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(scan) == count and taken < 200 * count  # 64 of 10,000 samples are kept in a process
    assert [entry.key for entry in scan.entries[:2]] == ["0", "1"]
    assert set(scan.entries[count - 1].members) == {"jpg", "txt"}


def test_an_index_that_cannot_be_kept_is_no_trouble(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX))
    Path(index_path(str(tar))).mkdir()
    assert captions(WebDatasetShards(tar)) == SIX
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.tar", "x.tar.index"]


@pytest.mark.parametrize("name", ["0.jpg", "images/0.jpg", "./images/0.jpg", "v1.5/0.jpg", "0.JPG"])
@pytest.mark.parametrize("member", ["0.jpg", "0.JPG", "./0.jpg", "v1.5/0.Jpg"])
def test_a_record_finds_its_image_by_the_base_name(name, member, image_bytes, tmp_path):
    text = member.rpartition(".")[0] + ".json"
    tar = write(tmp_path / "x.tar", [(member, image_bytes), (text, record(image=name))])
    assert captions(WebDatasetShards(tar)) == ["red"] and len(WebDatasetShards(tar)[0].images) == 1


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": []}, {"image": ""}])
def test_a_record_that_names_no_image_has_those_of_its_key(image, image_bytes, tmp_path):
    both = [{"from": "human", "value": "<image><image>"}, TURNS[1]]
    members = [("0.jpg", image_bytes), ("0.json", record(**image))]
    members += [(f"1.{number}.jpg", image_bytes) for number in (10, 2)]
    members += [("1.json", record(**image, conversations=both))]
    shards = WebDatasetShards(write(tmp_path / "x.tar", members))
    assert captions(shards) == ["red", "red"]
    assert [[p.name.split(": ")[1] for p in shards[n].images] for n in (0, 1)] == [
        ["0.jpg"],
        ["1.2.jpg", "1.10.jpg"],
    ]


def test_an_image_that_is_not_there_is_named_with_those_that_are(image_bytes, tmp_path):
    members = [("0.png", image_bytes), ("0.json", record(image="x/0.jpg"))]
    (found,) = captions(WebDatasetShards(write(tmp_path / "x.tar", members)))
    assert found == "its shard has no image x/0.jpg (its images: 0.png)"


def test_large_letters_in_extensions_are_those_of_small_ones(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", [("0.JPG", image_bytes), ("0.TXT", b"\xef\xbb\xbfred\r\n")])
    assert captions(WebDatasetShards(tar)) == ["red"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"p")], "has no text: expected a member .txt, .caption or .text"),
        ([("0.jpg", b"p"), ("0.cls", b"3")], "has no text.*members: jpg, cls"),
        ([("0.jpg", b"p"), ("0.json", b'{"alt": "red"}')], "has no text.*keys of its json: alt"),
        ([("0.jpg", b"p"), ("0.txt", b" \n")], "its text is empty"),
        ([("0.jpg", b"p"), ("0.txt", b"caf\xe9")], "its txt is not UTF-8 text .byte 4."),
        ([("0.jpg", b"p"), ("0.png", b"p"), ("0.txt", b"red")], "has 2 images .jpg, png."),
        ([("0.txt", b"red")], "has no image"),
        ([("0.jpg", b"p"), ("0.json", b"{")], "its json cannot be read"),
        ([("0.jpg", b"p"), ("0.json", b"[1]")], "its json is not a mapping"),
    ],
)
def test_samples_that_cannot_be_used_are_named(members, message, tmp_path):
    shards = WebDatasetShards(write(tmp_path / "x.tar", members))
    with pytest.raises(BadSample, match=message):
        _ = shards[0]


def test_what_is_left_out_is_counted_and_said(image_bytes, tmp_path, capsys):
    members = captioned(image_bytes, SIX[:2])
    members += [("._0.jpg", b"junk"), ("d/._1.txt", b"junk"), ("README", b"hello")]
    tar = write(tmp_path / "x.tar", members)
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        file.addfile(link)
    shards = WebDatasetShards(tar)
    assert captions(shards) == SIX[:2]
    assert sorted(note.split(" (")[0] for note in shards.notes) == [
        "left out: 1 links to nothing in the file, devices and sparse files",
        "left out: 1 members that belong to no image, text or json",
        "left out: 2 hidden files",
    ]
    words = ["recipe=yivl_llava", f"data.train={tar}", "only=chat", f"out={tmp_path / 'out'}"]
    assert main(["check", *words]) == 0
    assert "left out: 2 hidden files" in capsys.readouterr().out


def test_a_hard_link_is_the_image_that_it_links_to(image_bytes, tmp_path):
    tar = write(tmp_path / "x.tar", captioned(image_bytes, SIX[:1]))
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "0.jpg"
        file.addfile(link)
    write(tar, [("1.txt", b"same")], mode="a")
    assert captions(WebDatasetShards(tar)) == ["nought", "same"]


def test_members_of_a_sample_need_not_be_neighbours_and_the_last_of_a_name_counts(
    image_bytes, tmp_path
):
    members = captioned(image_bytes, SIX[:3])
    tar = write(tmp_path / "x.tar", members[::2] + members[1::2] + [("0.txt", b"mended")])
    shards = WebDatasetShards(tar)
    assert captions(shards) == ["mended", *SIX[1:3]]
    assert "1 members of a name that comes again later" in shards.notes[0]


@pytest.mark.parametrize("how", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(how, image_bytes, tmp_path):
    stem = f"{'folder/' * 20}{'n' * 120}\u732b"
    members = [(f"{stem}.jpg", image_bytes), (f"{stem}.txt", b"far")]
    shards = WebDatasetShards(write(tmp_path / "x.tar", members, how))
    assert captions(shards) == ["far"] and shards[0].id == stem
    shards_module._cached_index.cache_clear()
    assert captions(WebDatasetShards(tmp_path / "x.tar")) == ["far"]


def test_names_that_are_not_utf8_are_read_and_can_be_printed(image_bytes, tmp_path):
    how: Any = {"encoding": "latin-1", "format": tarfile.GNU_FORMAT}
    with tarfile.open(tmp_path / "x.tar", "w", **how) as tar:
        for name, data in (("caf\xe9.jpg", b""), ("caf\xe9.txt", b"red")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for _ in range(2):  # the second reads the index
        shards_module._cached_index.cache_clear()
        (sample,) = WebDatasetShards(tmp_path / "x.tar")
        assert (sample.id, sample.caption_text) == ("caf\\udce9", "red")
        with pytest.raises(UserError, match="is empty") as caught:
            sample.images[0].open()
        assert str(caught.value).encode()


def test_two_stars_are_folders_of_any_depth(image_bytes, tmp_path):
    for name in ("0.tar", "a/1.tar", "a/b/2.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, captioned(image_bytes, [name]))
    shards = WebDatasetShards(tmp_path / "**/*.tar")
    assert [shards[n].caption_text for n in range(len(shards))] == ["0.tar", "a/1.tar", "a/b/2.tar"]


def test_a_pattern_with_half_of_its_braces_is_named(tmp_path):
    with pytest.raises(UserError, match="unbalanced braces"):
        WebDatasetShards(tmp_path / "{0..3.tar")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.TGZ"])
def test_a_compressed_tar_is_named(name, image_bytes, tmp_path, capsys):
    tar = write(tmp_path / "plain.tar", captioned(image_bytes, SIX[:1]))
    (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
    words = ["recipe=yivl_llava", f"data.train={tmp_path / name}", "only=chat"]
    assert main(["fit", *words, f"run={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "is compressed" in said and "gunzip" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty .0 bytes."),
        (b"\0" * 10240, "holds no samples"),
        (b"<html>not found</html>", "is not a tar file"),
        (b"version https://git-lfs.github.com/spec/v1\noid x\n", "is a Git-LFS pointer"),
    ],
)
def test_a_file_that_is_no_shard_is_named(content, message, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=message):
        WebDatasetShards(tmp_path / "x.tar")


def test_an_empty_tar_among_others_is_no_trouble(image_bytes, tmp_path):
    for number, some in enumerate((SIX[:2], [], SIX[2:3])):
        write(tmp_path / f"{number}.tar", captioned(image_bytes, some))
    shards = WebDatasetShards(str(tmp_path / "{0..2}.tar"))
    assert captions(shards) == SIX[:3] and shards.sample_counts == [2, 0, 1]
    assert sorted(map(shards.pass_order("x"), range(3))) == [0, 1, 2]


def test_keys_with_the_line_ends_of_unicode_are_read(image_bytes, tmp_path):
    key = "a\u2028b\u2029c\x85d"
    tar = write(tmp_path / "x.tar", [(f"{key}.jpg", image_bytes), (f"{key}.txt", b"odd")])
    for _ in range(2):
        assert captions(WebDatasetShards(tar)) == ["odd"]
        shards_module._cached_index.cache_clear()
