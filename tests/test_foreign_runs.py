"""Runs of others: a value in their files that no run has is one line that names the file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_printable_streams import ACTING, HOSTILE

from vlbench.compare.report import finished_runs
from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.diagnostics import (
    heatmap_uri,
    load_diagnostics,
)
from vlbench.errors import UserError
from vlbench.model.lora_adapters import _read_adapter_config
from vlbench.model.weights.weight_origin import read_origins
from vlbench.train.progress_logging import truncate_metrics
from vlbench.train.run_results_file import read_results

RESULTS: dict[str, Any] = {
    "accuracy": 0.5,
    "seconds": 1.0,
    "budget": {"flops": 10, "parts": {"vision": {"total": 1}}, "step_seconds": {"chat": 0.1}},
}
ODD = (True, "x", -1, math.nan, math.inf, 10**400, [], [[1]], {"a": {}}, "9" * 5_000)
PLACES = (
    ("accuracy",),
    ("seconds",),
    ("budget",),
    ("budget", "flops"),
    ("budget", "parts"),
    ("budget", "parts", "vision"),
    ("budget", "parts", "vision", "total"),
    ("budget", "step_seconds", "chat"),
)


def replace_at(value: Any, place: tuple[str, ...], new: object) -> Any:
    """Return a copy of nested mappings with another value at a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_results_have_their_kinds(place, tmp_path):
    file = tmp_path / "results.json"
    for value in ODD:
        if isinstance(value, dict) and place[-1] in ("budget", "parts", "vision"):
            continue  # further keys are another version's
        text = json.dumps(replace_at(RESULTS, place, value))
        file.write_text(text)
        with pytest.raises(UserError, match=r"results\.json: ") as caught:
            read_results(file)
        assert len(str(caught.value)) < 1_000 and len(caught.value.lines) == 1
    file.write_text(json.dumps({**RESULTS, "loss": math.nan, "new": {"key": [1]}}))
    assert math.isnan(read_results(file)["loss"])  # of one's own run that diverged


ANSWER = {"set": "accuracy", "id": "1", "correct": True, "type": "t", "language": "en"}
WRONG_ANSWERS = ({"id": 5}, {"id": ["a"]}, {"type": {}}, {"language": None}, {"correct": "no"})
WRONG_ANSWERS += ({"picture": 7}, {"answer": ["x"]}, {"truth": 1.5})


@pytest.mark.parametrize("change", WRONG_ANSWERS, ids=str)
def test_answers_have_their_kinds(change, tmp_path):
    for name in ("recipe.yaml", "results.json"):
        (tmp_path / name).write_text("{}")
    lines = [json.dumps(ANSWER), json.dumps({**ANSWER, **change})]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"answers\.jsonl, line 2: {next(iter(change))} must be"):
        finished_runs.load_finished_run(tmp_path)


QUESTION = {"id": "1", "question": "q", "answer": "a", "truth": "a", "relevance": [[1.0, 2.0]]}
DIAGNOSTICS: dict[str, Any] = {"maps": [QUESTION], "tokens": [0.5], "effective": 1.0}
WRONG_DIAGNOSTICS: dict[str, Callable[[], dict[str, Any]]] = {
    "ragged": lambda: {"maps": [{**QUESTION, "relevance": [[1.0], [1.0, 2.0]]}]},
    "empty map": lambda: {"maps": [{**QUESTION, "relevance": [[]]}]},
    "text in a map": lambda: {"maps": [{**QUESTION, "relevance": [["x"]]}]},
    "box of three": lambda: {"maps": [{**QUESTION, "box": [0.0, 0.0, 1.0]}]},
    "box without an inside": lambda: {"maps": [{**QUESTION, "box": [0.0, 1.0, 1.0, 0.0]}]},
    "text in a box": lambda: {"maps": [{**QUESTION, "box": ["0", 0, 1, 1]}]},
    "no question": lambda: {"maps": [{**QUESTION, "question": 5}]},
    "entropy": lambda: {"attention": {"entropy": 1e4, "uniform": 1.0, "maps": []}},
    "tokens": lambda: {"tokens": "abc"},
    "effective": lambda: {"effective": [1]},
    "huge": lambda: {"tokens": [1e300]},
}


