"""`data.mix=FILE.yaml`: what a file of sources may say, and one line for each of its mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlbench.config import recipe as recipes
from vlbench.config.data_schema import mixture_files, parse_sampling, read_mixture
from vlbench.data.annotation_mapping import read_mapping
from vlbench.data.mapped_sources import mapping_files
from vlbench.errors import UserError
from vlbench.text_files import read_yaml
from vlbench.train.stage_plan import plan_stage_runs

OURS = """
cap: 500
sources:
  - {train: a.json, weight: 2, cap: 7}
  - train: b.json
    images: pictures
    sampling: random:10%
    prompts: [Say it., 说一说。]
    needs: b of somewhere
"""
ONE_VISION = """
datasets:
  - json_path: a.json
    sampling_strategy: "first:1000"
  - json_path: b.jsonl
    sampling_strategy: end:10%
  - json_path: c.json
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolve(*words: str) -> recipes.Recipe:
    return recipes.load_recipe(["recipe=yivl_llava", *words])


def plan(*words: str) -> None:
    recipe = resolve(*words)
    plan_stage_runs(recipe.selected_data, recipe.last_stage_data)


def write_records(name: str, count: int = 3) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    Path(name).write_text(json.dumps([{"conversations": turns}] * count))


def test_a_file_gives_its_sources_and_their_settings(folder: Path) -> None:
    (folder / "mix.yaml").write_text(OURS, encoding="utf-8")
    data = resolve("data.mix=mix.yaml").data
    assert data.train is None and data.mix is not None
    first, second = data.mix
    assert (first.train, first.weight, first.cap, first.sampling) == ("a.json", 2.0, 7, "all")
    assert (second.images, second.sampling, second.cap) == ("pictures", "random:10%", 500)
    assert second.prompts == ("Say it.", "说一说。") and second.needs == "b of somewhere"


def test_the_file_of_llava_onevision_is_read_as_it_is(folder: Path) -> None:
    (folder / "mix.yaml").write_text(ONE_VISION)
    mix = resolve("data.mix=mix.yaml").data.mix
    assert mix is not None
    assert [(one.train, one.sampling) for one in mix] == [
        ("a.json", "first:1000"),
        ("b.jsonl", "end:10%"),
        ("c.json", "all"),
    ]


def test_a_run_keeps_the_sources_and_needs_no_file(folder: Path) -> None:
    (folder / "mix.yaml").write_text(OURS, encoding="utf-8")
    recipe = resolve("data.mix=mix.yaml")
    recipes.save_recipe(recipe, folder / "kept.yaml")
    (folder / "mix.yaml").unlink()
    assert recipes.load_recipe_file(folder / "kept.yaml") == recipe


def test_every_stage_may_have_its_own(folder: Path) -> None:
    (folder / "one.yaml").write_text("sources: [{train: one.json}]")
    (folder / "two.yaml").write_text("sources: [{train: two.json}]")
    recipe = resolve("data.mix=one.yaml", "stages.chat.data.mix=two.yaml", "data.workers=3")
    mixes = {name: recipe.stage_data(name).config for name in recipe.stages}
    assert {name: data.mix[0].train for name, data in mixes.items() if data.mix} == {
        "align_224": "one.json",
        "align_448": "one.json",
        "chat": "two.json",
    }
    assert mixes["chat"].workers == 3
    recipe = resolve("data.mix=one.yaml", "stages.chat.data.train=scenes")
    assert recipe.stage_data("chat").config.mix is None


def test_the_shipped_mixtures_are_found_by_name_and_by_path_from_any_folder() -> None:
    names = [f"yi_vl_stage{number}" for number in (1, 2, 3)]
    assert names == list(mixture_files())
    for name in names:
        assert read_mixture(name) == read_mixture(f"recipes/data/{name}.yaml")
    assert not set(names) & set(mapping_files())
    assert {source.cap for source in read_mixture("yi_vl_stage3")} == {50_000}


def test_a_file_that_cannot_be_read_hides_no_mixture(folder: Path) -> None:
    (folder / "recipes/data").mkdir(parents=True)
    (folder / "recipes/data/mine.yaml").write_text("sources: [{train: a.json}]")
    (folder / "recipes/data/broken.yaml").write_bytes(b"sources: \xff")
    assert {"mine", "yi_vl_stage1"} <= mixture_files().keys()
    assert "broken" in mapping_files()  # which says why


