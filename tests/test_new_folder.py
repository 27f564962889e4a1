"""`out=` of what writes a whole folder: a new one, or one that is empty and not in use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_release import CHECKPOINT

from vlbench.__main__ import main


@pytest.mark.parametrize("out", [".", "..", "../inner", "/"])
def test_the_current_folder_is_not_replaced(out: str, tmp_path: Path, monkeypatch, capsys) -> None:
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    data.write_text(json.dumps([{"id": "a", "conversations": turns}]), encoding="utf-8")
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for words in (["export", f"model={CHECKPOINT}", "format=vlbench"], ["pack", f"data={data}"]):
        assert main([*words, f"out={out}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"vlbench: out={out} is ") and len(said.splitlines()) == 1
        assert "name a new" in said
    assert inner.is_dir() and not list(inner.iterdir())
    assert main(["pack", f"data={data}", "out=shards"]) == 0
