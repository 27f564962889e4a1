"""The scripts of the studies read what `compare` writes, from where README.md calls them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from vlbench.compare.report.analysis import analyze_runs
from vlbench.compare.report.finished_runs import load_finished_run
from vlbench.compare.report.json_report import render_json
from vlbench.config import recipe as recipes

STUDIES = Path(__file__).parents[1] / "docs/studies"
QUESTIONS = {"letters 6-8 px": [True, False], "shapes 20-28 px": [True, True]}


def write_run(folder: Path, seed: int) -> Path:
    """Write a finished run that was asked about two heights."""
    folder.mkdir(parents=True)
    recipe = recipes.load_recipe(["recipe=yivl_llava", f"seed={seed}", f"run={folder}"])
    recipes.save_recipe(recipe, folder / "recipe.yaml")
    lines = [
        {"set": "accuracy", "id": f"{kind}{number}", "type": kind, "language": "en"}
        | {"correct": right, "truth": "a", "answer": "a" if right else "b"}
        for kind, answers in QUESTIONS.items()
        for number, right in enumerate(answers)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_type = {kind: sum(answers) / len(answers) for kind, answers in QUESTIONS.items()}
    results = {"accuracy": 0.75, "accuracy_by_type": by_type, "questions": 4}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_plot_of_tiles_finds_the_runs_of_its_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    comparison = Path("runs/tiles_or_square")
    folders = [write_run(comparison / f"row/seed{seed}", seed) for seed in (0, 1)]
    report = render_json(analyze_runs([load_finished_run(folder) for folder in folders]))
    (comparison / "report.json").write_text(report)
    script = runpy.run_path(str(STUDIES / "tiles_or_square/plot_gain.py"))
    (letters,) = script["read_curves"](comparison)["letters"].values()
    assert letters == {7.0: [0.5, 0.5]}
