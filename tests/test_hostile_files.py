"""Files that hang, fill the memory or belong to somebody else: one line, or a bad sample by name.

Each is met as a user meets it: as the file of a verb, as a record of a data set, or as an image.
What could take the machine's memory runs in a fork that is watched.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forked_command import run_command, run_forked
from PIL import Image

from vlbench.config.recipe import load_recipe
from vlbench.data import image_decoding, image_download
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.feature_store import content_key
from vlbench.data.image_processing import ImageFile, ImageTransform, open_image
from vlbench.data.preflight import inspect_source
from vlbench.data.shards import WebDatasetShards, read_member
from vlbench.errors import BadSample, UserError
from vlbench.regular_files import MAX_DATA_BYTES, open_regular

Maker = Callable[[Path], object]


def sparse(beginning: bytes, size: int) -> Maker:
    """Make a file that is large and takes no place on the disk."""

    def make(path: Path) -> None:
        path.write_bytes(beginning)
        os.truncate(path, size)

    return make


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # a name of at most 100 characters


def link_to(target: str) -> Maker:
    return lambda path: path.symlink_to(target)


NOT_FILES: dict[str, tuple[Maker, str]] = {
    "endless device": (link_to("/dev/zero"), "is a device, not a file"),
    "random device": (link_to("/dev/urandom"), "is a device, not a file"),
    "terminal or null": (link_to("/dev/null"), "is a device, not a file"),
    "named pipe": (os.mkfifo, "is a named pipe, not a file"),
    "folder": (Path.mkdir, "is a folder, not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}
READERS: dict[str, Callable[[Path], list[object]]] = {
    "pack": lambda file: ["pack", f"data={file}", "out=packed"],
    "recipe": lambda file: ["fit", f"recipe={file}"],
    "score": lambda file: ["score", "task=mmmu", f"answers={file}", "protocol=yi"],
}
ENDINGS = {"pack": ".json", "recipe": ".yaml", "score": ".json"}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("verb", READERS)
def test_what_is_no_file_is_refused_as_a_file_of_a_verb(tmp_path, verb, kind):
    file = tmp_path / f"given{ENDINGS[verb]}"
    make, words = NOT_FILES[kind]
    make(file)
    if (verb, kind) == ("score", "folder"):
        words = "a folder without"  # a folder of answers is read, too
    line = run_command(READERS[verb](file), tmp_path).assert_one_line()
    assert str(file) in line and words in line


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_is_no_image(tmp_path, kind):
    make, words = NOT_FILES[kind]
    make(tmp_path / "a.png")
    for read in (ImageFile.open, content_key):
        with pytest.raises(UserError, match=rf"image .*a\.png: .*{words}"):
            read(ImageFile(tmp_path / "a.png"))


LARGE = {
    "more than any data": ("pack", sparse(b"[", MAX_DATA_BYTES + 1), "has 69 GB; at most 69 GB"),
    "zeros as JSON": ("pack", sparse(b"", 20 << 30), "is no text: its byte 1 is 0"),
    "a list and zeros": ("pack", sparse(b"[{", 20 << 30), "is no text: its byte 3 is 0"),
    "a large recipe": ("recipe", sparse(b"seed: 1\n", 1 << 40), "has 1100 GB; at most 262 kB"),
    "zeros as answers": ("score", sparse(b"[{", 8 << 30), "is no text: its byte 3 is 0"),
    "many answers": ("score", sparse(b"[{", 100 << 30), "has 107 GB; at most 8.6 GB"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_large_sparse_files_take_no_memory(tmp_path, kind):
    verb, make, words = LARGE[kind]
    file = tmp_path / f"given{ENDINGS[verb]}"
    make(file)
    assert words in run_command(READERS[verb](file), tmp_path).assert_one_line()


def test_a_file_that_is_replaced_before_it_is_opened_does_not_hang(tmp_path, monkeypatch):
    regular, pipe = tmp_path / "file", tmp_path / "pipe"
    regular.write_text("text")
    os.mkfifo(pipe)
    status = os.stat(regular)
    monkeypatch.setattr(os, "stat", lambda path: status)
    with pytest.raises(UserError, match="is a named pipe"):
        open_regular(pipe)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed_zeros(length: int) -> bytes:
    """Return what `zlib.compress(bytes(length))` would, in no time: one block again and again."""
    packer = zlib.compressobj(1, wbits=-15)
    block_length = 1_000_000
    block = packer.compress(bytes(block_length)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(length % block_length)) + packer.flush()
    checksum = struct.pack(">HH", length % 65521, 1)  # Adler-32 of zeros
    return b"\x78\x01" + block * (length // block_length) + rest + checksum


def png(size: tuple[int, int], depth: int, colour: int, more: bytes = b"") -> Maker:
    """Make a PNG of zeros with any size, without holding its pixels."""
    bytes_per_pixel = depth // 8 * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    length = size[1] * (1 + size[0] * bytes_per_pixel)

    def make(path: Path) -> None:
        data = packed_zeros(length)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
        palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
        parts = header + palette + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)

    return make


def saved(mode: str, side: int, **options: object) -> Maker:
    return lambda path: Image.new(mode, (side, side)).save(path, **options)


def png_header(width: int, height: int, colour: int = 2) -> Maker:
    return lambda path: path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def with_size(mode: str, side: int, kind: str = "JPEG", **options: object) -> Maker:
    """Make a small image whose header says that it is large."""

    def make(path: Path) -> None:
        stream = io.BytesIO()
        Image.new(mode, (8, 8)).save(stream, format=kind, **options)
        data = bytearray(stream.getvalue())
        start, layout = {"GIF": (6, "<HH"), "WEBP": (26, "<HH"), "JPEG": (0, ">HH")}[kind]
        start = start or max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        assert struct.unpack_from(layout, data, start) == (8, 8)
        struct.pack_into(layout, data, start, side, side)
        path.write_bytes(data)

    return make


def large_tiff(path: Path) -> None:
    """Write the header of a TIFF of 11,000 x 11,000 pixels of 32 bits."""
    tags = [(256, 11_000), (257, 11_000), (258, 32), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 11_000), (279, 4 * 11_000**2), (339, 2)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4))


def text_bomb(kind: bytes) -> bytes:
    """Return a chunk of text (or an ICC profile) that unpacks to 100 MB."""
    return chunk(kind, b"key\0\0" + packed_zeros(100_000_000))


def tag_bomb(path: Path) -> None:
    """Write a TIFF of 4 x 4 pixels with 9,000 tags that are each the whole file."""
    size = 2_000_000
    known = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1), (278, 4)]
    tags = [(tag, 3, 1, value) for tag, value in [*known, (279, 16)]]
    tags += [(40_000 + number, 1, size, 8) for number in range(9_000)]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4)
    path.write_bytes(content + bytes(size))


def tile_bomb(path: Path) -> None:
    """Write a TIFF of 16 x 16 pixels in one tile of 65,520 x 65,520."""
    Image.new("L", (16, 16)).save(path, compression="tiff_adobe_deflate")
    tile = packed_zeros(50_000_000)
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, 65_520), (323, 65_520), (324, 8), (325, len(tile))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(tile)
    head = b"II*\0" + struct.pack("<I", start) + tile
    path.write_bytes(head + struct.pack("<H", len(tags)) + table + bytes(4))


IMAGES: dict[str, tuple[str, Maker, str]] = {
    "sixteen bits, 100 megapixels": ("a.png", png((10_000, 10_000), 16, 0), ""),
    "palette": ("a.png", png((8_000, 8_000), 8, 3), ""),
    "alpha, 170 megapixels": ("a.png", png_header(13_000, 13_000, 6), "too large: 13000 x 13000"),
    "RGB, 170 megapixels": ("a.png", png((13_000, 13_000), 8, 2), ""),
    "32 bits": ("a.tif", large_tiff, "too large: 11000 x 11000 pixels in TIFF"),
    "CMYK": ("a.jpg", with_size("CMYK", 10_500), "too large: 10500 x 10500 pixels in JPEG"),
    "progressive": (
        "a.jpg",
        with_size("RGB", 9_500, progressive=True),
        "too large: 9500 x 9500 pixels in JPEG",
    ),
    "floating point": ("a.tif", saved("F", 64), "floating-point gray"),
    "WebP": ("a.webp", with_size("RGB", 7_500, "WEBP"), "too large: 7500 x 7500"),
    "GIF with a huge screen": ("a.gif", with_size("P", 65_535, "GIF"), "too large"),
    "one side of 100 million": ("a.png", png_header(100_000_000, 1), "cut off|more pixels|large"),
    "two sides of 2 billion": ("a.png", png_header(2**31 - 1, 2**31 - 1), "too large"),
    "no pixels": ("a.png", png_header(0, 5), "broken|not an image"),
    "compressed text": ("a.png", png((8, 8), 8, 2, text_bomb(b"zTXt")), "any"),
    "compressed profile": ("a.png", png((8, 8), 8, 2, text_bomb(b"iCCP")), "any"),
    "tags of a TIFF": ("a.tif", tag_bomb, "any"),
    "tile of a TIFF": ("a.tif", tile_bomb, "too large"),
    "program": ("a.eps", lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not an im"),
    "layers": ("a.psd", lambda path: path.write_bytes(b"8BPS\0\1" + bytes(99)), "not an image"),
    "icon": ("a.ico", saved("RGB", 16), "not an image"),
    "600 MB in a file": ("a.png", sparse(b"\x89PNG\r\n\x1a\n", 600_000_001), "has 600 MB; at most"),
    "a chunk longer than the file": (
        "a.png",
        sparse(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR", 100_000_000),
        "image",
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_hostile_images_are_decoded_in_bounded_memory_or_refused(tmp_path, kind):
    name, make, words = IMAGES[kind]

    def read() -> int:
        try:
            print(open_image(tmp_path / name).mode)
        except UserError as error:
            print(error)
            return 2
        return 0

    with image_size_check_off():
        make(tmp_path / name)
    outcome = run_forked(read, tmp_path)
    outcome.assert_modest()
    assert outcome.stderr == "" and len(outcome.stdout.splitlines()) == 1
    if words != "any":
        assert outcome.code == (2 if words else 0), outcome.words
        assert any(word in outcome.stdout for word in words.split("|")), outcome.words


@contextlib.contextmanager
def image_size_check_off():
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_sixteen_bits_in_strips_equal_the_whole(tmp_path, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 65536, (37, 53), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    whole = np.asarray(open_image(tmp_path / "a.png"))
    monkeypatch.setattr(image_decoding, "_STRIP_PIXELS", 100)
    assert np.array_equal(whole, np.asarray(open_image(tmp_path / "a.png")))
    assert np.array_equal(whole[..., 0], (levels.astype(np.int64) * 255 + 32767) // 65535)


def test_an_animation_counts_one_frame(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")] * 200
    for name in ("a.gif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert open_image(tmp_path / name).getpixel((0, 0))[0] > 200


def record(*images: str) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>" * len(images)}, {"from": "gpt", "value": "yes"}]
    return {"id": images[0], "image": list(images), "conversations": turns}


@pytest.fixture
def data_set(tmp_path) -> Path:
    """A data set whose images are inside, or outside in each way there is."""
    folder, secret = tmp_path / "set", tmp_path / "private"
    (folder / "images").mkdir(parents=True)
    secret.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "images/in.png")
    Image.new("RGB", (8, 8), "blue").save(secret / "secret.png")
    (folder / "images/link.png").symlink_to(secret / "secret.png")
    (folder / "images/far").symlink_to(secret)
    (folder / "images/near.png").symlink_to("in.png")
    (folder / "beside").symlink_to(folder / "images")
    return folder


INSIDE = (
    "in.png",
    "near.png",
    "./in.png",
    "../images/in.png",
    "ABSOLUTE/images/in.png",
    "ABSOLUTE/beside/in.png",
)
OUTSIDE = (
    "../../private/secret.png",
    "ABSOLUTE/../private/secret.png",
    "link.png",
    "far/secret.png",
    "in/../../../private/none.png",
    "/etc/passwd",
    "/proc/self/environ",
)


def write_records(folder: Path, names: tuple[str, ...]) -> Path:
    file = folder / "data.json"
    absolute = [name.replace("ABSOLUTE", str(folder)) for name in names]
    file.write_text(json.dumps([record(name) for name in absolute]))
    return file


@pytest.mark.parametrize("name", INSIDE)
def test_images_inside_are_read_however_they_are_named(data_set, name):
    for images in ("images", "beside"):
        source = ConversationFiles(write_records(data_set, (name,)), data_set / images)
        assert inspect_source(source).bad_samples == []
        assert not source[0].images[0].is_outside


@pytest.mark.parametrize("name", OUTSIDE)
def test_images_outside_are_bad_samples_unless_they_are_allowed(data_set, name):
    file, images = write_records(data_set, ("in.png", name)), data_set / "images"
    for opened_images in (0, 500):
        bad = inspect_source(ConversationFiles(file, images), opened_images).bad_samples
        assert len(bad) == 1 and bad[0].record_number == 2
        assert "lies outside of the images' folder" in str(bad[0])
        assert "data.allow_outside=true" in str(bad[0])
    image = ConversationFiles(file, images)[1].images[0]
    for read in (ImageFile.open, lambda one: one.open_draft(8), content_key):
        with pytest.raises(UserError, match="lies outside"):
            read(image)
    allowed = ConversationFiles(file, images, allow_outside=True)[1].images[0]
    assert allowed.is_outside
    if "secret" in name:
        assert allowed.open().getpixel((0, 0)) == (0, 0, 255)


def test_the_cache_of_the_hub_counts_as_inside_of_its_repository(tmp_path):
    repository = tmp_path / "datasets--owner--name"
    images = repository / "snapshots/abc/images"
    images.mkdir(parents=True)
    (repository / "blobs").mkdir()
    Image.new("RGB", (8, 8)).save(repository / "blobs/123", format="PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (images / "a.png").symlink_to("../../../blobs/123")
    (images / "b.png").symlink_to(tmp_path / "secret.png")
    write_records(images.parent, ("a.png", "b.png"))
    bad = inspect_source(ConversationFiles(images.parent / "data.json", images)).bad_samples
    assert [one.record_number for one in bad] == [2]


def test_a_recipe_and_verbs_take_allow_outside(data_set, tmp_path):
    file = write_records(data_set, ("in.png", "link.png", "../../private/secret.png"))
    words = ["pack", f"data={file}", f"images={data_set / 'images'}"]
    outcome = run_command([*words, "out=some"], tmp_path)
    assert outcome.code == 0 and "1 samples" in outcome.stdout and "2 left out" in outcome.stdout
    assert "lies outside" in outcome.stdout
    assert b"secret" not in (tmp_path / "some/000000.tar").read_bytes()
    outcome = run_command([*words, "out=all", "allow_outside=true"], tmp_path)
    assert outcome.code == 0 and "3 samples" in outcome.stdout
    recipe = load_recipe(["recipe=yivl_llava", "data.allow_outside=true"])
    assert recipe.data.allow_outside and not load_recipe(["recipe=yivl_llava"]).data.allow_outside


@pytest.mark.parametrize("allowed", [False, True])
def test_check_counts_them_and_its_page_never_shows_them(data_set, tmp_path, allowed):
    file = write_records(data_set, ("in.png", "link.png"))
    words = [
        "check",
        "recipe=yivl_llava",
        "stages.align_224.steps=1",
        "only=chat",
        f"out={tmp_path / 'c'}",
    ]
    data = [f"data.train={file}", f"data.images={data_set / 'images'}"]
    more = ["data.allow_outside=true"] if allowed else ["data.on_bad_sample=quarantine"]
    outcome = run_command([*words, *data, *more], tmp_path)
    outcome.assert_modest()
    page = (tmp_path / "c/audit.html").read_text()
    assert page.count("data:image") == 1
    assert ("is not shown: it lies outside" in page) == allowed
    assert ("lies outside of the images" in outcome.stdout) != allowed, outcome.words


MEMBERS = ["link", "hard link outside", "parent", "absolute", "device", "pipe"]


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_of_a_tar_reach_nothing_outside(tmp_path, kind, monkeypatch):
    (tmp_path / "secret.txt").write_text("secret")
    monkeypatch.chdir(tmp_path)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, format="PNG")
    member = tarfile.TarInfo("b.txt")
    member.type, member.linkname = {
        "link": (tarfile.SYMTYPE, str(tmp_path / "secret.txt")),
        "hard link outside": (tarfile.LNKTYPE, "../secret.txt"),
        "device": (tarfile.CHRTYPE, ""),
        "pipe": (tarfile.FIFOTYPE, ""),
    }.get(kind, (tarfile.REGTYPE, ""))
    member.name = {"parent": "../b.txt", "absolute": "/b.txt"}.get(kind, member.name)
    with tarfile.open("a.tar", "w") as tar:
        for name, data in (("a.png", image.getvalue()), ("a.txt", b"yes"), ("b.png", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(member)
    source = WebDatasetShards("a.tar")
    texts = []
    for index in range(len(source)):
        with contextlib.suppress(BadSample):
            texts.append(source[index].turns[-1].text)
    assert texts == ["yes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.tar",
        "a.tar.index",
        "secret.txt",
    ]


@pytest.mark.parametrize(
    "kind", ["endless device", "named pipe", "folder", "socket", "link to itself"]
)
def test_what_is_no_file_is_no_shard_and_no_index(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("vlbench.data.shards.RETRY_SECONDS", 0)
    make, _ = NOT_FILES[kind]
    make(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar"):
        WebDatasetShards(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("a.json")
        data = json.dumps(record("a.png")).encode()
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    make(tmp_path / "b.tar.index")
    assert len(WebDatasetShards(str(tmp_path / "b.tar"))) == 1  # it is scanned instead


def test_members_and_padding_of_a_tar_are_limited(tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        file.addfile(info, io.BytesIO(b"yes"))
    os.truncate(tar, 100 << 30)
    assert "after its last member" in WebDatasetShards(str(tar)).truncated_samples()[0].reason
    for offset, size in ((512, 1 << 40), (-1, 3), (512, -5)):
        with pytest.raises(UserError, match=r"a\.tar: has a member of"):
            read_member(str(tar), offset, size)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:,x"])
def test_a_redirect_leads_to_http_alone(target, monkeypatch):
    def respond(self, request):
        from email.message import Message
        from urllib.response import addinfourl

        headers = Message()
        headers["Location"] = target
        response = addinfourl(io.BytesIO(b""), headers, request.full_url, 302)
        response.msg = "Found"
        return response

    monkeypatch.setattr("urllib.request.HTTPHandler.http_open", respond)
    with pytest.raises(UserError, match=r"image http://x\.invalid/a\.png: cannot be downloaded"):
        image_download.download_image("http://x.invalid/a.png")


def test_sizes_of_pixels_are_limited(tmp_path):
    from vlbench.model.vision_config import check_image_grid
    from vlbench.model.weights.release_files import parse_preprocess_config

    mean = (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="size=56000 pixels; at most 8192"):
        ImageTransform(56_000, 56_000, mean, mean)
    with pytest.raises(UserError, match="crop_size is 56000 pixels; at most 8192"):
        parse_preprocess_config({"size": 224, "crop_size": 56_000}, tmp_path / "p.json", True)
    with pytest.raises(UserError, match="image_size is 56000 pixels; at most 4096"):
        check_image_grid(56_000, 14, tmp_path / "config.json")
    with pytest.raises(UserError, match="more than 65,536 patches"):
        check_image_grid((4096, 4096), 2, tmp_path / "config.json")
    check_image_grid(1024, 14, tmp_path / "config.json")
