"""`report`: rows, intervals and sentences from run folders, whoever made them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from random_vlm import NoiseImage

from vlbench.__main__ import main
from vlbench.compare.report.sweep_summary import SWEEP_SEED
from vlbench.config import recipe as recipes
from vlbench.data.sample import ChatTurn, Sample
from vlbench.evaluate.heldout_questions import collect_questions, scene_questions


def run(folder: Path, chance: float, seed: int, *words: str) -> Path:
    """Make a finished run whose answers are right with `chance`."""
    folder.mkdir(parents=True)
    named = [] if any(word.startswith("recipe=") for word in words) else ["recipe=yivl_llava"]
    recipe = recipes.load_recipe([*named, f"seed={seed}", f"run={folder}", *words])
    recipes.save_recipe(recipe, folder / "recipe.yaml")
    rng = random.Random(f"{seed} {words}")
    lines = []
    for number in range(300):
        kind, language = ("shape", "colour")[number % 2], ("en", "zh")[number % 3 == 0]
        one = {"set": "accuracy", "id": f"q{number}", "type": kind, "language": language}
        lines.append(json.dumps({**one, "correct": rng.random() < chance}))
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text(json.dumps({"seconds": 60.0, "blank_accuracy": 0.2}))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    for seed in range(3):
        run(tmp_path / f"llava/{seed}", 0.9, seed)
        run(tmp_path / f"linear/{seed}", 0.6, seed, "connector.name=linear")
    return tmp_path


def test_rows_differences_and_sentences(runs, capsys):
    assert main(["report", str(runs), f"out={runs / 'report.md'}"]) == 0
    text = capsys.readouterr().out
    assert text == (runs / "report.md").read_text() + f"\nwrote {runs / 'report.md'}\n"
    assert "Rows: 2; seeds: 0, 1, 2" in text and "| `connector.name` | linear | llava_mlp |" in text
    assert text.index("\n| llava_mlp | 0.") < text.index("\n| linear | 0.")
    (sentence,) = [line for line in text.splitlines() if line.startswith("- llava_mlp is")]
    assert "points above linear (95 % interval" in sentence and "3 seeds)" in sentence
    assert "| shape (150) |" in text and "| zh (100) |" in text and "chance" not in sentence


def test_runs_that_diverged_or_are_not_finished_are_named(runs, capsys):
    recipe = (runs / "llava/0/recipe.yaml").read_text()

    def add(name: str, divergence: str = "", folders: tuple[str, ...] = ("checkpoints",)) -> None:
        for folder in ("", *folders):
            (runs / name / folder).mkdir(parents=True, exist_ok=True)
            (runs / name / folder / "recipe.yaml").write_text(recipe)
        (runs / name / "checkpoints/recipe.yaml").unlink(missing_ok=True)
        if divergence:
            (runs / name / "diverged.txt").write_text(divergence)

    add("qformer/0", "the loss was not finite for 20 steps\n")
    add("qformer/1", folders=("checkpoints", "checkpoints/0-align_224-000002"))
    add("exported", folders=())
    trial = recipe.replace("seed: 0", f"seed: {SWEEP_SEED}")
    add("sweep/linear/x1")
    (runs / "sweep/linear/x1/recipe.yaml").write_text(trial)
    assert main(["report", str(runs), f"out={runs / 'report.json'}"]) == 0
    text = capsys.readouterr().out
    assert "2 runs failed or did not finish" in text and "## Failed or not finished" in text
    failed = json.loads((runs / "report.json").read_text())["failed"]
    assert list(failed) == [str(runs / "qformer/0"), str(runs / "qformer/1")]
    assert failed[str(runs / "qformer/0")] == "the loss was not finite for 20 steps"
    assert failed[str(runs / "qformer/1")].startswith("it is not finished")
    assert main(["report", str(runs / "llava/0"), str(runs / "qformer/1")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "qformer/1 is not finished" in line


def test_learning_rates_come_first_among_what_differs(tmp_path, capsys):
    run(tmp_path / "a", 0.8, 0)
    run(tmp_path / "b", 0.8, 0, "connector.depth=1", "stages.chat.train.connector.lr=1e-3")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert lines[0].startswith("| `stages.chat.train.connector.lr` |") and len(lines) == 2


def test_names_of_rows_say_as_little_as_tells_them_apart(tmp_path, capsys):
    lora, rate = "stages.chat.train.language.lora", "stages.chat.train.connector.lr"
    run(tmp_path / "a", 0.8, 0, f"{lora}.rank=4")
    run(tmp_path / "b", 0.8, 0, f"{lora}.rank=64", f"{rate}=1e-3")
    run(tmp_path / "c", 0.8, 0)
    assert main(["report", str(tmp_path)]) == 0
    assert "| key | lora.rank=4 | lora.rank=64 | lora.rank=null |" in capsys.readouterr().out
    run(tmp_path / "d", 0.8, 0, f"{lora}.rank=64", "connector.name=linear")
    assert main(["report", str(tmp_path / "b"), str(tmp_path / "d")]) == 0
    assert "| key | llava_mlp | linear |" in capsys.readouterr().out


def test_a_connector_is_not_named_by_an_option_of_another(tmp_path, capsys):
    run(tmp_path / "a", 0.8, 0, "connector.name=avgpool", "connector.pool=2")
    run(tmp_path / "b", 0.8, 0, "connector.name=avgpool", "connector.pool=4")
    run(tmp_path / "c", 0.8, 0)
    assert main(["report", str(tmp_path)]) == 0
    assert "| key | avgpool pool=2 | avgpool pool=4 | llava_mlp |" in capsys.readouterr().out


def test_a_run_of_another_version_is_named(tmp_path, capsys):
    folder = run(tmp_path / "a", 0.8, 0)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("keep_last_checkpoints:", "keep_latest:"))
    assert main(["report", str(folder)]) == 2
    assert "was written by" not in capsys.readouterr().err
    (folder / "versions.json").write_text('{"vlbench": "9.9"}')
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "unknown key 'trainer.keep_latest'" in said
    assert f"{recipe}: was written by vlbench 9.9, and this is " in said


def test_turns_about_one_picture_are_counted_once(tmp_path, capsys):
    """By the picture of each answer, or in older runs by the conversation in the id."""
    for name, words in (("a", ()), ("b", ("connector.name=linear",))):
        file = run(tmp_path / name, 0.8, 0, *words) / "answers.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            if number < 150:
                line["picture"] = f"{number // 10}.jpg"
            else:
                line["id"] = f"x/{number // 10}/{number % 10}"
        file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "300 about 30 pictures, the unit. Intervals are of 95 %, over questions alone" in said
    assert "- this run of " in said and "that run of " in said


@pytest.mark.parametrize("older", ["a", "b"])
def test_pictures_are_those_of_a_run_that_names_them(older, tmp_path, capsys):
    for name, words in (("a", ()), ("b", ("connector.name=linear",))):
        file = run(tmp_path / name, 0.8, 0, *words) / "answers.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["picture"] = None if name == older else f"{number // 10}.jpg"
        file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["report", str(tmp_path)]) == 0
    assert "300 about 30 pictures, the unit" in capsys.readouterr().out


def test_questions_name_the_picture_that_their_conversation_is_about():
    image = NoiseImage(1)
    words = (("human", "<image_placeholder> one"), ("assistant", "1"), ("human", "two"))
    turns = tuple(ChatTurn(*turn) for turn in (*words, ("assistant", "2")))
    asked, _ = collect_questions([Sample("7", turns, (image,))], 9)
    assert [one.picture for one in asked] == [image.name, image.name]
    assert len({one.picture for one in scene_questions("new")}) == 1800


def test_a_seed_that_is_missing_in_a_row_is_left_out_and_said(runs, capsys):
    for file in (runs / "linear/2").iterdir():
        file.unlink()
    (runs / "linear/2").rmdir()
    assert main(["report", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "seeds: 0, 1;" in text and "not every row has the seed: 1 of llava_mlp" in text


def change_answers(folder: Path, change: Callable[[int], dict[str, str]], keep: int = 300) -> None:
    """Change the lines of a run's answers by their number, and keep the first ones."""
    file = folder / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[:keep]]
    changed = (json.dumps({**line, **change(number)}) for number, line in enumerate(lines))
    file.write_text("".join(f"{line}\n" for line in changed))


