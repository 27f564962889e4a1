"""Shards: packed and read back the same, every sample once per pass, faults named and skipped."""

from __future__ import annotations

import errno
import io
import json
import shutil
import socket
import tarfile
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vlbench.__main__ import main
from vlbench.data import shards as shards_module
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.data_checksums import checksum_sources
from vlbench.data.image_processing import ImageTransform
from vlbench.data.scene_world import make_scene
from vlbench.data.shard_index import index_path, load_shard_index
from vlbench.data.shard_sampler import MAX_LANES, ShardShuffle
from vlbench.data.shards import WebDatasetShards
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import BadSample, UserError

TRANSFORM = ImageTransform(56, 56, (0.5,) * 3, (0.25,) * 3)
SAMPLES = 60


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shards_module, "RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A LLaVA file: samples with several images, with none, and two that are bad."""
    folder = tmp_path_factory.mktemp("data")
    records: list[dict[str, Any]] = []
    for number in range(SAMPLES):
        count = number % 3
        names = [f"{number}_{one}.png" for one in range(count)]
        for one, name in enumerate(names):
            make_scene("shards", one, number).open().save(folder / name)
        tags = "".join("<image>\n" for _ in names)
        turns = [
            {"from": "human", "value": f"{tags}What is {number}? 是什么？"},
            {"from": "gpt", "value": f"It is {number}."},
        ]
        records.append({"id": f"sample-{number}", "image": names, "conversations": turns})
    records[10]["image"] = ["nowhere.png"]
    (folder / "11_0.png").write_bytes(b"no picture")
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    words = [f"data={data / 'data.json'}", f"out={folder}", "samples=8"]
    assert main(["pack", *words]) == 0
    return folder


def test_what_is_packed_is_read_back_the_same(data, packed):
    source, shards = ConversationFiles(data / "data.json"), WebDatasetShards(packed)
    assert len(shards) == SAMPLES - 2
    good = [source[n] for n in range(SAMPLES) if n not in (10, 11)]
    for number, expected in enumerate(good):
        found = shards[number]
        assert (found.id, found.turns, found.language) == (
            expected.id,
            expected.turns,
            expected.language,
        )
        for ours, theirs in zip(found.images, expected.images, strict=True):
            assert torch.equal(TRANSFORM.load_pixels(ours), TRANSFORM.load_pixels(theirs))


