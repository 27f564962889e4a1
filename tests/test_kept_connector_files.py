"""What belongs to the source of one's own connector is kept whole, and works in every process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlbench.config.recipe import load_recipe
from vlbench.connector import kept_source, registry
from vlbench.connector.base import Connector, Shapes
from vlbench.connector.source_files import MAX_KEPT_FILES
from vlbench.errors import UserError

SHAPES = Shapes(16, (4, 4), 32, 40, 2)
CONNECTOR = """
from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    def __init__(self, shapes):
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width)

    def forward(self, features):
        return {scale} * self.proj(features)
"""


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def mine(first_lines: str, scale: str = "SCALE") -> str:
    return first_lines + CONNECTOR.format(scale=scale)


# of each: the files beside each other, and those that a run keeps
SOURCES: dict[str, tuple[dict[str, str], set[str]]] = {
    "a module of a folder": (
        {"mine.py": mine("from .parts.scales import SCALE\n"), "parts/scales.py": "SCALE = 2\n"},
        {"mine.py", "parts/scales.py"},
    ),
    "a package with a start": (
        {
            "mine.py": mine("from .parts import SCALE\n"),
            "parts/__init__.py": "from .scales import SCALE\n",
            "parts/scales.py": "from ..one import ONE\nSCALE = 2 * ONE\n",
            "one.py": "ONE = 1\n",
            "unused.py": "",
        },
        {"mine.py", "parts/__init__.py", "parts/scales.py", "one.py"},
    ),
    "a circle": (
        {
            "mine.py": mine("from . import first\nSCALE = first.twice()\n"),
            "first.py": "from . import second\ndef twice():\n    return 2 * second.ONE\n",
            "second.py": "from . import first\nONE = 1\n",
        },
        {"mine.py", "first.py", "second.py"},
    ),
    "another connector's module": (
        {
            "mine.py": mine(
                "from vlbench.connector import registry\n"
                "SCALE = registry.connector_module('other').SCALE\n"
            ),
            "other.py": mine("from .scales import SCALE\n").replace("Mine", "Other"),
            "scales.py": "SCALE = 2\n",
        },
        {"mine.py", "other.py", "scales.py"},
    ),
    "another connector's class": (
        {
            "mine.py": "from vlbench.connector.registry import load_connector\n"
            "class Mine(load_connector('other')):\n    pass\n",
            "other.py": mine("", "2").replace("Mine", "Other"),
        },
        {"mine.py", "other.py"},
    ),
    "a shipped connector's module": (
        {"mine.py": mine("from .flamingo import GatedBlock\nSCALE = 2\n")},
        {"mine.py"},
    ),
    "the contract by its place": (
        {"mine.py": mine("from ..base import Shapes\nSCALE = 2\n")},
        {"mine.py"},
    ),
    "data beside it": (
        {
            "mine.py": mine(
                "from pathlib import Path\n"
                "SCALE = int(Path(__file__).with_name('scale.txt').read_text())\n"
            ),
            "scale.txt": "2\r\n",
            "other.txt": "3",
        },
        {"mine.py", "scale.txt"},
    ),
    "a folder of data": (
        {
            "mine.py": mine(
                "from pathlib import Path\n"
                "SCALE = int((Path(__file__).parent / 'tables' / 'scale.txt').read_text())\n"
            ),
            "tables/scale.txt": "2",
            "tables/more/names.txt": "x",
            "tables/.hidden": "x",
        },
        {"mine.py", "tables/scale.txt", "tables/more/names.txt"},
    ),
}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Callable[[dict[str, str]], Path]:
    """Return a function that writes connectors, keeps one, and goes where they are not."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def keep(files: dict[str, str], **connector: str) -> Path:
        for name in ("here", "elsewhere", "run"):
            (tmp_path / name).mkdir()
        write_files(tmp_path / "here/connectors", files)
        monkeypatch.chdir(tmp_path / "here")
        kept_source.keep_source(connector or {"name": "mine"}, tmp_path / "run")
        monkeypatch.chdir(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "here")
        return tmp_path / "run"

    return keep


def kept_names(run: Path) -> set[str]:
    folder = run / "connector"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return files - {"source.json"}


def load_kept(run: Path, **connector: str) -> type[Connector]:
    return registry.load_connector(
        kept_source.locate_source(connector or {"name": "mine"}, run, trust=False)
    )


@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_connector_uses_is_kept_and_found_elsewhere(kind, own):
    files, names = SOURCES[kind]
    run = own(files)
    assert kept_names(run) == names
    (run / "next").mkdir()
    kept_source.copy_kept_source(run, run / "next")
    assert kept_names(run / "next") == names
    for folder in (run, run / "next"):
        cls = load_kept(folder)
        connector, features = cls(SHAPES), torch.ones(1, 16, 32)
        assert torch.equal(connector(features), 2 * connector.proj(features))
        assert pickle.loads(pickle.dumps(cls)) is cls


