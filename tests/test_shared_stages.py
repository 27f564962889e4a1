"""What a run takes over from another whose first stages are its own."""

from __future__ import annotations

import contextlib
import json

from vlbench.compare.experiment import grid as grids
from vlbench.compare.experiment.shared_stages import copy_shared_stages, find_shared_stages
from vlbench.config import recipe as recipes
from vlbench.data.data_checksums import DATA_KEYS
from vlbench.train.run_folder import RunFolder, open_run


def test_the_data_of_shared_stages_is_recorded_as_the_runs_own(tmp_path, monkeypatch):
    """Else the later run would go on over other records behind the same path."""
    monkeypatch.chdir(tmp_path)
    words = ["recipe=yivl_llava", "seeds=1", "run=c"]
    grid = grids.parse_grid([*words, "grid=stages.chat.steps=2 | stages.chat.steps=3"])
    first, later = grid.rows
    recipe = recipes.load_recipe([*first.overrides_for_seed(0), f"run={grid.run_folder(first, 0)}"])
    with contextlib.ExitStack() as held_locks:
        source = open_run(recipe, held_locks)
    recorded = {key: {"a.json": f"{key} of the first run"} for key in DATA_KEYS}
    source.record_versions({**recorded, "max_tokens_per_row": {"align_224": 512}})
    for name in ("0-align_224-000002", "1-align_448-000002", "2-chat-000002"):
        (source.checkpoints_folder / name).mkdir()
    (source.folder / "metrics.csv").write_text("stage\n")
    source.results_file.write_text(json.dumps({}))

    shared = find_shared_stages(grid)
    assert list(shared) == [later.name]
    said = copy_shared_stages(grid, later, 0, shared[later.name])
    assert said == f"align_224, align_448 as in {first.name}"
    copied = RunFolder(grid.run_folder(later, 0))
    versions = copied.read_versions()
    assert {key: versions[key] for key in DATA_KEYS} == recorded
    assert "max_tokens_per_row" not in versions
    assert sorted(path.name for path in copied.checkpoints_folder.iterdir()) == [
        "0-align_224-000002",
        "1-align_448-000002",
    ]
