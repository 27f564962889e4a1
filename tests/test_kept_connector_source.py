"""One's own connector is kept with its weights, and another's code does not run unasked."""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import shutil
import sys
from pathlib import Path

import pytest
import torch

import vlbench
from vlbench.__main__ import main
from vlbench.errors import UserError

SHORT = [f"stages.{name}.steps=1" for name in ("align_224", "align_448", "chat")]
SHORT += ["log.questions=1", "log.examples=0", "log.tensorboard=false", "data.workers=0"]
HELPER = "SCALE = {scale}\n"
CONNECTOR = """
from pathlib import Path

from torch import nn

from vlbench.connector import Connector

from .helper import SCALE

Path("{marker}").open("a").write("ran ")


class Mine(Connector):
    def __init__(self, shapes, bias: bool = True):
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.proj = nn.Linear(shapes.vision_width, shapes.lm_width, bias=bias)

    def forward(self, features):
        return SCALE * self.proj(features)
"""


def write_connector(folder: Path, marker: Path, scale: float = 1.0) -> Path:
    connectors = folder / "connectors"
    connectors.mkdir(parents=True, exist_ok=True)
    (connectors / "helper.py").write_text(HELPER.format(scale=scale))
    (connectors / "mine.py").write_text(CONNECTOR.format(marker=marker))
    return connectors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a connector of one's own, and the marker that its code writes to."""
    folder = tmp_path_factory.mktemp("own")
    marker = folder / "marker"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_connector(folder, marker)
        words = ["recipe=yivl_llava", "connector.name=mine", f"run={folder / 'run'}"]
        assert main(["fit", *words, *SHORT]) == 0
    return folder / "run", marker


@pytest.fixture
def elsewhere(trained, tmp_path, monkeypatch):
    """The run's copy in a folder without `./connectors`, of a user who did not make it."""
    shutil.copytree(trained[0], tmp_path / "run")
    trained[1].write_text("")
    for name in [name for name in sys.modules if ".connector.kept_" in name]:
        monkeypatch.delitem(sys.modules, name)  # else what ran before does not run again
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Path("run")


def test_run_and_checkpoints_keep_the_source_and_its_imports(trained):
    run, _ = trained
    kept = [run / "connector", *run.glob("checkpoints/*/connector")]
    assert len(kept) >= 2
    for folder in kept:
        assert {path.name for path in folder.iterdir()} == {"mine.py", "helper.py", "source.json"}
        record = json.loads((folder / "source.json").read_text())
        assert record["name"] == "mine" and len(record["sha256"]) == 64


def test_ones_own_run_is_used_from_anywhere_without_asking(trained, tmp_path, monkeypatch, capsys):
    run, _ = trained
    monkeypatch.chdir(tmp_path)
    assert vlbench.load(run).connector.proj.bias is not None
    assert "connector 'mine' is the one kept in" in capsys.readouterr().err
    assert main(["report", str(run), "out=page.html"]) == 0
    assert main(["export", f"model={run}", "out=copy", "format=vlbench"]) == 0
    first, second = (vlbench.load(path).model.state_dict() for path in (run, "copy"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    words = ["recipe=yivl_llava", "connector.name=mine", f"init={run}", "only=chat", "run=next"]
    assert main(["fit", *words, *SHORT]) == 0
    assert Path("next/connector/helper.py").is_file()
    assert "name: mine" in Path("next/recipe.yaml").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "model=run", "question=Hello"],
        ["eval", "model=run"],
        ["export", "model=run", "out=copy", "format=vlbench"],
        ["fit", "recipe=yivl_llava", "connector.name=mine", "init=run", "run=next", *SHORT],
        ["fit", "run=run", "log.questions=1"],
        ["show", "run=run"],
    ],
)
def test_the_code_of_others_does_not_run_unasked(words, elsewhere, trained, capsys):
    shutil.rmtree("run/connector/__pycache__", ignore_errors=True)
    assert main(words) != 0
    said = capsys.readouterr().err
    assert "trust_connector=true" in said and "mine.py" in said and "Traceback" not in said
    assert trained[1].read_text() == ""


def test_reading_a_run_of_others_runs_nothing(elsewhere, trained, capsys):
    assert main(["report", "run", "out=page.html"]) == 0
    assert trained[1].read_text() == ""


def test_trust_runs_it(elsewhere, trained):
    with pytest.raises(UserError, match="trust_connector=true"):
        vlbench.load("run")
    assert vlbench.load("run", trust_connector=True)
    assert trained[1].read_text()
    words = ["recipe=yivl_llava", "connector.name=mine", "init=run", "run=next", "only=chat"]
    assert main(["fit", *words, "trust_connector=true", *SHORT]) == 0


def test_bytecode_beside_the_kept_source_is_not_run(elsewhere, trained):
    checkpoint = sorted(elsewhere.glob("checkpoints/*"))[-1]
    for folder in (elsewhere / "connector", checkpoint / "connector"):
        (folder / "__pycache__").mkdir()
        source = folder / "helper.py"
        text, times = source.read_text(), source.stat()
        source.write_text("SCALE = 7.0\n")
        py_compile.compile(str(source), importlib.util.cache_from_source(str(source)))
        source.write_text(text)
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    vlm = vlbench.load("run", trust_connector=True)
    assert type(vlm.connector).forward.__globals__["SCALE"] == 1.0


def test_an_edited_connector_is_not_mixed_with_the_weights_of_another(
    trained, tmp_path, monkeypatch, capsys
):
    run, marker = trained
    monkeypatch.chdir(tmp_path)
    write_connector(tmp_path, marker, scale=3.0)
    vlm = vlbench.load(run)
    assert type(vlm.connector).forward.__globals__["SCALE"] == 1.0
    assert "connectors/mine.py differs" in capsys.readouterr().err


def test_a_stopped_run_does_not_go_on_with_an_edited_connector(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], "run")
    Path("run/results.json").unlink()
    write_connector(tmp_path, trained[1], scale=3.0)
    words = ["recipe=yivl_llava", "connector.name=mine", "run=run", *SHORT]
    assert main(["fit", *words]) != 0
    assert "began with another connector" in capsys.readouterr().err
    write_connector(tmp_path, trained[1])
    assert main(["fit", *words]) == 0


@pytest.mark.parametrize("words", [["chat", "model=run", "question=Hello"], ["fit", "run=run"]])
def test_a_folder_can_neither_trust_itself_nor_name_a_file(words, elsewhere, trained, capsys):
    """Its recipe is as foreign as its code."""
    connector = Path("run/connector/mine.py").absolute()
    for recipe in [elsewhere / "recipe.yaml", *elsewhere.glob("checkpoints/*/recipe.yaml")]:
        text = recipe.read_text().replace("trust_connector: false", "trust_connector: true")
        assert "trust_connector: true" in text
        recipe.write_text(text)
    assert main(words) != 0
    assert "trust_connector=true" in capsys.readouterr().err
    for recipe in [elsewhere / "recipe.yaml", *elsewhere.glob("checkpoints/*/recipe.yaml")]:
        recipe.write_text(recipe.read_text().replace("name: mine", f"name: {connector}"))
    shutil.copytree("run/connector", "evil")
    for folder in [elsewhere, *elsewhere.glob("checkpoints/*")]:
        shutil.rmtree(folder / "connector")
    text = (elsewhere / "recipe.yaml").read_text()
    (elsewhere / "recipe.yaml").write_text(text.replace(str(connector), "evil/mine.py"))
    Path("evil/source.json").unlink()
    assert main(words) != 0
    assert main(["report", "run", "out=page.html"]) != 0
    assert trained[1].read_text() == ""