def test_a_shipped_connector_that_takes_ones_own_is_kept_with_it(own):
    options = {"name": "mixed", "tokens": "mine"}
    run = own(
        {"mine.py": mine("from .scales import SCALE\n"), "scales.py": "SCALE = 2\n"}, **options
    )
    assert kept_names(run) == {"mixed.py", "mine.py", "scales.py"}
    connector = load_kept(run, **options)(SHAPES, tokens="mine", every=1, heads=1, head_width=4)
    assert type(connector.inner).__name__ == "Mine" and connector.metrics()
    with pytest.raises(ValueError, match="tokens is 'mine'"):
        registry.load_connector("mixed")(SHAPES, tokens="mine")


def test_a_size_has_its_options_for_a_shipped_connector_that_init_keeps(own):
    run = own({"mine.py": mine("SCALE = 2\n")}, name="mixed", tokens="mine")
    words = ["recipe=yivl_llava", "connector={name: mixed, tokens: mine}"]
    tiny = load_recipe(words[:1] + ["connector.name=mixed"]).connector
    kept = load_recipe([*words, f"init={run}"]).connector
    assert kept == {**tiny, "name": str(run / "connector/mixed.py"), "tokens": "mine"}


def test_only_shipped_connectors_need_no_source(tmp_path):
    kept_source.keep_source({"name": "mixed", "tokens": "llava_mlp"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def read_scale(connector: type[Connector]) -> object:
    return connector.forward.__globals__["SCALE"]


def test_another_process_finds_the_kept_module(own, tmp_path, monkeypatch):
    run = own({"mine.py": mine("from .scales import SCALE\n"), "scales.py": "SCALE = 7\n"})
    cls = load_kept(run)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_scale, (cls,)) == 7


def test_another_process_runs_no_source_that_has_changed(own):
    run = own({"mine.py": mine("SCALE = 7\n")})
    name = load_kept(run).__module__
    (run / "connector/mine.py").write_text(mine("SCALE = 8\n"))
    with pytest.raises(ImportError, match="has changed"):
        registry.sys.meta_path[0].find_spec(name.rpartition(".")[0])


def test_every_file_of_a_kept_folder_counts(own):
    run = own({"mine.py": mine("SCALE = 2\n")})
    (run / "connector/more.py").write_text("")
    with pytest.raises(UserError, match="trust_connector=true"):
        load_kept(run)


def test_an_edit_between_two_runs_of_a_program_is_seen(tmp_path, monkeypatch):
    """A notebook trains, edits the file and trains again: what is kept is what is trained."""
    monkeypatch.chdir(tmp_path)
    files = {"mine.py": mine("from .scales import SCALE\n"), "scales.py": "SCALE = 1\n"}
    write_files(tmp_path / "connectors", files)
    first = registry.load_connector("mine")
    assert registry.load_connector("mine") is first and read_scale(first) == 1
    times = os.stat("connectors/scales.py")
    write_files(tmp_path / "connectors", {"scales.py": "SCALE = 5\n"})
    os.utime("connectors/scales.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_scale(registry.load_connector("mine")) == 5 and read_scale(first) == 1


def test_files_beside_a_connector_that_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        files = {"mine.py": mine("from .scales import SCALE\n"), "scales.py": f"SCALE = {number}\n"}
        write_files(tmp_path / f"set{number}", files)
    found = [registry.load_connector(f"set{number}/mine.py") for number in (1, 2)]
    assert [read_scale(cls) for cls in found] == [1, 2]


def test_what_is_imported_and_not_kept_is_said(own, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    write_files(tmp_path / "here", {"loose.py": "SCALE = 2\n", "connectors/scales.py": ""})
    lines = "import json\nimport torch\nfrom loose import SCALE\nimport connectors.scales\n"
    write_files(tmp_path / "here/connectors", {"mine.py": mine(lines)})
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    (tmp_path / "run").mkdir()
    kept_source.keep_source({"name": "mine"}, tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "imports connectors (" in said[0] and "imports loose (" in said[1]


def test_a_source_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "connectors", {"mine.py": mine("PLACE = __file__, 'data'\nSCALE = 2\n")})
    (tmp_path / "connectors/data").mkdir()
    for number in range(MAX_KEPT_FILES):
        (tmp_path / f"connectors/data/{number}").touch()
    with pytest.raises(UserError, match=r"at most 1,000 files of 64 MB"):
        kept_source.keep_source({"name": "mine"}, tmp_path)
    for path in (tmp_path / "connectors/data").iterdir():
        path.unlink()
    with (tmp_path / "connectors/data/large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1100 GB"):
        kept_source.keep_source({"name": "mine"}, tmp_path)
