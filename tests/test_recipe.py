"""Recipes: layers, strictness, values of the command line, resuming, and every shipped recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.config import recipe as recipes
from vlbench.config.key_table import key_rows
from vlbench.config.recipe import (
    load_recipe,
    load_recipe_file,
    recipe_to_yaml,
    save_recipe,
    to_plain,
)
from vlbench.config.recipe_files import recipe_files, size_files
from vlbench.config.schema import Recipe
from vlbench.errors import UserError
from vlbench.listing import file_summary
from vlbench.text_files import read_yaml
from vlbench.train.run_folder import recipe_differences

LLAVA = {"name": "llava_mlp", "depth": 2, "norm": True, "mlp_ratio": 1.0}
OWN = """# python -m vlbench fit recipe=own
# A recipe of one's own.
connector: {name: llava_mlp, depth: 3}
stages:
  only_one:
    image_size: 56
    sample_format: chat
    train: {connector: {lr: 1e-3}}
    global_batch_size: 4
    epochs: 1
"""


def llava(*words: str) -> Recipe:
    """Load the main recipe with more words."""
    return load_recipe(["recipe=yivl_llava", *words])


def mistakes(*words: str) -> list[str]:
    """Return the lines that loading the main recipe with more words raises."""
    with pytest.raises(UserError) as caught:
        llava(*words)
    return str(caught.value).splitlines()


def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = OWN) -> None:
    """Work in a folder that has `recipes/own.yaml`."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("size", size_files())
