"""`compare match=...`: rows get the same budget, little is changed, and what cannot is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_release import CHECKPOINT
from whole_model_cost import count_model_cost

from vlbench.__main__ import main
from vlbench.compare.experiment import compare_command, cost_estimate
from vlbench.compare.experiment.grid import MATCHABLE_BUDGETS, GridRow, parse_grid
from vlbench.compare.experiment.match_budget import (
    BudgetMatch,
    cost_counters,
    format_match_table,
    match_rows,
)
from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.errors import UserError
from vlbench.model.connector_cost import BUDGET_COUNTS, ConnectorCost

DOCS = Path(__file__).parent.parent / "docs/connectors.md"
FOUR = "recipe=yivl_llava,yivl_qformer,yivl_flamingo,yivl_eva"
PLAIN = """
from torch import nn
from vlbench.connector import Connector

class Mine(Connector):
    {sizes}
    def __init__(self, shapes, hidden: int = 64):
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.layers = nn.Sequential(
            nn.Linear(shapes.vision_width, hidden), nn.Linear(hidden, shapes.lm_width)
        )

    def forward(self, features):
        return self.layers(features)
"""


def matched(words: list[str], by: str, limit: float = 100) -> list[BudgetMatch]:
    return match_rows(parse_grid(words).rows, by, limit)


def costs(found: list[BudgetMatch]) -> list[ConnectorCost]:
    loaded = [recipes.load_recipe(list(one.row.overrides)) for one in found]
    sizes = [list(recipe.stages.values())[-1].image_size for recipe in loaded]
    return [
        count_model_cost(recipe.model, size) for recipe, size in zip(loaded, sizes, strict=True)
    ]


def within(values: list[int]) -> bool:
    return max(values) <= 1.05 * min(values)


def tokens_of(one: ConnectorCost) -> int:
    return one.latents or one.tokens


@pytest.mark.parametrize("size", ["tiny", "6b"])
def test_the_four_get_as_many_parameters(size):
    limit = 8 if size == "6b" else 100
    found = matched([FOUR, f"size={size}", "data.train=scenes"], "params", limit)
    assert [one.row.name for one in found] == [
        "yivl_llava",
        "yivl_qformer",
        "yivl_flamingo",
        "yivl_eva",
    ]
    assert not any(one.mismatch_reason or one.relative_distance for one in found)
    assert all(len(one.options) <= 2 for one in found)
    promised = [one.matched_budget for one in found]
    assert within(promised)
    assert [one.parameters for one in costs(found)] == promised
    smallest, largest = (pick(one.own_budget for one in found) for pick in (min, max))
    assert smallest < min(promised) and max(promised) < largest  # they meet in the middle
    if size == "6b":
        for one in found:
            changed = " ".join(f"{key}={value}" for key, value in one.options.items())
            told = (
                f"| `{one.row.name}` | `{changed}` | {one.own_budget:,} | {one.matched_budget:,} |"
            )
            assert told in DOCS.read_text(encoding="utf-8")


def test_sizes_stay_within_the_limit_of_what_they_are():
    words = ["recipe=yivl_llava,yivl_flamingo", "size=6b", "data.train=scenes"]
    rows = parse_grid(words).rows
    own = [recipes.load_recipe(list(row.overrides)).connector for row in rows]

    def largest_change(found: list[BudgetMatch]) -> float:
        return max(
            max(value / options[name], options[name] / value)
            for one, options in zip(found, own, strict=True)
            for name, value in one.options.items()
        )

    found = match_rows(rows, "params")
    assert largest_change(found) <= 4 and not within([one.matched_budget for one in found])
    said = format_match_table(found, "params")[-1]
    assert "within 4 times what it is, either way; match_limit=8 tries more" in said
    found = match_rows(rows, "params", 8)
    assert 4 < largest_change(found) <= 8 and within([one.matched_budget for one in found])


def test_the_four_show_as_many_visual_tokens():
    found = matched([FOUR], "visual_tokens")
    assert [one.options for one in found] == [{}, {"queries": 64}, {"latents": 64}, {}]
    assert (
        [tokens_of(one) for one in costs(found)]
        == [one.matched_budget for one in found]
        == [64] * 4
    )


def test_two_do_as_many_operations():
    grid = "grid=connector.name=eva | connector.name=glu"
    found = matched(["recipe=yivl_llava", grid], "flops")
    assert not found[0].mismatch_reason and not found[1].mismatch_reason
    assert [one.flops for one in costs(found)] == [one.matched_budget for one in found]
    assert within([one.matched_budget for one in found])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("glu", []),
        ("flamingo", []),
        ("mixed", []),
        ("c_abstractor", []),
        ("token_packer", []),
        ("deepstack", []),
        ("cross_attention", []),
        ("instruct_qformer", []),
        ("glu", ["vision.second.name=tiny_eva"]),
        ("flamingo", ["vision.second.name=tiny_eva"]),
    ],
)
def test_counts_are_those_of_the_whole_model(name, words):
    recipe = recipes.load_recipe(["recipe=yivl_llava", f"connector.name={name}", *words])
    sizes = [stage.image_size for stage in recipe.stages.values()]
    (counter,) = cost_counters([GridRow(name, tuple(["recipe=yivl_llava", *words]))])
    whole = count_model_cost(recipe.model, sizes[-1])
    options = recipe.model.connector_options
    built = counter.build_connector(registry.load_connector(name), options)
    counted = {by: count(counter, built) for by, count in BUDGET_COUNTS.items()}
    tokens = {"flamingo": whole.latents, "mixed": whole.tokens + whole.latents}
    tokens["cross_attention"] = whole.latents
    assert tuple(counted) == MATCHABLE_BUDGETS
    assert counted == {
        "params": whole.parameters,
        "visual_tokens": tokens.get(name, whole.tokens),
        "flops": whole.flops,
    }


def test_rows_are_counted_with_the_parts_of_their_init():
    """Its vision encoder is 80 wide and its language model 64, where the recipe's are 128."""
    words = ["recipe=yivl_llava", f"init={CHECKPOINT}"]
    (counter,) = cost_counters([GridRow("a", tuple(words))])
    (shapes,) = {(one.vision_width, one.lm_width) for one in counter.stage_shapes}
    assert shapes == (80, 64)