def test_the_shipped_mixtures_say_what_every_source_needs() -> None:
    for file in mixture_files().values():
        for source in read_yaml(file)["sources"]:
            name, _, place = source["train"].partition(":")
            assert "data/" in source["needs"] and "https://" in source["needs"]
            if place:  # a mapping of annotation files, whose files are named
                mapping = read_mapping(mapping_files()[name])
                split = next(iter((mapping.splits or {}).values()), ("",))[0]
                assert Path(mapping.records.replace("{split}", split)).name in source["needs"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: [{train: a, wieght: 1}]", "unknown key 'sources[0].wieght'"),
        ("sources: [{train: a, wieght: 1}]", "Did you mean 'weight'?"),
        ("sources: [{train: a}]\nkap: 3", "unknown key 'kap'; a mixture takes: sources, cap."),
        ("sources: [{train: a, weight: 0}]", "sources[0].weight must be above 0, given 0"),
        ("sources: [{train: a, weight: -1}]", "sources[0].weight must be above 0, given -1"),
        ("sources: [{train: a, cap: 0}]", "sources[0].cap must be at least 1, given 0"),
        ("sources: [{train: a}]\ncap: 0", "cap must be at least 1, given 0"),
        ("sources: [{weight: 1}]", "sources[0].train is missing"),
        ("sources: []", "sources must be a list of at least 1"),
        ("sources: a.json", "sources must be a list"),
        ("sources: [a.json]", "sources[0] must be a mapping"),
        ("cap: 3", "sources is missing"),
        ("sources: [{train: a, sampling: some}]", "sources[0].sampling must be all, first:N"),
        ("sources: [{train: a, sampling: 'first:0'}]", "given 'first:0'"),
        ("sources: [{train: a, sampling: 'random:101%'}]", "given 'random:101%'"),
        ("sources: [{train: a, sampling: '0%'}]", "given '0%'"),
        ("sources: [{train: a, sampling: 5}]", "sources[0].sampling must be text, given 5"),
        ("sources: [{train: a, prompts: []}]", "sources[0].prompts must be a list of at least 1"),
        ("sources: [{train: a, prompts: ['<image> Say it.']}]", "has <image> in it"),
        ("sources: [{train: a, prompts: [' ']}]", "sources[0].prompts[0] is empty"),
        ("datasets: [{json_path: a, sampling: 'first:2'}]", "unknown key 'datasets[0].sampling'"),
        ("datasets: [{sampling_strategy: all}]", "datasets[0].json_path is missing"),
        ("datasets: [{json_path: a}]\nsources: [{train: a}]", "unknown key 'sources'"),
        ("records: a.json\nanswer: b", "is no mixture, its keys are records, answer; expected"),
        ("[1, 2]", "is not a mapping"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(folder: Path, text: str, words: str) -> None:
    (folder / "mix.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        read_mixture("mix.yaml")
    assert len(raised.value.lines) == 1, raised.value.lines
    assert raised.value.lines[0].startswith("mix.yaml") and words in raised.value.lines[0]


def test_all_mistakes_are_told_at_once(folder: Path) -> None:
    (folder / "mix.yaml").write_text("sources: [{train: a, cap: 0}, {train: b, weight: 0}]")
    with pytest.raises(UserError) as raised:
        resolve("data.mix=mix.yaml", "stages.chat.data.mix=mixx.yaml")
    assert len(raised.value.lines) == 3
    assert "stages.chat.data.mix=mixx.yaml: there is no such file" in str(raised.value)


def test_train_and_mix_are_not_both_given(folder: Path) -> None:
    (folder / "mix.yaml").write_text("sources: [{train: a.json}]")
    with pytest.raises(UserError, match="takes train or mix, not both"):
        resolve("data.mix=mix.yaml", "data.train=a.json")


def test_everything_that_is_missing_is_named_at_once_with_what_it_needs(
    folder: Path,
) -> None:
    write_records("here.json")
    (folder / "one.yaml").write_text(
        "sources: [{train: lost_file.json, needs: gone of there}, {train: here.json}, "
        "{train: here.json, images: nowhere, needs: pictures}]"
    )
    (folder / "two.yaml").write_text("sources: [{train: 'vqav2:lost', needs: lost of there}]")
    words = ["stages.align_224.data.mix=one.yaml", "stages.align_448.data.mix=one.yaml"]
    with pytest.raises(UserError) as raised:
        plan(*words, "stages.chat.data.mix=two.yaml")
    assert list(raised.value.lines) == [
        "data lost_file.json: there is no such file. It needs: gone of there",
        "data here.json: images: there is no folder nowhere. It needs: pictures",
        "data vqav2:lost: lost is no folder. It needs: lost of there",
    ]


def test_an_empty_source_and_prompts_without_a_question_are_one_line_each(
    folder: Path,
) -> None:
    (folder / "empty.json").write_text("[]")
    write_records("here.json")
    mix = "data.mix=[{train: empty.json}, {train: here.json, prompts: [Say it.]}]"
    with pytest.raises(UserError) as raised:
        plan("only=align_224", mix)
    empty, prompts = raised.value.lines
    assert "empty.json" in empty and "no record" in empty
    assert "data here.json: has prompts, and stage align_224 learns captions" in prompts


@pytest.mark.parametrize(
    ("text", "total", "count"),
    [
        ("first:1000", 30, 30),
        ("first:7", 30, 7),
        ("end:10%", 31, 4),  # rounded up, as LLaVA-OneVision's code does
        ("random:0.1%", 12_345, 13),
        ("50%", 3, 2),
        ("random:100%", 3, 3),
        ("random:1%", 1, 1),
    ],
)
def test_sampling_counts(text: str, total: int, count: int) -> None:
    sampling = parse_sampling(text)
    assert sampling is not None and sampling.count_of(total) == count
