"""`compare curve=...`: which rows are trained, at which budgets, and what cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_model_cost import count_model_cost

from vlbench.__main__ import main
from vlbench.compare.experiment import compare_command, cost_estimate
from vlbench.compare.experiment.budget_curves import CURVE_TOLERANCE, expand_curves
from vlbench.compare.experiment.design_cautions import describe_design_cautions
from vlbench.compare.experiment.design_power import describe_power
from vlbench.compare.experiment.grid import ComparisonGrid, load_recipe, parse_grid
from vlbench.compare.report.curve_plan import load_curve_plan
from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.model.connector_cost import ConnectorCost

LADDER = ["recipe=yivl_llava", "connector.name=avgpool", "curve=visual_tokens:4,16,64"]
TWO = ["recipe=yivl_llava", "grid=connector.name=avgpool | connector.name=qformer"]


def last_stage_cost(recipe: Recipe) -> ConnectorCost:
    return count_model_cost(recipe.model, list(recipe.stages.values())[-1].image_size)


def expanded(*words: str) -> ComparisonGrid:
    return expand_curves(parse_grid([*words, "seeds=2", "run=c"]))


def test_a_ladder_of_one_recipe_changes_what_makes_tokens():
    grid = expanded(*LADDER)
    assert [row.name for row in grid.rows] == [
        f"yivl_llava/visual_tokens={tokens}" for tokens in (4, 16, 64)
    ]
    recipes = [load_recipe(row, 0) for row in grid.rows]
    assert [recipe.connector["pool"] for recipe in recipes] == [4, 2, 1]
    assert [last_stage_cost(recipe).tokens for recipe in recipes] == [4, 16, 64]
    assert grid.curve_plan.curves == ["avgpool"] and len(grid.run_folders()) == 6
    assert [point.reached for point in grid.curve_plan.points] == [4, 16, 64]


def test_two_connectors_are_tested_at_each_budget_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = expanded(*TWO, "curve=visual_tokens:64,4,16")
    plan = grid.curve_plan
    assert plan.curves == ["avgpool", "qformer"] and plan.values == [4, 16, 64]
    assert [(first.name, second.name) for first, second in plan.tested_pairs()] == [
        (f"avgpool at {tokens}", f"qformer at {tokens}") for tokens in (4, 16, 64)
    ]
    assert grid.tested_pair_count == 3 and len(plan.steps()) == 4
    assert "correction over 3 pairs" in describe_power(grid)[0]


def test_a_budget_that_cannot_be_had_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    words = ["recipe=yivl_llava,yivl_qformer", "curve=visual_tokens:4,60,64", "dry_run=true"]
    assert main(["compare", *words]) == 0
    said = capsys.readouterr().out
    assert "cannot: llava_mlp cannot have 4 visual tokens, nearest is 64: " in said
    assert "cannot: qformer cannot have 60 visual tokens, nearest are 49 and 64: " in said
    assert "yivl_qformer/visual_tokens=4   connector.queries=4" in said
    assert "3 rows x 3 seeds = 9 runs" in said and not list(tmp_path.iterdir())


def test_flops_are_met_within_half_of_the_tolerance_of_matching():
    grid = expanded(*LADDER[:2], "curve=flops:1.36e8,2.78e8")
    for row, point in zip(grid.rows, grid.curve_plan.points, strict=True):
        assert 0 < abs(point.reached / point.value - 1) <= CURVE_TOLERANCE
        assert last_stage_cost(load_recipe(row, 0)).flops == point.reached


def test_samples_are_steps_of_the_last_stage_that_runs():
    grid = expanded(*TWO, "curve=samples:1600,6405,8")
    stages = [load_recipe(row, 0).stages for row in grid.rows]
    assert [one["chat"].steps for one in stages] == [100, 400, 100, 400]
    assert {one["align_448"].steps for one in stages} == {200}
    assert [point.reached for point in grid.curve_plan.points] == [1600, 6400, 1600, 6400]
    first, _ = grid.curve_plan.unreached
    assert (first.value, first.nearest) == (8, (16,)) and "a step of chat has 16" in first.reason
    assert all("steps" not in caution for caution in describe_design_cautions(grid))
    grid = expanded(TWO[0], "only=align_224", "curve=samples:320,640")
    assert [load_recipe(row, 0).stages["align_224"].steps for row in grid.rows] == [10, 20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["curve=tokens:4,16"], "curve must be one of visual_tokens, flops, samples, then a colon"),
        (["curve=visual_tokens"], "curve is 'visual_tokens'; wanted are 2 to 32 whole numbers"),
        (["curve=visual_tokens:4"], "wanted are 2 to 32 whole numbers"),
        (["curve=visual_tokens:4,x"], "wanted are 2 to 32 whole numbers"),
        (["curve=visual_tokens:4,0.5"], "wanted are 2 to 32 whole numbers"),
        (["curve=visual_tokens:4,nan,inf"], "wanted are 2 to 32 whole numbers"),
        (["curve=flops:1e9,1.02e9"], "1,000,000,000 and 1,020,000,000 are the same budget"),
        (["curve=flops:1e9,2e9", "match=params"], "sets the sizes of connectors, and so does"),
        (["curve=visual_tokens:4,16"], "llava_mlp would have no point at all"),
        (["curve=visual_tokens:4,64"], "no curve would have two points"),
        (["curve=samples:160,320", "stages.chat.steps=9"], "leave stages.chat.steps=9 out"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "recipe=yivl_llava", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_somebody_typed_stays_and_is_told_where_it_is_in_the_way():
    with pytest.raises(UserError, match="with pool as given"):
        expanded(*LADDER, "connector.pool=2")


def test_the_plan_is_kept_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran: list[tuple[str, ...]] = []

    def train(grid, jobs):
        ran.extend(job.overrides for job in jobs)
        return {}

    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    monkeypatch.setattr(compare_command, "_train_unfinished", train)
    assert main(["compare", *LADDER, "seeds=2", "run=c"]) == 0
    pools = [word for words in ran for word in words if word.startswith("connector.pool")]
    assert pools == ["connector.pool=4", "connector.pool=1"] * 2 and len(ran) == 6
    plan = load_curve_plan(tmp_path / "c")
    assert [point.row for point in plan.points] == [
        f"yivl_llava/visual_tokens={tokens}" for tokens in (4, 16, 64)
    ]
    (tmp_path / "c/curve.json").write_text('{"budget": "visual_tokens", "points": [{"row": 3}]}')
    with pytest.raises(UserError, match=r"curve\.json: is no plan of a curve"):
        load_curve_plan(tmp_path / "c")


def test_a_finished_curve_may_be_read_on_a_smaller_machine(tmp_path, monkeypatch, capsys):
    """Its runs lie in the folders of points, which are known once the budgets are solved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: {})
    monkeypatch.setattr(compare_command, "write_reports", lambda *_: 0)
    words = ["compare", *LADDER, "seeds=2", "run=c", "jobs=1000"]
    folders = expanded(*LADDER).run_folders()
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "results.json").write_text("{}")
    Path("c/command.txt").write_text("python -m vlbench compare\n")
    assert main(words) == 0
    (folders[0] / "results.json").unlink()
    assert main(words) == 2
    assert "jobs is 1000, runs at once" in capsys.readouterr().err
