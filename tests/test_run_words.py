"""What a run says of itself: the parts that are loaded, the pixels, the loss and what it means."""

from __future__ import annotations

import json
import subprocess

import pytest
from tqdm import tqdm
from tqdm.notebook import tqdm_notebook

from vlbench.compare.experiment.grid import parse_grid
from vlbench.config import recipe as recipes
from vlbench.train import run_folder, run_report
from vlbench.train.model_names import find_model_names
from vlbench.train.progress_logging import can_show_bar
from vlbench.train.run_folder import RunFolder

PHOTOS = "data.train=photos.json"


def load(*words: str):
    return recipes.load_recipe(["recipe=yivl_llava", *words])


def start_of(recipe, capsys) -> str:
    stages = [recipe.stage_data(name) for name in recipe.stages]
    steps = dict.fromkeys(recipe.stages, 1)
    run_report.show_run_start("", recipe.trainer, recipe.model, stages, steps)
    return capsys.readouterr().out


def test_the_pixels_that_are_trained_stand_beside_a_name_that_says_others() -> None:
    assert run_report.stage_label("align_224", 56) == "align_224 (here 56 pixels)"
    assert [run_report.stage_label(*one) for one in (("align_224", 224), ("chat", 56))] == [
        "align_224",
        "chat",
    ]


def test_the_parts_that_are_loaded_are_named(tmp_path, capsys) -> None:
    assert find_model_names(load("size=6b", PHOTOS).model)[:2] == (
        "ViT-H-14 (laion2b_s32b_b79k)",
        "01-ai/Yi-6B-Chat",
    )
    said = start_of(load("language.weights=org/llama"), capsys)
    assert "language org/llama" in said and "embedded miniatures" not in said
    assert "language tiny (an embedded miniature)" in start_of(load(), capsys)


def test_real_images_and_the_miniature_are_named_before_training(capsys) -> None:
    assert "coloured shapes alone" in start_of(load(PHOTOS), capsys)
    assert "coloured shapes" not in start_of(load(), capsys)
    assert "coloured shapes" not in start_of(load("size=6b", PHOTOS), capsys)


@pytest.mark.parametrize(("loss", "word"), [(7.8, "hardly learned"), (0.1, "of new images")])
def test_the_end_says_the_loss_and_what_it_means(tmp_path, capsys, loss, word) -> None:
    recipes.save_recipe(load(PHOTOS), tmp_path / "recipe.yaml")
    results = {"questions": 1, "asked_of": "it", "seconds": 1, "peak_memory_bytes": 1, "loss": loss}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run_report.show_results(RunFolder(tmp_path)) == 0
    said = capsys.readouterr().out
    assert f"loss {loss:.3f}" in said and word in said and "size=6b" in said


def test_rows_are_named_by_what_differs() -> None:
    def names(grid: str) -> list[str]:
        return [row.name for row in parse_grid(["recipe=yivl_llava", f"grid={grid}"]).rows]

    lora = "stages.chat.train.language.lora.rank=4"
    steps = "stages.align_224.steps=4"
    assert names(f"{steps} + {lora} | {steps}") == ["lora.rank=4", "yivl_llava"]
    rate = "train.connector.lr=1e-3"
    assert names(f"stages.chat.{rate} | stages.align_224.{rate}") == [
        f"stages.{name}.{rate}" for name in ("chat", "align_224")
    ]


def test_a_bar_is_for_terminals_and_notebooks(monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    assert can_show_bar(tqdm_notebook) and not can_show_bar(tqdm)


def test_the_commit_is_that_of_vlbench_and_of_no_project_around_it(tmp_path, monkeypatch) -> None:
    installed = tmp_path / ".venv/run_folder.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(run_folder, "__file__", str(installed))

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        words = ("git", *identity, *words)
        done = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert run_folder.git_commit() == ""
    git("add", str(installed))
    git("commit", "-m", "vlbench")
    assert run_folder.git_commit() == git("rev-parse", "HEAD")