def test_other_questions_under_the_same_ids_are_not_paired(runs, capsys):
    """Rows that are asked about training data of their own may have ids in common."""
    for folder in (runs / "llava/0", runs / "linear/0", runs / "linear/1"):
        change_answers(folder, lambda _: {"truth": "red", "picture": "data/1.jpg"})
    change_answers(runs / "linear/2", lambda n: {"truth": "blue" if n < 9 else "red"})
    other = {"truth": "red", "picture": "moved/1.jpg"}
    change_answers(runs / "llava/2", lambda n: {**other, "picture": "2.jpg"} if n < 10 else other)
    assert main(["report", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "questions about the data of the recipe: 290" in text and "Only" not in text
    assert "10 questions are left out, as under the same id their true answer, text" in text
    change_answers(runs / "llava/2", lambda _: {"truth": "green"})
    assert main(["report", str(runs)]) == 2
    assert "under the same ids their true answers, texts or pictures differ, as of q0" in (
        capsys.readouterr().err
    )


def test_rows_that_are_right_as_often_are_level(tmp_path, capsys):
    answers = (run(tmp_path / "first", 0.6, 0) / "answers.jsonl").read_text()
    for name in ("linear", "avgpool"):
        file = run(tmp_path / name, 0.6, 0, f"connector.name={name}") / "answers.jsonl"
        file.write_text(answers)
    assert main(["report", str(tmp_path), f"out={tmp_path / 'report.json'}"]) == 0
    text = capsys.readouterr().out
    assert "- this run of avgpool is level with that run of llava_mlp (95 % interval -" in text
    assert "points above" not in text and "1 seed); p = 1.000" in text
    verdict = json.loads((tmp_path / "report.json").read_text())["verdict"]
    assert "% of the questions right, as do llava_mlp and linear." in verdict


def test_a_run_without_answers_is_named(runs, capsys):
    change_answers(runs / "linear/1", lambda _: {"set": "unseen"})
    assert main(["report", str(runs)]) == 2
    assert f"paired ({runs / 'linear/1'} has no answers; " in capsys.readouterr().err


def test_other_data_and_missing_questions_are_both_told(runs, capsys):
    (runs / "linear/0/results.json").write_text(json.dumps({"asked_of": "other pictures"}))
    change_answers(runs / "linear/0", lambda _: {}, keep=200)
    assert main(["report", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "Only 200 of up to 300 questions" in text
    assert "about different data: other pictures; ?" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report needs RUN..."),
        (["nowhere"], "nowhere is no run folder"),
        (["llava/0", "llava/0x"], "are the same recipe with the same seed 0"),
        (["llava/0", "linear/1"], "no seed is common to all rows"),
        (["llava/0", "other"], "(llava/0: 300 about new images; other: 1 about new images)"),
        (["half"], "half is not finished: it has no results.json"),
        (["torn"], "line 2: is no answer"),
    ],
)
def test_mistakes_are_one_line(words, message, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    run(runs / "llava/0x", 0.9, 0)
    (run(runs / "half", 0.5, 0) / "results.json").unlink()
    other = run(runs / "other", 0.5, 0, "connector.name=linear") / "answers.jsonl"
    other.write_text(other.read_text().splitlines()[0].replace('"q0"', '"elsewhere"') + "\n")
    torn = run(runs / "torn", 0.5, 0) / "answers.jsonl"
    torn.write_text(torn.read_text().splitlines()[0] + "\n{")
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_runs_that_are_linked_into_a_folder_count_once(tmp_path, capsys):
    for seed in range(2):
        run(tmp_path / f"mine/llava/{seed}", 0.9, seed)
        run(tmp_path / f"disk/linear/{seed}", 0.6, seed, "connector.name=linear")
    (tmp_path / "mine/linear").symlink_to(tmp_path / "disk/linear")
    (tmp_path / "mine/latest").symlink_to("llava/1")
    (tmp_path / "mine/llava/up").symlink_to("..")
    (tmp_path / "mine/gone").symlink_to("gone")
    half = tmp_path / "disk/linear/2"
    (half / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "mine/linear/1/recipe.yaml", half)
    assert main(["report", str(tmp_path / "mine")]) == 0
    text = capsys.readouterr().out
    assert "Rows: 2; seeds: 0, 1" in text and f"{tmp_path}/mine/linear/2: it is not" in text


def test_results_of_another_program_are_no_run(runs, capsys):
    other = runs / "llava/0/eval/lmms"
    other.mkdir(parents=True)
    (other / "results.json").write_text("{}")
    assert main(["report", str(runs)]) == 0
    assert "Rows: 2; seeds: 0, 1, 2" in capsys.readouterr().out
    (runs / "llava/1/recipe.yaml").unlink()
    assert main(["report", str(runs)]) == 2
    assert "llava/1 is no run folder: it has no recipe.yaml" in capsys.readouterr().err


def test_a_folder_may_have_the_name_of_that_of_trials(tmp_path, capsys):
    for seed in (0, 1):
        run(tmp_path / f"sweep/a/{seed}", 0.8, seed)
    run(tmp_path / "sweep/trials/x3", 0.2, SWEEP_SEED, "stages.chat.train.connector.lr=1e-2")
    assert main(["report", str(tmp_path)]) == 0
    assert "Rows: 1; seeds: 0, 1" in capsys.readouterr().out


def test_a_row_for_which_seeds_of_all_others_are_left_out_is_named(runs, capsys):
    run(runs / "qformer/0", 0.5, 0, "connector.name=qformer")
    assert main(["report", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "Rows: 3; seeds: 0;" in said
    assert "Without qformer (1 seed), more could be compared." in said
    shutil.rmtree(runs / "linear/2")
    assert main(["report", str(runs / "llava"), str(runs / "linear")]) == 0
    assert "Without" not in capsys.readouterr().out  # there would be one row
