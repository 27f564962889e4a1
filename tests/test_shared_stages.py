"""What a run takes over from another whose first stages are its own."""

from __future__ import annotations

import contextlib
import json

from golden_release import make_plain_llava

from vlbench.__main__ import main
from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.grid import ComparisonGrid
from vlbench.compare.experiment.shared_stages import copy_shared_stages, find_shared_stages
from vlbench.config import recipe as recipes
from vlbench.data.data_checksums import DATA_KEYS
from vlbench.train.resume import load_recipe_with_init
from vlbench.train.run_folder import RunFolder, open_run


def finish_first_run(grid: ComparisonGrid) -> RunFolder:
    """Write the folder of the first row's run, as if its three stages had been trained."""
    first = grid.rows[0]
    words = [*first.overrides_for_seed(0), f"run={grid.run_folder(first, 0)}"]
    with contextlib.ExitStack() as held_locks:
        source = open_run(load_recipe_with_init(words), held_locks)
    for name in ("0-align_224-000002", "1-align_448-000002", "2-chat-000002"):
        (source.checkpoints_folder / name).mkdir()
    (source.folder / "metrics.csv").write_text("stage\n")
    source.results_file.write_text(json.dumps({}))
    return source


def test_the_data_of_shared_stages_is_recorded_as_the_runs_own(tmp_path, monkeypatch):
    """Else the later run would go on over other records behind the same path."""
    monkeypatch.chdir(tmp_path)
    words = ["recipe=yivl_llava", "seeds=1", "run=c"]
    grid = grids.parse_grid([*words, "grid=stages.chat.steps=2 | stages.chat.steps=3"])
    later = grid.rows[1]
    source = finish_first_run(grid)
    recorded = {key: {"a.json": f"{key} of the first run"} for key in DATA_KEYS}
    source.record_versions({**recorded, "max_tokens_per_row": {"align_224": 512}})
    shared = find_shared_stages(grid)
    assert list(shared) == [later.name]
    said = copy_shared_stages(grid, later, 0, shared[later.name])
    assert said == f"align_224, align_448 as in {grid.rows[0].name}"
    copied = RunFolder(grid.run_folder(later, 0))
    versions = copied.read_versions()
    assert {key: versions[key] for key in DATA_KEYS} == recorded
    assert "max_tokens_per_row" not in versions
    assert sorted(path.name for path in copied.checkpoints_folder.iterdir()) == [
        "0-align_224-000002",
        "1-align_448-000002",
    ]


def test_a_run_that_takes_over_stages_goes_on_as_its_init_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_plain_llava(tmp_path / "source")
    words = [f"model={source}", "out=own", "format=vlbench", "template=llava_v1"]
    assert main(["export", *words]) == 0
    words = ["recipe=yivl_llava", "connector.norm=false", "seeds=1", "run=c"]
    rows = "grid=init=own + stages.chat.steps=2 | init=own + stages.chat.steps=3"
    grid = grids.parse_grid([*words, rows])
    finish_first_run(grid)
    shared = find_shared_stages(grid)
    for row in grid.rows:
        copy_shared_stages(grid, row, 0, shared.get(row.name))
        recipe = recipes.load_recipe_file(grid.run_folder(row, 0) / "recipe.yaml")
        assert recipe.language.template == "llava_v1"
    # the recipe's own template, which is not that of init
    rows = "grid=init=own + stages.chat.steps=2 | init=own + language.template=yi_vl"
    grid = grids.parse_grid([*words, rows])
    assert find_shared_stages(grid) == {}
