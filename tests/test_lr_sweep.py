"""`sweep=`: refused where it cannot choose, by part, with a seed and samples of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run_jobs import finish

from vlbench.__main__ import main
from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment import lr_sweep
from vlbench.compare.report.sweep_summary import SWEEP_SEED, describe_sweep
from vlbench.config import recipe as recipes
from vlbench.data.shuffle import SourceTail
from vlbench.evaluate.heldout_questions import MAX_OWN_QUESTIONS, final_questions
from vlbench.train.stage_plan import EXAM_SAMPLES, first_loss_sample

LLAVA = ["compare", "recipe=yivl_llava", "seeds=2", "run=c"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    return tmp_path


def write(file: str, count: int) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(count)]
    Path(file).write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("val", "words", "message"),
    [
        (0, [], "stage chat has no held-out samples; give data.val=FILE, or leave sweep= out"),
        (20, [], "are about the first 20 of 20 samples of data.val, and the sweep needs others"),
        (20, ["log.questions=11"], "are about the first 11 of 20 samples of data.val"),
    ],
)
def test_a_sweep_that_cannot_choose_is_refused_before_anything_runs(
    val, words, message, home, capsys
):
    write("train.json", 4)
    words = [*words, "data.train=train.json"]
    if val:
        write("val.json", val)
        words.append("data.val=val.json")
    assert main([*LLAVA, "sweep=0.3,1,3", *words]) == 2
    assert message in capsys.readouterr().err and not (home / "c").exists()


def test_held_out_losses_are_of_samples_that_nothing_is_asked_about(home):
    assert EXAM_SAMPLES == MAX_OWN_QUESTIONS
    write("train.json", 4)
    write("val.json", 20)
    words = ["recipe=yivl_llava", "data.train=train.json", "data.val=val.json", "log.questions=10"]
    grids.parse_grid([*words, "sweep=0.3,1"])
    recipe = recipes.load_recipe(words)
    _, questions, _ = final_questions(recipe.last_stage_data, recipe.log.questions)
    asked = {int(one.record_number) - 1 for one in questions}
    from vlbench.data.conversation_files import ConversationFiles

    source = ConversationFiles("val.json")
    tail = SourceTail(source, first_loss_sample(len(source)), SWEEP_SEED)
    learned = [tail.locate_sample(position)[1] for position in range(2 * len(tail))]
    assert sorted(learned[:10]) == sorted(learned[10:]) == list(range(10, 20))
    assert learned[:10] != learned[10:] and asked == set(range(10))
    assert tail[0].origin.record_number == learned[0] + 1
    assert first_loss_sample(10**6) == EXAM_SAMPLES and first_loss_sample(1) == 0


def test_trials_have_a_seed_that_no_comparison_gets_and_keep_it(home):
    few, many = (
        lr_sweep.trial_jobs(
            grids.parse_grid(["recipe=yivl_llava", f"seeds={n}", "sweep=1,2", "run=c"])
        )
        for n in (1, 1000)
    )
    assert few == many and all(f"seed={SWEEP_SEED}" in one.overrides for one in few)
    assert f"seed={SWEEP_SEED}" not in [f"seed={n}" for n in range(1001)]


def test_parts_have_factors_of_their_own(home):
    words = ["recipe=yivl_llava", "sweep.connector=0.5,2", "sweep.language=1,3", "run=c"]
    grid = grids.parse_grid(words)
    trials = lr_sweep.list_trials(grid)
    assert len(trials) == 4 and trials[1] == {"connector": 0.5, "language": 3.0}
    job = lr_sweep.trial_jobs(grid)[1]
    assert job.title == "yivl_llava, rate connector x 0.5, language x 3"
    assert "stages.chat.train.connector.lr=0.0002" in job.overrides
    assert "stages.chat.train.language.lr=0.003" in job.overrides
    assert str(job.folder) == "c/sweep/yivl_llava/x0.5_language-x3"
    for trial, loss in zip(trials, ("0.3", "0.2", "0.4", "0.5"), strict=True):
        finish(lr_sweep.trial_folder(grid, grid.rows[0], trial), loss)
    (row,) = lr_sweep.apply_best_lr(grid).rows
    rates = grids.load_recipe(row, 0).stages["chat"].trained_parts
    assert rates["connector"].lr == 2e-4 and rates["language"].lr == 3e-3
    assert "at the edge of what was tried (language x 3)" in " ".join(
        describe_sweep(home / "c", ["yivl_llava"])
    )


def sweep(home: Path, factors: str, *losses: str) -> list[str]:
    grid = grids.parse_grid(["recipe=yivl_llava", f"sweep={factors}", "run=c"])
    for trial, loss in zip(lr_sweep.list_trials(grid), losses, strict=True):
        finish(lr_sweep.trial_folder(grid, grid.rows[0], trial), loss)
    lr_sweep.apply_best_lr(grid)
    return describe_sweep(home / "c", ["yivl_llava"])


@pytest.mark.parametrize(
    "words",
    [
        "stages.chat.train.connector={lr: 1e-3, weight_decay: 0.1}",
        "stages.chat.train={connector: {lr: 1e-3, weight_decay: 0.1}} + log={questions: 50}",
    ],
)
def test_a_row_may_give_whole_mappings_of_what_trials_change(words):
    grid = grids.parse_grid(
        ["recipe=yivl_llava", f"grid={words} | connector.depth=1", "sweep=0.3,1"]
    )
    trials = [lr_sweep.trial_overrides(row, {"connector": 0.3}) for row in grid.rows]
    first, second = (recipes.load_recipe(list(trial)) for trial in trials)
    connector = first.stages["chat"].train["connector"]
    assert (connector.lr, connector.weight_decay) == (pytest.approx(3e-4), 0.1)
    assert first.log.questions == second.log.questions == 1


def test_a_choice_at_the_edge_is_told_with_a_wider_sweep(home):
    first, edge = sweep(home, "0.3,1,3", "0.5", "0.4", "0.3")
    assert "yivl_llava x 0.3 0.5000, x 1 0.4000, x 3 0.3000: x 3 is taken." in first
    assert edge.startswith("The best rate of yivl_llava is at the edge") and "x 3" in edge
    assert edge.endswith("widen it, as sweep=0.3,1,3,9.")


def test_a_choice_in_the_middle_or_before_a_failure_is_no_edge(home):
    assert len(sweep(home, "0.3,1,3", "0.5", "0.4", "0.6")) == 1


def test_a_tie_is_told_and_the_nearest_to_the_recipe_is_taken(home):
    first, tie = sweep(home, "0.3,1,3", "0.4", "0.4", "0.402")
    assert "x 1 is taken" in first and tie == (
        "Tie in the sweep of yivl_llava: x 0.3 and x 3 came within 1% of x 1."
    )


def test_runs_of_another_recipe_are_not_taken_for_these(home, capsys):
    from test_report_command import run

    run(home / "c/yivl_llava/seed0", 0.8, 0, "stages.chat.steps=5")
    assert main([*LLAVA, "dry_run=true"]) == 2
    said = capsys.readouterr().err
    assert "c/yivl_llava/seed0 was trained with another recipe" in said
    assert "stages.chat.steps (5 before, 350 now)" in said


def test_runs_of_another_recipe_that_began_with_init_are_not_taken_for_these(home, capsys):
    from test_report_command import run

    run(home / "first", 0.8, 0)
    init = f"init={home / 'first'}"
    run(home / "c/yivl_llava/seed0", 0.8, 0, init, "stages.chat.steps=5")
    assert main([*LLAVA, f"grid={init}", "dry_run=true"]) == 2
    assert "stages.chat.steps (5 before, 350 now)" in capsys.readouterr().err
    # what it takes from init is no difference
    run(home / "d/yivl_llava/seed0", 0.8, 0, init)
    words = [word.replace("run=c", "run=d") for word in LLAVA]
    assert main([*words, f"grid={init}", "dry_run=true"]) == 0
