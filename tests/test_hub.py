"""Downloads from a hub of our own: whole, cut, two at once, offline, refused, onto a full disk."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.client import go_offline, use_hub, visit_hub
from hub.model_repositories import make_repositories
from hub.server import FakeHub, serve_hub

from vlbench.errors import UserError
from vlbench.hub_download import LANGUAGE_CONTENTS, fetch_hub_folder
from vlbench.text_files import refuse_lfs_pointer

YI = "01-ai/Yi-6B-Chat"
SHARD = "model-00002-of-00003.safetensors"
ROOT = Path(__file__).parent.parent
CODE = (
    "import sys\n"
    "from vlbench.errors import UserError\n"
    "from vlbench.hub_download import LANGUAGE_CONTENTS, fetch_hub_folder\n"
    "try:\n"
    f"    print(fetch_hub_folder('{YI}', 'language.weights', LANGUAGE_CONTENTS))\n"
    "except UserError as mistake:\n"
    "    sys.exit(str(mistake))\n"
)
"""A process that downloads and says where, or in one line why not."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The hub with all repositories, of which those are made that a test asks for."""
    with serve_hub(make_repositories(tmp_path_factory.mktemp("hub"))) as hub:
        yield hub


@pytest.fixture
def hub(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub with nothing wrong, and a client that has fetched nothing yet."""
    yield visit_hub(monkeypatch, served, tmp_path)
    served[YI].gated, served.page = False, 1000
    served.tokens.clear()
    served.forget()


def language() -> Path:
    """Fetch a language model."""
    return fetch_hub_folder(YI, "language.weights", LANGUAGE_CONTENTS)


def assert_whole(folder: Path, hub: FakeHub, name: str = YI) -> None:
    """Assert that every file of a snapshot is the repository's."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert (folder / "config.json") in files
    for path in files:
        assert path.read_bytes() == hub[name].files[str(path.relative_to(folder))].path.read_bytes()


def torn(home: Path) -> list[Path]:
    """Return what a download has left behind that is not whole."""
    return [path for path in home.rglob("*") if "incomplete" in path.name or not path.exists()]


def process(hub: FakeHub, **more: Any) -> subprocess.Popen[str]:
    """Start a process that downloads."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", CODE]
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
    )


def test_what_is_asked_for_is_fetched_and_nothing_else(hub):
    folder = language()
    assert_whole(folder, hub)
    fetched = hub.fetched()
    assert set(fetched) == {YI} and not fetched[YI] & {"README.md", "LICENSE", ".gitattributes"}
    assert {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)} < fetched[YI]
    assert folder.name == hub[YI].commit
    hub.forget()
    assert language() == folder and not hub.fetched()


def test_weights_that_are_there_in_two_formats_are_fetched_once(hub):
    folder = fetch_hub_folder("google-bert/bert-base-uncased", "connector.text", "a BERT")
    assert (folder / "model.safetensors").is_file()
    assert hub.fetched()["google-bert/bert-base-uncased"] == {
        *("config.json", "model.safetensors", "tokenizer_config.json")
    }


def test_torchs_files_are_fetched_where_there_are_no_others(hub):
    name = "liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5"
    assert (fetch_hub_folder(name, "init", "a release") / "mm_projector.bin").is_file()


def test_the_pages_of_a_long_list_are_all_read(hub):
    hub.page = 4
    assert_whole(language(), hub)
    assert sum("/tree/" in one.path for one in hub.log) > 2


def test_a_cut_download_goes_on_where_it_was_cut(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 10)
    hub.cut(f"GET .*{SHARD}", after=20_000, times=2)
    assert_whole(language(), hub)
    went_on = [one.range for one in hub.log if one.range]
    assert len(went_on) == 2 and all(int(range[6:-1]) > 15_000 for range in went_on)


def test_a_connection_that_is_always_cut_is_one_line_and_the_next_time_goes_on(hub, tmp_path):
    hub.cut(f"GET .*{SHARD}", after=50_000, times=99)
    with pytest.raises(UserError, match=f"language.weights is '{YI}'.*connection broke.*try again"):
        language()
    assert not torn(tmp_path / "home")
    kept = hub.fetched()[YI] - {SHARD}
    hub.forget()
    assert_whole(language(), hub)
    assert not hub.fetched()[YI] & kept


def test_offline_afterwards(hub, tmp_path, monkeypatch):
    folder = language()
    hub.forget()
    go_offline(monkeypatch)
    assert language() == folder and not hub.log
    with pytest.raises(UserError, match="01-ai/Yi-34B-Chat'.*HF_HUB_OFFLINE=1 allows no downloads"):
        fetch_hub_folder("01-ai/Yi-34B-Chat", "language.weights", LANGUAGE_CONTENTS)


def test_a_hub_that_is_gone_gives_what_was_downloaded(tmp_path, monkeypatch):
    with serve_hub(make_repositories(tmp_path / "made")) as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        folder = language()
    assert language() == folder
    with pytest.raises(UserError, match="Yi-34B-Chat'.*connection broke or cannot be made"):
        fetch_hub_folder("01-ai/Yi-34B-Chat", "language.weights", LANGUAGE_CONTENTS)


def test_half_a_download_is_not_taken_for_a_whole_one_offline(hub, monkeypatch):
    hub.fail(f"HEAD /{YI}/resolve/{hub[YI].commit}/{SHARD}", 403, times=99)
    with pytest.raises(UserError, match="status 403"):
        language()
    go_offline(monkeypatch)
    with pytest.raises(UserError, match="not all of it was downloaded before"):
        language()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "status 401.*hf auth login"),
        (403, "status 403.*hf auth login"),
        (429, "status 429, too many requests: try again in 7 seconds"),
        (500, "status 500, the hub itself has a fault: try again later"),
        (503, "status 503, the hub itself has a fault: try again later"),
    ],
)
@pytest.mark.parametrize("part", ["GET /api/models/", SHARD])
def test_a_refusal_is_one_line_that_says_what_to_do(status, said, part, hub, tmp_path):
    hub.fail(part, status, times=99, Retry_After="7")
    with pytest.raises(UserError, match=f"^language.weights is '{YI}': .*{said}") as found:
        language()
    assert "\n" not in str(found.value) and not torn(tmp_path / "home")


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_recovers_is_asked_again(status, hub):
    hub.fail(SHARD, status, times=2, Retry_After="1")
    assert_whole(language(), hub)


def test_a_name_that_does_not_exist(hub):
    with pytest.raises(UserError, match="01-ai/Yi-6B-Chatt'.*no such repository.*check its name"):
        fetch_hub_folder("01-ai/Yi-6B-Chatt", "language.weights", LANGUAGE_CONTENTS)


def test_a_gated_repository_opens_for_a_token(hub, monkeypatch):
    hub[YI].gated = True
    with pytest.raises(UserError, match=f"accept its conditions at {hub.endpoint}/{YI}; then `hf"):
        language()
    hub.tokens.add("hf_known")
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    hub.forget()
    assert_whole(language(), hub)
    on_cdn = [one for one in hub.log if one.path.startswith("/cdn")]
    assert on_cdn and not any(one.token for one in on_cdn)  # tokens stay with the hub


class Full:
    """A file on a disk that has no room left after so many bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_is_one_line_and_leaves_nothing_torn(hub, tmp_path, monkeypatch):
    import huggingface_hub.file_download as client

    real = client.http_get
    with monkeypatch.context() as patch:
        full = lambda url, file, **more: real(url, Full(file, 100_000), **more)  # noqa: E731
        patch.setattr(client, "http_get", full)
        with pytest.raises(
            UserError, match=f"language.weights is '{YI}'.*the disk is full"
        ) as found:
            language()
    assert "\n" not in str(found.value) and not torn(tmp_path / "home")
    assert_whole(language(), hub)


def test_a_limit_of_the_system_is_one_line(hub, tmp_path):
    limit = 120_000  # bytes a file may have; shards are larger
    started = process(
        hub, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, error = started.communicate(timeout=60)
    told = error.strip().splitlines()
    assert started.returncode == 1 and "a file may not become so large here" in told[-1]
    assert "Traceback" not in error and not torn(tmp_path / "home")
    assert_whole(language(), hub)


def test_two_processes_download_at_once(hub):
    hub.slow(f"GET /cdn/models/{YI}", wait=0.2, times=99)
    started = [process(hub) for _ in range(2)]
    said = [one.communicate(timeout=120) for one in started]
    assert [one.returncode for one in started] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert_whole(Path(said[0][0].strip()), hub)


def test_a_killed_download_is_begun_again(hub, tmp_path):
    hub.slow(f"GET .*{SHARD}", wait=5, times=1)
    started = process(hub)
    deadline = time.monotonic() + 60
    while not any(SHARD in one.path and one.method == "GET" for one in list(hub.log)):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    hub.forget()
    assert_whole(language(), hub)
    assert SHARD in hub.fetched()[YI]


def test_a_clone_without_lfs_has_pointers_and_they_are_refused(hub, tmp_path):
    folder = hub[YI].clone(tmp_path / "clone")
    assert (folder / "config.json").read_bytes() == hub[YI].files["config.json"].path.read_bytes()
    with pytest.raises(UserError, match="git lfs"):
        refuse_lfs_pointer(folder / SHARD)


def test_the_server_speaks_as_the_hub_does(hub):
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    api, files = HfApi(endpoint=hub.endpoint), hub[YI].files
    info = api.model_info(YI)
    assert info.sha == hub[YI].commit and {one.rfilename for one in info.siblings} == set(files)
    known = {one.path: one for one in api.list_repo_tree(YI, recursive=True)}
    assert known[SHARD].lfs.sha256 == files[SHARD].sha256 and known["config.json"].lfs is None
    vit = [one.path for one in api.list_repo_tree("01-ai/Yi-VL-6B", "vit")]
    assert vit == ["vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(YI, "none.json")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(YI, revision="0" * 40)
    system = HfFileSystem(endpoint=hub.endpoint)
    content = files[SHARD].path.read_bytes()
    assert system.cat_file(f"{YI}/{SHARD}", start=100, end=300) == content[100:300]