@pytest.mark.parametrize("name", recipe_files())
def test_every_recipe_loads_at_every_size_and_survives_its_copy(name, size, tmp_path):
    recipe = load_recipe([f"recipe={name}", f"size={size}"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe_file(tmp_path / "recipe.yaml") == recipe
    assert recipe.size == size and recipe.stages


def test_every_stage_of_a_size_belongs_to_some_recipe():
    known = {stage for path in recipe_files().values() for stage in read_yaml(path)["stages"]}
    for path in size_files().values():
        assert set(read_yaml(path).get("stages", {})) <= known, path


def test_first_line_of_every_recipe_is_its_command_and_the_next_says_what_it_is():
    for name, path in recipe_files().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# python -m vlbench fit recipe={name}"
        assert file_summary(path)


def test_published_numbers_at_full_size():
    for size, language in (("6b", "yi-6b"), ("34b", "yi-34b")):
        recipe = llava(f"size={size}")
        stages = recipe.stages
        assert (recipe.vision.name, recipe.language.name) == ("ViT-H-14", language)
        assert [s.image_size for s in stages.values()] == [224, 448, 448]
        assert [s.global_batch_size for s in stages.values()] == [4096, 4096, 256]
        assert [s.grad_clip for s in stages.values()] == [0.5, 0.5, 1.0]
        assert [s.epochs for s in stages.values()] == [1, 1, 2]
        assert [list(s.train) for s in stages.values()] == [["vision", "connector"]] * 2 + [
            ["vision", "connector", "language"]
        ]
        assert {how.lr for how in stages["chat"].train.values()} == {2e-5}
        assert {how.lr for how in stages["align_448"].train.values()} == {1e-4}


def test_command_line_wins_over_size_over_recipe():
    assert llava().stages["chat"].image_size == 112
    assert llava("size=6b").stages["chat"].image_size == 448
    assert llava("stages.chat.image_size=84").stages["chat"].image_size == 84


def test_epochs_on_the_command_line_replace_the_steps_of_the_size():
    stage = llava("stages.chat.epochs=2").stages["chat"]
    assert (stage.epochs, stage.steps) == (2.0, None)
    assert llava("stages.chat.steps=0").stages["chat"].steps == 0


def test_a_mixture_replaces_the_source_of_the_size():
    data = llava("data.mix=[{train: a.json, weight: 2}, {train: b.json, images: dir}]").data
    assert data.train is None and data.mix is not None
    assert [(one.train, one.images, one.weight) for one in data.mix] == [
        ("a.json", None, 2.0),
        ("b.json", "dir", 1.0),
    ]


def test_data_of_one_stage_fills_up_from_the_others():
    recipe = llava("stages.chat.data.train=a.json", "data.questions=7")
    assert recipe.stages["chat"].data.train == "a.json"
    assert recipe.stages["chat"].data.questions == 7
    assert recipe.stages["align_224"].data is None and recipe.data.train == "scenes"


def test_data_train_replaces_what_a_recipe_gives_its_stages(tmp_path, monkeypatch):
    in_folder(tmp_path, monkeypatch, OWN + "    data: {train: of_the_recipe.json}\n")
    assert (
        load_recipe(["recipe=own", "size=6b"]).stages["only_one"].data.train == "of_the_recipe.json"
    )
    assert (
        load_recipe(["recipe=own", "size=6b", "data.train=x.json"]).stages["only_one"].data is None
    )


def test_a_part_set_to_null_is_frozen():
    assert list(llava("stages.chat.train.language=null").stages["chat"].train) == [
        "vision",
        "connector",
    ]


def test_all_mistakes_at_once_each_with_the_nearest_name():
    lines = mistakes(
        "langauge.name=tiny",
        "stages.chatt.steps=3",
        "stages.chat.stepss=3",
        "stages.chat.train.visoin.lr=1",
        "connector.detph=3",
        "connector.norm=2",
        "vision.name=ViT-H14",
        "language.name=yi-6",
        "size=tinny",
        "steps=5",
        "foo",
        "only=chta",
    )
    wanted = {
        "'langauge'": "'language'",
        "'chatt'": "'chat'",
        "'stages.chat.stepss'": "'steps'",
        "'visoin'": "'vision'",
        "'detph'": "'depth'",
        "connector.norm": "true or false",
        "'ViT-H14'": "'ViT-H-14'",
        "language.name": "tiny, yi-6b, yi-34b",
        "'tinny'": "'tiny'",
        "'steps'": "'stages.NAME.steps'",
        "'foo'": "KEY=VALUE",
        "'chta'": "'chat'",
    }
    for given, answer in wanted.items():
        assert any(given in line and answer in line for line in lines), (given, lines)
    assert len(lines) == len(wanted)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=yivl_lava"], "Did you mean 'yivl_llava'?"),
        (["size=6b"], "recipe=NAME is needed"),
        (
            ["recipe=missing.yaml"],
            "recipe 'missing.yaml': there is no such file; by name: yivl_blip2, ",
        ),
    ],
)
def test_recipes_that_are_not_there(words, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        load_recipe(words)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("stages.chat.steps=2e3", "write 2000"),
        ("stages.chat.steps=1.5", "whole number"),
        ("stages.chat.steps=-1", "at least 0"),
        ("stages.chat.steps=true", "whole number"),
        ("stages.chat.grad_clip=nan", "a number"),
        ("stages.chat.grad_clip=inf", "a number"),
        ("stages.chat.train.vision.lr=-5", "above 0"),
        ("stages.chat.train.vision.lr=1_0", "a number"),
        ("stages.chat.train.vision=1e-4", "must be a mapping"),
        ("stages.chat.adam_betas=0.9", "adam_betas has only 1 of its values"),
        ("stages.chat.adam_betas=[0.9,1.5]", "at most"),
        ("stages.chat.sample_format=captions", "caption, chat"),
        ("stages=chat", "must be a mapping"),
        ("stages.chat={a: 1", "cannot be read"),
        ("connector=mine", "must be a mapping"),
        ("connector.name=mine", "no connector 'mine'"),
        ("dry_run=yes", "true or false"),
        ("precision=16", "32, bf16"),
        ("activation_checkpointing=ful", "full, auto, given 'ful'. Did you mean 'full'?"),
        ("seed=", "no value"),
        ("run=a${b", "not interpolated"),
        ("vision.name=ViT-B-32", "as those of vision.name=tiny and vision.name=tiny_eva are"),
        ("only=[a,b", "cannot be read"),
        ("language.max_length=15", "at least 16, given 15"),
        ("data.mix=[]", "a list of at least 1"),
        ("data.mix=[{train: a, wieght: 1}]", "unknown key 'data.mix[0].wieght'"),
        ("stages.chat.adam_betas=[0.9,0.98,1]", "a list of at most 2"),
        ("=3", "KEY=VALUE"),
        ("seed.x=3", "whole number"),
    ],
)
def test_one_wrong_value_is_one_line(word, expected):
    lines = mistakes(word)
    assert len(lines) == 1 and expected in lines[0], lines


def test_a_key_is_given_once():
    assert "seed is given twice" in mistakes("seed=1", "seed=2")[0]
    whole, part = "connector={depth: 1}", "connector.depth=2"
    for words in ((whole, part), (part, whole)):
        assert "as a whole and in parts" in mistakes(*words)[0]
    assert "not both" in mistakes("only=chat", "from=chat")[0]
    assert "not both" in mistakes("stages.chat.steps=1", "stages.chat.epochs=1")[0]


@pytest.mark.parametrize("text", ["0_07", "yes", "1e-4", "what # is", "Read: what?", "a=b", "007"])
def test_text_stays_as_it_was_typed(text, tmp_path):
    recipe = llava(f"run={text}")
    assert recipe.run == text
    save_recipe(recipe, tmp_path / "copy.yaml")
    assert load_recipe_file(tmp_path / "copy.yaml").run == text


