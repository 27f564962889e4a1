"""What makes a row: runs that trained the same are its seeds, wherever and however they ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_report_command import run

from vlbench.compare.report.analysis import analyze_runs
from vlbench.compare.report.finished_runs import ComparisonArm, load_finished_run
from vlbench.compare.report.row_groups import differing_keys, group_into_arms
from vlbench.config import recipe as recipes
from vlbench.data.data_checksums import checksum_sources
from vlbench.data.data_sources import open_stage_sources

CALLBACK = "lightning.pytorch.callbacks.Timer"


def rows_of(*folders: Path) -> list[ComparisonArm]:
    return group_into_arms([load_finished_run(folder) for folder in folders])


@pytest.mark.parametrize(
    "words",
    [
        ["only=chat"],
        ["only=[align_224,chat]"],
        ["from=chat"],
        ["language.max_length=190"],
        ["data.decode=draft"],
        ["precision=bf16"],
    ],
)
def test_another_training_is_another_row(words, tmp_path):
    rows = rows_of(run(tmp_path / "a", 0.8, 0), run(tmp_path / "b", 0.8, 1, *words))
    assert [row.seeds for row in rows] == [(0,), (1,)]


@pytest.mark.parametrize(
    "words",
    [
        ["only=[align_224,align_448,chat]"],
        ["from=align_224"],
        ["trainer.devices=4", "trainer.strategy=ddp", "trainer.checkpoint_every=9"],
        ["trainer.feature_cache=somewhere", "trainer.compile=true"],
        ["activation_checkpointing=full", "stages.chat.max_tokens_per_row=4096"],
        ["data.workers=3", "stages.chat.data.workers=2", "stages.chat.data.train=scenes"],
        ["data.on_bad_sample=quarantine", "trust_connector=true"],
        ["log.every_n_steps=3", "log.wandb=x", "log.tensorboard=false"],
    ],
)
def test_how_and_where_a_run_was_made_is_no_row(words, tmp_path):
    first = ["stages.chat.data.train=scenes"] if len(words) == 3 and "data" in words[0] else []
    (row,) = rows_of(run(tmp_path / "a", 0.8, 0, *first), run(tmp_path / "b", 0.8, 1, *words))
    assert row.seeds == (0, 1) and row.name == "llava_mlp"


def test_only_and_from_that_choose_the_same_stages_are_one_row_and_named(tmp_path):
    whole, chat = rows_of(
        run(tmp_path / "a", 0.8, 0),
        run(tmp_path / "b", 0.8, 0, "only=chat"),
        run(tmp_path / "c", 0.8, 1, "from=chat", "stages.align_224.steps=3"),
    )
    assert (whole.name, chat.name) == ("all stages", "only=chat") and chat.seeds == (0, 1)
    assert differing_keys([whole, chat]) == ["only"]


QFORMER, BLIP2 = ["recipe=yivl_qformer"], ["recipe=yivl_blip2"]
RATE = "stages.align_224.train.connector.lr"


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (
            [QFORMER, BLIP2],
            ["stages=align_224,align_448,chat", "stages=blip2,align_224,align_448,chat"],
        ),
        (
            [[], QFORMER, BLIP2],
            [
                "llava_mlp stages=align_224,align_448,chat",
                "qformer stages=align_224,align_448,chat",
                "qformer stages=blip2,align_224,align_448,chat",
            ],
        ),
        (
            [[f"{RATE}=1e-3"], [f"{RATE}=2e-3"], ["only=chat"]],
            ["all stages lr=0.001", "all stages lr=0.002", "only=chat"],
        ),
    ],
)
def test_rows_whose_stages_differ_have_names_of_their_own(rows, names, tmp_path):
    folders = [run(tmp_path / f"{at}", 0.8, 0, *words) for at, words in enumerate(rows)]
    arms = rows_of(*folders)
    assert [arm.name for arm in arms] == names
    assert differing_keys(arms)


def test_a_seed_that_is_not_compared_may_have_been_asked_less(tmp_path):
    folders = [
        run(tmp_path / f"{at}", 0.8, seed, *words)
        for at, (seed, words) in enumerate([(0, []), (1, []), (1, ["connector.depth=1"])])
    ]
    answers = (folders[0] / "answers.jsonl").read_text().splitlines()[:5]
    (folders[0] / "answers.jsonl").write_text("\n".join(answers))
    found = analyze_runs([load_finished_run(folder) for folder in folders])
    assert found.seeds == [1] and len(found.question_ids) == 300


def test_callbacks_may_change_weights(tmp_path):
    words = [f"trainer.callbacks=[{CALLBACK}]"]
    assert len(rows_of(run(tmp_path / "a", 0.8, 0), run(tmp_path / "b", 0.8, 1, *words))) == 2


def record(folder: Path, **versions: object) -> None:
    (folder / "versions.json").write_text(json.dumps(versions))


def test_data_are_what_the_file_held_and_not_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number, path in enumerate(("one.json", str(tmp_path / "copy.json"), "one.json")):
        Path(path).write_text(json.dumps([{"id": "x"}] * (1 if number < 2 else 5)))
        words = [f"data.train={path}", f"data.images={('images', tmp_path / 'images')[number % 2]}"]
        folder = run(tmp_path / f"r{number}", 0.8, number, *words)
        recipe = recipes.load_recipe_file(folder / "recipe.yaml")
        ((source, _),) = open_stage_sources(recipe.stage_data("chat"))
        record(folder, data=checksum_sources([source]))
    rows = rows_of(*(tmp_path / f"r{number}" for number in range(3)))
    assert [row.seeds for row in rows] == [(0, 1), (2,)]
    assert rows[0].name != rows[1].name


def test_a_connector_of_ones_own_is_its_source(tmp_path):
    for number, text in enumerate(("a", "a", "b")):
        folder = run(tmp_path / f"r{number}", 0.8, number)
        (folder / "connector").mkdir()
        (folder / "connector/source.json").write_text(json.dumps({"sha256": text * 64}))
    rows = rows_of(*(tmp_path / f"r{number}" for number in range(3)))
    assert [row.seeds for row in rows] == [(0, 1), (2,)] and rows[0].name != rows[1].name


def test_an_init_is_what_it_trained(tmp_path):
    for seed in range(3):
        words = ["only=[align_224,align_448]"]
        words += ["stages.align_448.steps=3"] if seed == 2 else []
        begun = run(tmp_path / f"begun{seed}", 0.5, seed, *words)
        run(tmp_path / f"r{seed}", 0.8, seed, "only=chat", f"init={begun}")
    rows = rows_of(*(tmp_path / f"r{seed}" for seed in range(3)))
    assert [row.seeds for row in rows] == [(0, 1), (2,)]