@pytest.mark.parametrize("kind", WRONG_DIAGNOSTICS)
def test_diagnostics_have_their_kinds(kind, tmp_path, monkeypatch):
    run = type("Run", (), {"folder": tmp_path})
    row: Any = type("Row", (RowResult,), {"__init__": lambda self: None, "__setattr__": None})
    row = type("Row", (), {"runs": [run], "name": "row"})
    file = tmp_path / "diagnostics.json"
    file.write_text(json.dumps({**DIAGNOSTICS, "tokens": [math.nan]}))
    assert len(load_diagnostics([row])) == 1  # of a model that diverged
    file.write_text(json.dumps({**DIAGNOSTICS, **WRONG_DIAGNOSTICS[kind]()}))
    with pytest.raises(UserError, match=r"diagnostics\.json: \w+.* must be"):
        load_diagnostics([row])


@pytest.mark.parametrize("origin", [{"source": "a", "sha256": -1}, {"source": []}, 5, {"x": "y"}])
def test_origins_of_weights_have_their_kinds(origin, tmp_path):
    (tmp_path / "weights.json").write_text(json.dumps({"vision": origin}))
    with pytest.raises(UserError, match=r"weights\.json: does not say what weights"):
        read_origins(tmp_path / "weights.json")


def test_a_map_without_numbers_is_drawn():
    assert heatmap_uri([[math.nan, 1.0]]).startswith("data:image/png")


@pytest.mark.parametrize("step", ["x", "", "9" * 5_000, "1.5"])
def test_a_row_of_metrics_without_a_step_is_one_line(step, tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(f"stage,step,seconds\nchat,1,2\nchat,{step},2\n")
    with pytest.raises(UserError, match=r"metrics\.csv: has a row without the number of its step"):
        truncate_metrics(file, ["chat"], "chat", 1)


ADAPTERS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["a.b"],
    "use_rslora": False,
    "use_dora": False,
}
WRONG_ADAPTERS = {
    "a pattern": {"target_modules": "(a+)+$"},
    "a rank": {"r": 10**9},
    "no rank": {"r": None},
    "patterns of ranks": {"rank_pattern": {"(a+)+$": 4}},
    "patterns of scales": {"alpha_pattern": {"(a+)+$": 4}},
    "a decomposition": {"init_lora_weights": "pissa"},
    "other parameters": {"modules_to_save": ["lm_head"]},
    "dropout": {"lora_dropout": 2},
}


@pytest.mark.parametrize("kind", WRONG_ADAPTERS)
def test_adapters_have_no_patterns(kind, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(ADAPTERS))
    assert _read_adapter_config(file).r == 4
    file.write_text(json.dumps({**ADAPTERS, **WRONG_ADAPTERS[kind]}))
    with pytest.raises(UserError, match=r"adapter_config\.json: ") as caught:
        _read_adapter_config(file)
    assert len(caught.value.lines) == 1


def test_pages_and_reports_of_a_hostile_run_show_escapes(whole_run: Path, tmp_path: Path, capsys):
    from vlbench.__main__ import main

    for number in (0, 1):
        shutil.copytree(whole_run, tmp_path / f"run{number}")
    run = tmp_path / "run1"
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    changed = [{**line, "type": HOSTILE, "answer": HOSTILE, "language": HOSTILE} for line in lines]
    (run / "answers.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n")
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "asked_of": HOSTILE}))
    text = (run / "recipe.yaml").read_text().replace("seed: 0", "seed: 1")
    (run / "recipe.yaml").write_text(
        text.replace("recipe: yivl_llava", f"recipe: {json.dumps(HOSTILE)}")
    )
    words = [str(tmp_path / "run0"), str(run), f"out={tmp_path / 'r.md'}"]
    assert main(["report", *words, f"out={tmp_path / 'r.html'}"]) == 0
    said = capsys.readouterr()
    shown = [said.out, said.err, *((tmp_path / name).read_text() for name in ("r.md", "r.html"))]
    assert "\\x1b[2J" in "".join(shown)
    for text in shown:
        assert not ACTING.search(text)
    assert "\nvlbench: all" not in "".join(shown[:3])  # in a page a line end is a space