def test_values_are_read_by_the_type_of_their_key():
    recipe = llava(
        "precision=32",
        "dry_run=true",
        "stages.chat.grad_clip=null",
        "stages.chat.train.vision.lr=1e-4",
        "stages.chat.adam_betas=0.9,0.98",
        "connector={name:llava_mlp,depth: 3}",
        "run=none",
        "trainer.checkpoint_every=5",
    )
    chat = recipe.stages["chat"]
    assert recipe.precision == "32" and recipe.dry_run is True and recipe.run is None
    assert (
        chat.grad_clip is None
        and chat.train["vision"].lr == 1e-4
        and chat.adam_betas == (0.9, 0.98)
    )
    assert recipe.connector == {**LLAVA, "depth": 3}
    assert recipe.trainer.checkpoint_every == 5.0


@pytest.mark.parametrize("word", ["only=chat", "only=[chat]", "only=[chat,align_224]", "from=chat"])
def test_stages_are_chosen(word):
    recipe = llava(word)
    if word.startswith("from"):
        assert recipe.from_ == "chat"
    else:
        assert recipe.only == (("chat", "align_224") if "," in word else ("chat",))


def test_recipes_of_the_working_folder(tmp_path, monkeypatch):
    in_folder(tmp_path, monkeypatch)
    recipe = load_recipe(["recipe=own"])
    assert recipe.connector == {**LLAVA, "depth": 3}
    assert list(recipe.stages) == ["only_one"] and recipe.language.name == "tiny"
    assert load_recipe(["recipe=recipes/own.yaml"]).stages == recipe.stages
    assert "yivl_llava" in recipe_files()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1e-3", "'1e-3'", "lr must be a number, given '1e-3'"),
        ("depth: 3", "depth: '3'", "connector.depth must be a whole number"),
        (
            "global_batch_size: 4",
            "global_batch_size: 4.0",
            "global_batch_size must be a whole number, given 4.0; write 4",
        ),
        (
            "global_batch_size: 4",
            "global_batch_size: true",
            "global_batch_size must be a whole number",
        ),
        ("    global_batch_size: 4\n", "", "stages.only_one.global_batch_size is missing"),
        ("    epochs: 1\n", "", "needs epochs or steps"),
        ("sample_format: chat", "sample_format: ${x}", "not interpolated"),
        ("sample_format: chat", "sample_format: [", "own.yaml:9"),
        ("sample_format: chat", "sample_format: chat\n    sample_format: chat", "own.yaml:8"),
        (
            "sample_format: chat",
            "sample_format: chat\n    sample_fromat: chat",
            "own.yaml: unknown key",
        ),
        ("connector: {name: llava_mlp, depth: 3}", "seed: 1", "connector.name is missing"),
        ("connector:", "connectr:", "Did you mean 'connector'?"),
        ("  only_one:", "  2:", "must be letters, digits and _, given '2'"),
        (OWN, "[1, 2]", "is not a mapping"),
        (OWN, "seed: 1", "stages is missing"),
    ],
)
def test_mistakes_in_a_file(old, new, expected, tmp_path, monkeypatch):
    assert old in OWN
    in_folder(tmp_path, monkeypatch, OWN.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_recipe(["recipe=own"])
    assert expected in str(caught.value)


def test_a_file_may_write_a_choice_without_quotes(tmp_path, monkeypatch):
    in_folder(tmp_path, monkeypatch, OWN + "precision: 32\n")
    assert load_recipe(["recipe=own"]).precision == "32"


def test_another_connector_leaves_the_options_of_the_first(tmp_path, monkeypatch):
    in_folder(tmp_path, monkeypatch)
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors" / "mine.py").write_text(
        "from vlbench.connector import Connector\n"
        "class Mine(Connector):\n"
        "    def __init__(self, shapes, *, width: int | None = None, kind='a'):\n"
        "        super().__init__()\n"
    )
    recipe = load_recipe(["recipe=own", "connector.name=mine", "connector.width=8"])
    assert recipe.connector == {"name": "mine", "width": 8, "kind": "a"}
    assert load_recipe(["recipe=own", "connector.norm=false"]).connector["depth"] == 3


def test_differences_name_what_a_resume_may_not_change():
    before = llava()
    free = (
        "trainer.keep_last_checkpoints=3",
        "data.workers=3",
        "log.every_n_steps=1",
        "run=x",
        "dry_run=true",
    )
    assert recipe_differences(before, llava(*free, "profile=true")) == []
    changed = recipe_differences(
        before, llava("seed=1", "stages.chat.steps=7", "connector.depth=1")
    )
    steps = before.stages["chat"].steps
    assert changed == [
        "seed (0 before, 1 now)",
        "connector.depth (2 before, 1 now)",
        f"stages.chat.steps ({steps} before, 7 now)",
    ]
    frozen = recipe_differences(before, llava("stages.chat.train.language=null"))
    assert frozen[0].startswith("stages.chat.train.language.lr")