def test_what_cannot_be_packed_is_counted_and_named(data, packed, tmp_path, capsys):
    lines = (packed / "left_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["sample-10", "sample-11"]
    assert main(["pack", f"data={data / 'data.json'}", f"out={tmp_path / 'new'}"]) == 0
    said = capsys.readouterr().out
    assert "58 samples in 1 shards" in said and "2 left out" in said and "nowhere.png" in said


def test_packing_twice_gives_the_same_bytes(data, packed, tmp_path):
    words = [f"data={data / 'data.json'}", f"out={tmp_path / 'again'}", "samples=8"]
    assert main(["pack", *words]) == 0
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("counts", [[1], [3, 1], [5] * 7, [7, 1, 9, 4, 4, 4, 2, 8, 3], [2] * 300])
@pytest.mark.parametrize("window", [1, 4])
def test_an_order_of_shards_is_a_permutation(counts, window):
    orders = [ShardShuffle(counts, key, window) for key in ("a", "b")]
    whole = [list(map(order, range(order.total_samples))) for order in orders]
    assert sorted(whole[0]) == sorted(whole[1]) == list(range(sum(counts)))
    assert len(counts) < 4 or whole[0] != whole[1]
    with pytest.raises(IndexError):
        orders[0](sum(counts))


def test_shards_are_divided_among_ranks_and_read_in_turn():
    counts = [50] * 512
    order = ShardShuffle(counts, "x")
    assert order.lane_count == MAX_LANES
    for world in (2, 8, 128):
        of = [
            {order(p) // 50 for p in range(rank, order.total_samples, world)}
            for rank in range(world)
        ]
        assert sum(map(len, of)) == len(counts)  # no shard belongs to two ranks
    lane = [order(p) // 50 for p in range(0, order.total_samples, MAX_LANES)]
    assert len(set(lane[:200])) == 4 and len(set(lane)) == 4  # a window of four is read together


def test_lanes_that_have_samples_left_alternate_to_the_end():
    counts = [100] * 66 + [53]  # 64 lanes, one of them short and three with a shard more
    order = ShardShuffle(counts, "x")
    assert order.lane_count == 64
    shards = [order(position) // 100 for position in range(order.total_samples)]
    for first, end, lanes in ((0, 53 * 64, 64), (6_300, len(shards), 3)):
        for start in range(first, end - lanes + 1, lanes):
            assert len(set(shards[start : start + lanes])) == lanes


class Stream(Dataset[str]):
    """The ids at the positions of one rank."""

    def __init__(self, shards: WebDatasetShards, positions: range) -> None:
        self.mixture, self.positions = SourceMixture([(shards, 1.0)], seed=3), positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> str:
        return self.mixture[self.positions[index]].id


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_two_epochs_give_each_sample_twice_to_any_number_of_ranks(packed, workers):
    shards = WebDatasetShards(packed)
    total = 2 * len(shards)
    streams = {}
    for world in (1, 2, 4):
        met: Counter[str] = Counter()
        for rank in range(world):
            stream = Stream(shards, range(rank, total, world))
            met.update(DataLoader(stream, batch_size=None, num_workers=workers))
        streams[world] = met
        assert set(met.values()) == {2} and len(met) == len(shards)
        first = Counter(Stream(shards, range(len(shards)))[n] for n in range(len(shards)))
        assert set(first.values()) == {1}


def test_a_position_is_found_without_what_came_before(packed):
    whole = [SourceMixture([(WebDatasetShards(packed), 1.0)], 5)[n].id for n in range(80)]
    assert SourceMixture([(WebDatasetShards(packed), 1.0)], 5)[79].id == whole[79]
    assert [SourceMixture([(WebDatasetShards(packed), 1.0)], 6)[n].id for n in range(80)] != whole


def broken(packed: Path, folder: Path) -> Path:
    """Return a copy of the shards, to be damaged."""
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def bad(shards: WebDatasetShards) -> list[BadSample]:
    found = []
    for number in range(len(shards)):
        try:
            for image in shards[number].images:
                image.open()
        except BadSample as fault:
            found.append(fault)
        except UserError as mistake:
            found.append(BadSample(str(number), str(mistake)))
    return found


def test_a_missing_shard_costs_its_samples_alone(packed, tmp_path):
    folder = broken(packed, tmp_path / "one")
    (folder / "000001.tar").unlink()
    found = bad(WebDatasetShards(folder))
    assert len(found) == 8 and all("000001.tar: cannot be opened" in f.reason for f in found)


def test_a_truncated_shard_loses_the_samples_behind_its_end(packed, tmp_path):
    folder = broken(packed, tmp_path / "truncated")
    tar = folder / "000002.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    found = bad(WebDatasetShards(folder))
    assert 1 <= len(found) <= 8 and all("000002.tar: is truncated" in f.reason for f in found)
    Path(index_path(str(tar))).unlink()  # without an index the tear is met while it is made
    shards_module._cached_index.cache_clear()
    assert all("000002.tar" in fault.reason for fault in bad(WebDatasetShards(folder)))


def test_a_shard_that_is_no_tar_file_is_not_tried_again_for_each_sample(
    packed, tmp_path, monkeypatch
):
    folder, waited = broken(packed, tmp_path / "noise"), []
    (folder / "000001.tar").write_bytes(b"noise" * 4000)
    monkeypatch.setattr(shards_module.time, "sleep", waited.append)
    assert len(bad(WebDatasetShards(folder))) == 8 and len(waited) == shards_module.READ_TRIES - 1


def test_a_disk_that_fails_for_a_while_loses_no_shard(packed, tmp_path, monkeypatch):
    folder = broken(packed, tmp_path / "slow")
    Path(index_path(str(folder / "000001.tar"))).unlink()
    source, failures = WebDatasetShards(folder), [OSError(5, "Input/output error")] * 4
    open_tar = tarfile.open

    def fail_at_first(*args, **kwargs):
        if failures:
            raise failures.pop()
        return open_tar(*args, **kwargs)

    monkeypatch.setattr("vlbench.data.shard_index.tarfile.open", fail_at_first)
    shards_module._cached_index.cache_clear()
    first = source.sample_counts[0]
    with pytest.raises(BadSample, match="Input/output error"):
        source[first]
    assert source[first].images  # the next sample of the shard tries anew


def test_a_shard_that_cannot_be_opened_for_a_while_is_not_lost(packed, tmp_path, monkeypatch):
    source = WebDatasetShards(broken(packed, tmp_path / "busy"))
    failures, open_file = [OSError(5, "Input/output error")] * 3, shards_module.open_regular

    def fail_at_first(path, *limits):
        if failures:
            raise failures.pop()
        return open_file(path, *limits)

    monkeypatch.setattr(shards_module, "open_regular", fail_at_first)
    with pytest.raises(BadSample, match="cannot be opened in 3 tries"):
        source[0]
    assert source[0].id == "sample-0" and not bad(source)  # the next one tries anew


def test_a_server_that_fails_for_a_while_loses_no_shard(monkeypatch):
    failures: list[Exception] = [TimeoutError()] * 3

    def fail_at_first(url, *_):
        if failures:
            raise UserError(f"{url}: cannot be read") from failures.pop()
        if "gone" in url:
            raise UserError(f"{url}: does not exist") from FileNotFoundError()
        return b"x"

    monkeypatch.setattr(shards_module, "read_byte_range", fail_at_first)
    with pytest.raises(UserError, match="cannot be read"):
        shards_module._open_failure("memory://busy.tar")
    assert shards_module._open_failure("memory://busy.tar") == ""
    assert "does not exist" in shards_module._open_failure("memory://gone.tar")


def test_a_shard_that_comes_late_is_read(packed, tmp_path, monkeypatch):
    folder = broken(packed, tmp_path / "late")
    hidden = (folder / "000000.tar").rename(folder / "hidden")
    shards_module._open_failure.cache_clear()
    monkeypatch.setattr(
        shards_module.time,
        "sleep",
        lambda _: hidden.is_file() and hidden.rename(folder / "000000.tar"),
    )
    assert not bad(WebDatasetShards(folder))


def test_tar_files_of_others_are_read_with_their_captions(tmp_path):
    file = tmp_path / "laion.tar"
    with tarfile.open(file, "w") as tar:
        for number in range(3):
            image = io.BytesIO()
            make_scene("laion", 0, number).open().save(image, "PNG")
            for kind, content in (("png", image.getvalue()), ("txt", f"thing {number}\n".encode())):
                info = tarfile.TarInfo(f"part/{number:05d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shards = WebDatasetShards(file)
    assert [shards[n].caption_text for n in range(3)] == ["thing 0", "thing 1", "thing 2"]
    assert shards[1].images[0].open().size == make_scene("laion", 0, 1).open().size
    assert Path(index_path(str(file))).is_file() and len(load_shard_index(str(file))) == 3


def test_shards_train(packed, tmp_path):
    words = [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
    words += [f"stages.{name}.global_batch_size=4" for name in ("align_224", "align_448", "chat")]
    words += ["log.questions=2", "log.examples=0", "log.tensorboard=false", f"data.train={packed}"]
    assert main(["fit", "recipe=yivl_llava", *words, f"run={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "holds no shards.json"), ("{0..3}.tar", "there is no")],
)
def test_mistakes_are_a_line(name, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [f"data.train={tmp_path / name}", "only=chat", f"run={tmp_path / 'run'}"]
    assert main(["fit", "recipe=yivl_llava", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_folder_that_is_there_is_not_overwritten(packed, data, capsys):
    for there in (packed, data / "data.json"):
        assert main(["pack", f"data={data / 'data.json'}", f"out={there}"]) == 2
        assert "name a new folder" in capsys.readouterr().err


def test_a_disk_that_is_full_is_one_line_and_nothing_is_left(data, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlbench.data.write_shards._write_tar", full)
    assert main(["pack", f"data={data / 'data.json'}", f"out={tmp_path / 'shards'}"]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Pieces(SimpleHTTPRequestHandler):
    """Serve byte ranges, as every large server does."""

    def do_GET(self) -> None:
        """Answer a request for a range of bytes."""
        file = Path(self.directory) / self.path.partition("?")[0].lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        content, asked = file.read_bytes(), self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        some = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(some)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(some)
        return None

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def served(packed, tmp_path):
    """The URL of a copy of the packed shards, and the copy."""
    copy = tmp_path / "served"
    shutil.copytree(packed, copy)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Pieces, directory=str(copy)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", copy
    server.shutdown()


def test_a_server_that_knows_no_ranges_is_named(packed):
    whole = partial(SimpleHTTPRequestHandler, directory=str(packed))
    server = ThreadingHTTPServer(("127.0.0.1", 0), whole)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="ignores byte ranges and sends the whole file"):
            _ = WebDatasetShards(f"http://127.0.0.1:{server.server_port}")[0]
    finally:
        server.shutdown()


def test_a_server_that_cannot_be_reached_is_named():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(UserError, match="cannot be read"):
        WebDatasetShards(url)


class Pixels(Dataset):
    """Number and pixels of the samples of shards."""

    def __init__(self, where: str | Path) -> None:
        self.shards = WebDatasetShards(where)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> tuple[str, list[torch.Tensor]]:
        sample = self.shards[index]
        return sample.id, [TRANSFORM.load_pixels(image) for image in sample.images]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_by_url_are_those_of_the_folder(served, packed, workers):
    url, _ = served
    first = Pixels(url)[0]  # before there are workers: what is connected does not survive a fork
    remote = list(DataLoader(Pixels(url), batch_size=None, num_workers=workers))
    local = list(Pixels(packed)[number] for number in range(len(Pixels(packed))))
    assert [name for name, _ in remote] == [name for name, _ in local]
    assert first[0] == local[0][0]
    for (_, ours), (_, theirs) in zip(remote, local, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_packed_shards_may_be_copied(packed, tmp_path, monkeypatch):
    folder = broken(packed, tmp_path / "copy")  # with another time of modification
    monkeypatch.setattr("vlbench.data.shard_index.scan_tar", lambda _: pytest.fail("is read again"))
    assert not bad(WebDatasetShards(folder))


def test_a_packed_shard_that_was_made_again_is_not_believed(packed, tmp_path):
    folder = broken(packed, tmp_path / "again")
    other = (folder / "000001.tar").read_bytes() + b"\0" * 10240
    (folder / "000000.tar").write_bytes(other)  # its size is another one: indexed anew
    assert WebDatasetShards(folder)[0].id == WebDatasetShards(packed)[8].id


def test_shards_by_url_that_are_not_those_of_their_index_are_named(served):
    url, copy = served
    one, other = (copy / f"00000{number}.tar" for number in (0, 1))
    content = one.read_bytes()
    one.write_bytes(content + b"\0" * 10240)
    with pytest.raises(BadSample, match="000000.tar: has .* bytes and its index is of one with"):
        WebDatasetShards(url)[0]
    one.write_bytes(other.read_bytes()[: len(content)])
    with pytest.raises(BadSample, match="000000.tar: is another file than"):
        WebDatasetShards(url)[0]


@pytest.mark.parametrize("query", ["?sig=a%2Fsecret&se=1", "?sig=a/secret.tar"])
@pytest.mark.parametrize("place", ["", "/{000000..000001}.tar"])
def test_signed_urls_are_read_and_their_signature_is_not_told(place, query, served, packed):
    url, copy = served
    shards, plain = WebDatasetShards(f"{url}{place}{query}"), WebDatasetShards(packed)
    assert len(shards) == (16 if place else len(plain))
    assert all(shards[index].turns == plain[index].turns for index in range(len(shards)))
    same = WebDatasetShards(f"{url}{place}")
    assert checksum_sources([shards]) == checksum_sources([same])  # another day, another signature
    image = shards[1].images[0]
    tar = sorted(copy.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:600])
    for action in (image.open, lambda: WebDatasetShards(f"{url}/gone/{place}{query}")):
        with pytest.raises(UserError) as caught:
            action()
        assert url in str(caught.value) and "secret" not in str(caught.value)
    Path(f"{tar}.index").unlink()
    with pytest.raises(UserError, match=r"000000\.tar\.index") as caught:
        _ = WebDatasetShards(f"{url}/000000.tar{query}")[0]
    assert "secret" not in str(caught.value)


def test_an_index_by_url_of_an_older_version_is_read(served):
    url, copy = served
    for index in copy.glob("*.index"):
        lines = [json.loads(line) for line in index.read_text().split("\n")[1:-1]]
        old = [[key, {kind: at[:2] for kind, at in members.items()}] for key, members in lines]
        index.write_text("".join(json.dumps(one) + "\n" for one in old))
    assert not bad(WebDatasetShards(url))


def test_trouble_of_shards_by_url_is_named(served):
    url, copy = served
    names = sorted(copy.glob("*.tar"))
    names[0].unlink()
    with pytest.raises(BadSample, match=f"{names[0].name}.*does not exist"):
        WebDatasetShards(url)[0]
    Path(index_path(str(names[1]))).unlink()
    with pytest.raises(UserError, match=f"{names[1].name}.index, which shards by URL need"):
        WebDatasetShards(f"{url}/{names[1].name}")
    with pytest.raises(UserError, match="holds no shards.json"):
        WebDatasetShards(f"{url}/nowhere")
    with pytest.raises(UserError, match="Protocol not known: nonsense"):
        WebDatasetShards("nonsense://somewhere")


def test_metadata_that_names_an_image_by_its_path_is_not_packed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_scene("shards", 0, 0).open().save("cat.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    metadata = {"file_name": "cat.png", "meta": {"file": "all/cat.png"}, "split": "train"}
    address = {"coco_url": "http://images.example/cat.png"}
    record = {"id": "a", "image": "cat.png", "conversations": turns, **metadata, **address}
    Path("data.json").write_text(json.dumps([record]), encoding="utf-8")
    assert main(["pack", "data=data.json", "out=shards"]) == 0
    said = capsys.readouterr().out
    assert "they name images by the paths that they had: file_name, meta" in said
    [sample] = list(map(WebDatasetShards("shards").__getitem__, [0]))
    assert sample.turns[-1].text == "A cat."
    assert sample.unread_keys == ("split", "coco_url")


def test_keys_of_turns_that_are_not_packed_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_scene("shards", 0, 0).open().save("cat.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat?", "why": "asked"},
        {"from": "gpt", "value": "A cat.", "score": 3},
    ]
    record = {"id": "a", "image": "cat.png", "conversations": turns, "why": "a record's own"}
    Path("data.json").write_text(json.dumps([record]), encoding="utf-8")
    assert main(["pack", "data=data.json", "out=shards"]) == 0
    said = capsys.readouterr().out
    assert "as turns have their role and text alone: turn score, turn why" in said
    assert WebDatasetShards("shards")[0].unread_keys == ("why",)
