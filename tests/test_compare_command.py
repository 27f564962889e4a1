"""`compare`: the grid, what rows share, what a stopped comparison does, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlbench.__main__ import main
from vlbench.compare.experiment import compare_command, cost_estimate
from vlbench.compare.experiment.design_cautions import describe_design_cautions
from vlbench.compare.experiment.design_power import describe_power
from vlbench.compare.experiment.grid import parse_grid
from vlbench.compare.experiment.shared_stages import common_stages
from vlbench.config import recipe as recipes

SHORT = [f"stages.{name}.global_batch_size=2" for name in ("align_224", "align_448", "chat")]
SHORT += [f"stages.{name}.steps=2" for name in ("align_224", "align_448", "chat")]
SHORT += ["log.questions=6", "log.examples=0", "log.tensorboard=false", "log.every_n_steps=1"]
GRID = (
    "grid=stages.chat.train.language.lora.rank=4 | "
    "stages.chat.train.language.lora.rank=64 + stages.chat.train.language.lr=2e-4 | "
    "stages.chat.train.language.lora=null"
)


def test_recipes_times_alternatives_times_seeds():
    grid = parse_grid(["recipe=yivl_llava,yivl_qformer", "seeds=2", "log.every_n_steps=5"])
    assert [row.name for row in grid.rows] == ["yivl_llava", "yivl_qformer"]
    assert grid.seeds == (0, 1) and grid.rows[1].overrides_for_seed(1)[-1] == "seed=1"
    assert "log.every_n_steps=5" in grid.rows[0].overrides
    grid = parse_grid(["recipe=yivl_llava", "seeds=[3,5]", GRID])
    assert [row.name for row in grid.rows] == [
        "lora.rank=4",
        "lora.rank=64_language.lr=2e-4",
        "language.lora=null",
    ]
    assert grid.seeds == (3, 5)


def test_rows_that_are_spelt_alike_in_names_of_folders_are_told_apart(tmp_path):
    words = ["recipe=yivl_llava", "grid=data.val=模型.json | data.val=数据.json"]
    names = [row.name for row in parse_grid(words).rows]
    assert len({*names}) == 2 and names[1] == f"{names[0]}-2"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        recipe = recipes.load_recipe(
            ["recipe=yivl_llava", f"connector.depth={'ab'.index(folder) + 1}"]
        )
        recipes.save_recipe(recipe, tmp_path / folder / "my.yaml")
    grid = parse_grid([f"recipe={tmp_path}/a/my.yaml,{tmp_path}/b/my.yaml"])
    assert [row.name for row in grid.rows] == ["my", "my-2"]


def test_a_grid_may_be_a_file(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "rows:\n- {connector.depth: 1}\n- {connector.depth: 2, connector.norm: false}\n"
    )
    grid = parse_grid(["recipe=yivl_llava", f"grid={file}"])
    assert [row.name for row in grid.rows] == [
        "connector.depth=1",
        "connector.depth=2_connector.norm=false",
    ]


def test_a_file_may_give_whole_mappings(tmp_path):
    file = tmp_path / "grid.yaml"
    tiling = '{tiles: 2, thumbnail: false, tags: "none", max_views: null}'
    file.write_text(f"rows:\n- vision.tiling: {tiling}\n- vision.tiling: null\n")
    first, second = parse_grid(["recipe=yivl_llava", f"grid={file}"]).rows
    found = recipes.load_recipe(first.overrides_for_seed(0)).vision.tiling
    assert (found.tiles, found.thumbnail, found.tags, found.max_views) == (2, False, "none", None)
    assert recipes.load_recipe(second.overrides_for_seed(0)).vision.tiling is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare needs recipe=NAME"),
        (["recipe=yivl_lava"], "Did you mean 'yivl_llava'"),
        (["recipe=yivl_llava", "seeds=0"], "seeds is 0; allowed are 1 to 1000"),
        (["recipe=yivl_llava", "seeds=two"], "seeds is 'two'"),
        (["recipe=yivl_llava", "seeds=[0,1"], "seeds is '[0,1'"),
        (["recipe=yivl_llava", f"seeds=[{','.join('0' * 1001)}]"], "allowed are 1 to 1000"),
        (["recipe=yivl_llava", "seeds=[{a: 1, a: 2}]"], "seeds is '[{a: 1, a: 2}]'"),
        (["recipe=yivl_llava", f"seeds=[{'9' * 5000}]"], "(5,002 characters)"),
        (["recipe=yivl_llava", "tasks=own", "tasks.own.limit=5"], "log.questions=NUMBER"),
        (["recipe=yivl_llava", "seed=1"], "seed is not for compare: give seeds=NUMBER"),
        (["recipe=yivl_llava", "init=x"], "grid='init=RUN' for all of them"),
        (["recipe=yivl_llava", "grid=seed=1 | seed=2"], "seed is not for compare"),
        (["recipe=yivl_llava", "grid=run=a | connector.depth=1"], "run is not for compare"),
        (["recipe=yivl_llava", "jobs=0"], "jobs is '0'; allowed are 1 to 1000, auto"),
        (["recipe=yivl_llava", "sweep=2"], "sweep is '2'; wanted are factors"),
        (["recipe=yivl_llava", "sweep=1,x"], "sweep is '1,x'; wanted are factors"),
        (["recipe=yivl_llava", "sweep.langage=1,2"], "Did you mean 'language'?"),
        (["recipe=yivl_llava", "sweep.language=1"], "sweep.language is '1'; wanted are factors"),
        (["recipe=yivl_llava", "sweep=1,2", "sweep.connector=1,3"], "sweep is sweep.connector"),
        (["recipe=yivl_llava", "sweep.vision=1,2", "sweep.vision=1,3"], "is given twice, as '1,2'"),
        (
            ["recipe=yivl_llava", "sweep=1,2", "seeds=[4000000000]"],
            "belongs to the trials of sweep",
        ),
        (
            ["recipe=yivl_llava", "freeze=vision", "sweep.vision=1,2"],
            "row yivl_llava: no stage trains the vision",
        ),
        (["recipe=yivl_llava", "match_limit=8"], "match_limit= is of match=, which is not given"),
        (
            ["recipe=yivl_llava", "grid=connector.depth=2 | connector.norm=true"],
            "are the same experiment: their recipes are equal in every key",
        ),
        (
            ["recipe=yivl_llava", "grid=trainer.devices=1 | trainer.devices=2 + log.wandb=x"],
            "the same experiment: what differs (trainer.devices, log.wandb) is how a run is made",
        ),
        (["recipe=yivl_llava", "freeze=language"], "freeze must be vision"),
        (["recipe=yivl_llava", "dry_run=yes"], "dry_run must be true or false, given 'yes'"),
        (["recipe=yivl_llava", "grid=connector.dept=1 | connector.depth=2"], "'depth'"),
        (["recipe=yivl_llava", "grid=connector.depth"], "which is not KEY=VALUE"),
        (["recipe=yivl_llava", "grid=connector.depth=1 | | a=1"], "alternative 2 holds nothing"),
        (["recipe=yivl_llava,yivl_llava"], "two rows are the same: yivl_llava"),
        (["recipe=yivl_llava", "grid=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_stages_are_alike_until_something_differs():
    def one(*words: str) -> recipes.Recipe:
        return recipes.load_recipe(["recipe=yivl_llava", *words])

    assert common_stages(one(), one("stages.chat.steps=3")) == ["align_224", "align_448"]
    assert common_stages(one(), one("stages.align_448.steps=3")) == ["align_224"]
    assert (
        common_stages(
            one(), one("run=x", "log.every_n_steps=3", "trainer.keep_last_checkpoints=9")
        )[-1]
        == "align_448"
    )
    for word in ("connector.depth=1", "seed=1", "precision=bf16", "vision.layer=-1"):
        assert common_stages(one(), one(word)) == []
    assert common_stages(one(), one("activation_checkpointing=full")) == []  # other last bits
    assert common_stages(one("only=chat"), one()) == []
    assert common_stages(one("only=[align_224,chat]"), one()) == ["align_224"]
    assert common_stages(one(), one("only=align_224")) == ["align_224"]
    assert common_stages(one("from=align_448"), one("only=[align_448,chat]")) == ["align_448"]


def test_rows_that_will_be_asked_about_different_data_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "held.json"):
        Path(name).write_text("[]")
    words = ["recipe=yivl_llava", "grid=data.train=a.json | data.train=b.json", "run=c"]
    cautions = describe_design_cautions(parse_grid(words))
    told = "rows are asked about different data: a.json (data.train=a.json), b.json (data.train=b"
    assert any(told in one for one in cautions)
    held = describe_design_cautions(parse_grid([*words, "data.val=held.json"]))
    assert not any("asked" in one for one in held)


@pytest.fixture
def no_probe(monkeypatch):
    """Start at once: what a run takes is not tried."""
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)


def test_the_plan_says_what_the_runs_will_take_and_tries_that_once(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "recipe=yivl_llava", "seeds=2", "run=c", *SHORT]
    words += ["grid=connector.depth=2 | connector.depth=1 + trainer.accelerator=mps"]
    monkeypatch.setattr(compare_command, "_train_unfinished", lambda *_: {})
    assert main(words) == 0
    said = capfd.readouterr()
    cost = r"connector.depth=2: 2 runs to go, \d+ s and [\d.]+ GB each"
    assert re.search(cost, said.out) and re.search(r"about \d+ s in all with jobs=\d", said.out)
    assert "trainer.accelerator=mps: cannot be run: " in said.err
    assert "a seed changes which scenes are rendered" in said.out
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"plan.json", "command.txt"}
    assert "'grid=connector.depth=2 |" in (tmp_path / "c/command.txt").read_text()
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: pytest.fail("tried again"))
    assert main([*words, "dry_run=true"]) == 0
    monkeypatch.setattr(cost_estimate, "_probe_run", lambda *_: None)
    words[3] = "run=other"
    assert main([*words, "dry_run=true"]) == 0 and not (tmp_path / "other").exists()
    (tmp_path / "other").write_text("a file")
    assert main(words) == 2 and "run=other cannot be written" in capfd.readouterr().err


def test_what_seeds_could_tell_is_said_before_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = parse_grid(["recipe=yivl_llava,yivl_qformer,yivl_eva", "seeds=4", "run=c"])
    first, *lines = describe_power(grid)
    assert "after Holm's correction over 3 pairs, with 1,800 questions" in first
    assert re.search(r"points with 3 seeds, .* 4 seeds, .* 5 seeds, .* 10 seeds", lines[0])
    for seed, accuracy in ((0, 0.9), (1, 0.7)):
        folder = grid.run_folder(grid.rows[0], seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"accuracy": accuracy}))
    measured = describe_power(grid)
    assert "80 % right (of the finished runs)" in measured[0] and "spread by 14.1" in measured[1]
    alone = parse_grid(["recipe=yivl_llava", "seeds=4"])
    assert describe_power(alone) == []


@pytest.mark.slow
def test_a_sweep_comes_first_and_is_reported(tmp_path, monkeypatch, capfd, no_probe):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "recipe=yivl_llava", "seeds=1", "run=c", "sweep=1,0.5", "freeze=vision"]
    assert main([*words, *SHORT, "jobs=2", "only=chat"]) == 0
    said = capfd.readouterr().out
    assert said.index("[2/2] yivl_llava, rate x 0.5: accuracy") < said.index("[1/1] yivl_llava")
    report = (tmp_path / "c/report.md").read_text()
    assert re.search(r"yivl_llava x 1 [\d.]+, x 0.5 [\d.]+: x (1|0.5) is taken", report)
    assert "The vision encoder is frozen in every stage of every row." in report
    assert "is taken" in (tmp_path / "c/report.html").read_text()
    assert len(list((tmp_path / "c/features").rglob("*.safetensors"))) >= 1
    capfd.readouterr()
    assert main(["report", "c"]) == 0  # the trials are no rows
    assert "Rows: 1; seeds: 0" in capfd.readouterr().out


def test_rows_share_stages_and_a_second_call_repeats_nothing(
    tmp_path, monkeypatch, capfd, no_probe
):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "recipe=yivl_llava", "seeds=1", GRID, "run=c", *SHORT]
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "3 rows x 1 seeds = 3 runs, 0 of them finished" in said
    assert said.count("align_224, align_448 as in lora.rank=4; trains") == 2
    assert "| `stages.chat.train.language.lr` |" in said
    report = (tmp_path / "c/report.md").read_text()
    assert report.startswith("# Comparison") and "p " in report
    assert "lora.rank=64" in (tmp_path / "c/report.html").read_text()
    header, *rows = (tmp_path / "c/language.lora=null/seed0/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows].count("align_224") == 2
    assert main(words) == 0
    said = capfd.readouterr().out
    assert said.count("done before") == 3 and "trains" not in said

    alone = ["fit", "recipe=yivl_llava", "stages.chat.train.language.lora=null", *SHORT]
    assert main([*alone, "run=alone"]) == 0
    one, other = (
        next((tmp_path / folder / "checkpoints").glob("2-chat-000002")) / "model.safetensors"
        for folder in ("alone", "c/language.lora=null/seed0")
    )
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_failed_run_is_named_and_does_not_sink_the_rest(tmp_path, monkeypatch, capfd, no_probe):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c/linear/seed0").mkdir(parents=True)
    (tmp_path / "c/linear/seed0/mine.txt").write_text("somebody's")
    words = ["recipe=yivl_llava", "seeds=1", "run=c", *SHORT]
    grid = "grid=connector.name=linear | connector.name=avgpool"
    (tmp_path / "c/linear").rename(tmp_path / "c/connector.name=linear")
    (tmp_path / "c/command.txt").write_text("python -m vlbench compare recipe=yivl_llava\n")
    assert main(["compare", *words, grid]) == 1
    captured = capfd.readouterr()
    assert "failed: run=c/connector.name=linear/seed0 is a folder with other things" in captured.err
    assert "## Failed" in (tmp_path / "c/report.md").read_text()
    assert (tmp_path / "c/connector.name=avgpool/seed0/results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_comparison_goes_on(kill, tmp_path):
    words = [sys.executable, "-m", "vlbench", "compare", "recipe=yivl_llava,yivl_qformer"]
    words += ["seeds=1", "run=c", *SHORT[:-5], "stages.chat.steps=30", *SHORT[-4:]]
    process = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "c/yivl_llava/seed0.log"
    while not (log.is_file() and "chat 3/" in log.read_text()):
        time.sleep(0.2)
    process.send_signal(kill)
    assert process.wait(timeout=60) == (130 if kill != signal.SIGKILL else -signal.SIGKILL)
    time.sleep(5)  # the run saves and ends, whatever became of the comparison
    assert "stopped by" in log.read_text()
    subprocess.run(words, cwd=tmp_path, check=True)
    assert "resuming" in log.read_text()
    for name in ("yivl_llava", "yivl_qformer"):
        assert json.loads((tmp_path / f"c/{name}/seed0/results.json").read_text())
    assert Path(tmp_path / "c/report.md").is_file()