def test_a_run_can_be_named_without_its_recipe(tmp_path):
    recipe = llava("seed=5", f"run={tmp_path}")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe([f"run={tmp_path}"]) == recipe
    assert load_recipe([f"run={tmp_path}", "seed=6"]).seed == 6


def require_data(*words):
    recipe = llava(*words)
    recipes.require_data(recipe.size, recipe.selected_data)


def test_full_sizes_ask_for_data():
    with pytest.raises(UserError, match="size=6b needs data.train=FILE"):
        require_data("size=6b")
    require_data("size=6b", "data.train=a.json")
    for chosen in ("only=chat", "from=chat"):
        require_data("size=6b", chosen, "stages.chat.data.train=a.json")


def test_every_key_has_a_meaning_and_the_copy_has_every_key():
    assert all(row.help for row in key_rows())
    top = [
        line.split(":")[0] for line in recipe_to_yaml(llava()).splitlines() if line[0] not in " -"
    ]
    wanted = (
        "recipe size seed run init only from precision activation_checkpointing dry_run "
        "trust_connector profile vision language connector data stages trainer log"
    )
    assert top == wanted.split()


def test_recipes_differ_in_what_their_papers_say_and_in_nothing_else():
    """The connector alone; beside it the encoder of EVA, and the first stage of BLIP-2."""
    allowed = {
        "yivl_qformer": set(),
        "yivl_flamingo": set(),
        "yivl_deepstack": set(),
        "yivl_cross_attention": set(),
        "yivl_eva": set(),
        "yivl_eva_tower": {"vision"},
        "yivl_blip2": {"stages"},
    }
    for size in ("tiny", "6b", "34b"):
        llava_ = to_plain(load_recipe(["recipe=yivl_llava", f"size={size}"]))
        for name, also in allowed.items():
            other = to_plain(load_recipe([f"recipe={name}", f"size={size}"]))
            differing = {key for key in llava_ if llava_[key] != other[key]}
            assert differing == {"recipe", "connector"} | also, (name, size)
            stages = dict(other["stages"])
            stages.pop("blip2", None)
            assert stages == llava_["stages"], (name, size)


def test_the_recipe_of_tiles_has_tiles_and_the_image_size_of_llava_next():
    for size in ("tiny", "6b", "34b"):
        square = to_plain(load_recipe(["recipe=yivl_llava", f"size={size}"]))
        tiled = to_plain(load_recipe(["recipe=yivl_llava_tiles", f"size={size}"]))
        assert tiled["vision"].pop("tiling") and square["vision"].pop("tiling") is None
        sizes = [stage.pop("image_size") for stage in tiled["stages"].values()]
        assert sizes == ([56, 112, 112] if size == "tiny" else [224, 336, 336])
        for stage in square["stages"].values():
            del stage["image_size"]
        assert {**tiled, "recipe": square["recipe"]} == square, size


def test_a_kind_of_encoder_is_that_of_the_size():
    names = {
        size: load_recipe(["recipe=yivl_eva_tower", f"size={size}"]).vision.name
        for size in ("tiny", "6b")
    }
    assert names == {"tiny": "tiny_eva", "6b": "EVA02-L-14-336"}
    given = load_recipe(["recipe=yivl_llava", "vision.name=eva", "vision.layer=-1"]).vision
    assert (given.name, given.weights, given.layer) == ("tiny_eva", "embedded", -1)


def test_a_recipe_file_that_is_not_here_is_told_with_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe(["recipe=yivl_lava.yaml"])
    said = str(caught.value)
    assert said.startswith("recipe 'yivl_lava.yaml': there is no such file; by name: yivl_blip2,")
    assert said.endswith(" Did you mean 'yivl_llava'?")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("batch_size=4", "stages.NAME.global_batch_size"),
        ("learning_rate=1e-4", "stages.NAME.train.PART.lr"),
        ("stages.chat.learning_rate=1e-4", "stages.NAME.train.PART.lr"),
        ("max_epochs=1", "stages.NAME.epochs"),
        ("trainer.seed=1", "seed"),
        ("trainer.device=2", "devices"),
    ],
)
def test_a_key_that_others_call_otherwise_is_suggested(word, meant):
    (line,) = mistakes(word)
    assert line.startswith("unknown key") and line.endswith(f" Did you mean '{meant}'?")


@pytest.mark.parametrize("word", ["yivl_llava", "mine/own.yaml"])
def test_a_recipe_without_its_key_is_recognized(word):
    with pytest.raises(UserError) as caught:
        load_recipe([word, "seed=1"])
    assert caught.value.lines[-1].endswith(f". Did you mean 'recipe={word}'?")
