"""Data sets of the hub: the files of a subset and a split are fetched, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.client import go_offline, visit_hub
from hub.repository import HubRepository
from hub.server import FakeHub, serve_hub
from test_parquet_records import row, write_rows

from vlbench.__main__ import main
from vlbench.data.conversation_files import ConversationFiles
from vlbench.errors import UserError

PLAIN, SUBSETS = "someone/pets", "HuggingFaceM4/the_cauldron"


def write_plain(folder: Path) -> None:
    """Write a data set of two splits in `data`."""
    (folder / "README.md").write_text("# Pets\n")
    for number in range(2):
        rows = [row(number * 3 + n) for n in range(1, 4)]
        write_rows(folder / f"data/train-{number:05d}-of-00002.parquet", rows)
    write_rows(folder / "data/validation-00000-of-00001.parquet", [row(100)])


def write_subsets(folder: Path) -> None:
    """Write a data set of three subsets, as The Cauldron has fifty; one as LLaVA-OneVision's."""
    for number, name in enumerate(("ai2d", "vqav2", "chart2text(cauldron,llava_format)")):
        write_rows(folder / name / "train-00000-of-00001.parquet", [row(10 * number + 1)])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    makers = {PLAIN: write_plain, SUBSETS: write_subsets}
    repositories = [HubRepository(n, folder / n, make, "datasets") for n, make in makers.items()]
    with serve_hub(repositories) as hub:
        yield hub


@pytest.fixture
def hub(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return visit_hub(monkeypatch, served, tmp_path)


def ids(location: str) -> list[str]:
    source = ConversationFiles(location)
    return [source[number].id for number in range(len(source))]


def test_the_train_split_is_fetched_and_read_and_is_there_offline(hub, monkeypatch):
    assert ids(PLAIN) == ["1", "2", "3", "4", "5", "6"]
    assert hub.fetched() == {PLAIN: {f"data/train-0000{n}-of-00002.parquet" for n in range(2)}}
    assert ids(f"{PLAIN}:validation") == ["100"]
    hub.forget()
    go_offline(monkeypatch)
    assert ids(PLAIN) == ["1", "2", "3", "4", "5", "6"] and not hub.fetched()


def test_a_subset_is_named_behind_the_data_set(hub):
    assert ids(f"{SUBSETS}/vqav2") == ["11"]
    assert hub.fetched() == {SUBSETS: {"vqav2/train-00000-of-00001.parquet"}}
    assert ids(f"{SUBSETS}/chart2text(cauldron,llava_format):train") == ["21"]


MISTAKES = {
    SUBSETS: r"has 3 subsets; name one, as HuggingFaceM4/the_cauldron/ai2d: ai2d, chart2text",
    f"{SUBSETS}/vqa2": r"no Parquet files in vqa2; it has .*, vqav2\. Did you mean 'vqav2'\?",
    f"{PLAIN}:test": r"no split 'test'; it has train, validation, of which someone/pets:SPLIT",
    "someone/dogs": r"there is no such file or folder, and no such data set on the hub",
}


@pytest.mark.parametrize("location", MISTAKES)
def test_mistakes_are_one_line(hub, location):
    with pytest.raises(UserError, match=MISTAKES[location]) as caught:
        ConversationFiles(location)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"data {location}: ")
    assert not hub.fetched()


def test_a_path_that_is_not_there_asks_no_hub(hub):
    for location in ("folder/data.json", "data.parquet", "./a/b"):
        with pytest.raises(UserError, match="no such file"):
            ConversationFiles(location)
    assert not hub.log


def test_pack_takes_a_data_set_of_the_hub(hub, capsys):
    assert main(["pack", f"data={PLAIN}", "out=shards"]) == 0
    assert "6 samples in 1 shards" in capsys.readouterr().out