def test_what_agrees_already_stays_as_it_is():
    found = matched(
        ["recipe=yivl_llava", "grid=connector.norm=true | connector.norm=false"], "params"
    )
    assert [one.options for one in found] == [{}, {}] and not any(
        one.mismatch_reason for one in found
    )
    assert [one.row for one in found] == list(
        parse_grid(["recipe=yivl_llava", "grid=connector.norm=true | connector.norm=false"]).rows
    )


def test_the_same_question_has_the_same_answer():
    words = ["recipe=yivl_llava,yivl_eva"]
    assert matched(words, "params") == matched(words, "params")


def test_options_that_somebody_gave_are_left_alone():
    words = ["recipe=yivl_llava,yivl_qformer", "grid=connector.width=64 + connector.layers=2"]
    with pytest.raises(UserError, match="no option 'width'"):
        parse_grid(words)
    grid = "connector.name=qformer + connector.width=192 | connector.name=llava_mlp"
    qformer, llava = matched(["recipe=yivl_llava", f"grid={grid}"], "params")
    assert "width" not in qformer.options and "connector.width=192" in qformer.row.overrides
    assert within([qformer.matched_budget, llava.matched_budget]) and llava.options
    whole = GridRow("whole", ("recipe=yivl_llava", "connector={name: llava_mlp, depth: 3}"))
    other = GridRow("other", ("recipe=yivl_llava", "connector.mlp_ratio=2"))
    for one in match_rows([whole, other], "params"):
        assert one.options == {}


def test_a_row_that_cannot_is_named_and_the_others_match():
    grid = "grid=connector.name=linear | connector.name=eva | connector.name=qformer"
    linear, eva, qformer = found = matched(["recipe=yivl_llava", grid], "params")
    assert linear.options == {} and within([eva.matched_budget, qformer.matched_budget])
    assert linear.relative_distance == pytest.approx(
        1 - linear.own_budget / max(eva.matched_budget, qformer.matched_budget)
    )
    said = format_match_table(found, "params")[-1]
    assert said == (
        f"cannot: connector.name=linear is {100 * linear.relative_distance:.0f} % off: "
        "connector linear names no sizes"
    )


def drop(folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: str) -> None:
    """Write a connector of somebody's own into the folder where the command is given."""
    (folder / "connectors").mkdir()
    (folder / "connectors/mine.py").write_text(PLAIN.format(sizes=sizes))
    monkeypatch.chdir(folder)


GRID_OF_MINE = "grid=connector.name=mine | connector.name=eva | connector.name=qformer"


def test_somebodys_own_connector_without_sizes_is_left_alone_and_named(tmp_path, monkeypatch):
    drop(tmp_path, monkeypatch, "")
    mine, *others = found = matched(["recipe=yivl_llava", GRID_OF_MINE], "params")
    assert mine.options == {} and within([one.matched_budget for one in others])
    assert "% off: connector mine names no sizes" in format_match_table(found, "params")[-1]


def test_somebodys_own_sizes_are_used(tmp_path, monkeypatch):
    drop(tmp_path, monkeypatch, 'size_options = {"hidden": range(64, 8192, 64)}')
    found = matched(["recipe=yivl_llava", GRID_OF_MINE], "params")
    assert found[0].options["hidden"] > 64 and within([one.matched_budget for one in found])


def test_sizes_must_be_options(tmp_path, monkeypatch):
    drop(tmp_path, monkeypatch, 'size_options = {"hiden": (64, 128)}')
    with pytest.raises(UserError, match="size_options has 'hiden', .* Did you mean 'hidden'"):
        matched(["recipe=yivl_llava", GRID_OF_MINE], "params")


def test_another_budget_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "recipe=yivl_llava", "match=parms"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "vlbench: match must be one of params, visual_tokens, flops, given 'parms'. "
        "Did you mean 'params'?\n"
    )
    assert not list(tmp_path.iterdir())


def test_every_run_gets_what_was_found_and_the_plan_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran: list[tuple[str, ...]] = []

    def train(jobs, count, ready, start, end, run_gpus) -> None:
        for job in jobs:
            ran.append(job.overrides)
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            job.log_file.write_text("vlbench: not today")
            start(job)
            end(job, 1)

    monkeypatch.setattr(compare_command, "train_jobs", train)
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    grid = "grid=connector.name=linear | connector.name=glu | connector.name=eva"
    words = ["recipe=yivl_llava", "seeds=2", "match=params", grid]
    assert main(["compare", *words]) == 1
    assert len(ran) == 6 and not any("match" in word for words in ran for word in words)
    (ratio,) = {word for words in ran for word in words if "mlp_ratio" in word}
    said = capsys.readouterr().out
    assert ratio.removeprefix("connector.") in said
    assert "cannot: connector.name=linear is" in said and "own params" in said


def test_options_that_do_not_fit_are_told_with_their_row():
    words = [
        "recipe=yivl_llava",
        "grid=connector.name=eva + connector.head_width=6 | connector.depth=1",
    ]
    with pytest.raises(UserError, match="row .*head_width=6: connector eva: head_width is 6"):
        matched(words, "params")
