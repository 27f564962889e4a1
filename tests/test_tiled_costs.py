"""What tiled images cost: plans, matched budgets and tables count views, and say of which image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from whole_model_cost import with_random_weights

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.data.packing import collate
from vlbench.data.reference_image import REFERENCE_SIZE, largest_image, tile_reference
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.errors import UserError
from vlbench.graft.part_table import shape_lines
from vlbench.model.build_vlm import build_vlm
from vlbench.model.connector_cost import BUDGET_COUNTS, count_connector_cost
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_step_flops
from vlbench.planner.meta_model import (
    SampleShape,
    build_meta_vlm,
    build_row_batch,
    full_row_shape,
)
from vlbench.planner.options import parse_plan_options
from vlbench.planner.plan_command import run_plan
from vlbench.planner.stage_workload import assumed_sample, sample_flops, stage_samples
from vlbench.processor import InMemoryImage
from vlbench.train.shape_checks import cost_counter

TILED = ["recipe=yivl_llava", "vision.tiling.tiles=4", "only=chat"]


def meta_vlm(recipe: Recipe) -> LoadedVLM:
    return build_meta_vlm(recipe.model, "chat", recipe.stages["chat"], "float32")


def write_pictures(folder: Path) -> list[str]:
    """Write six pictures of three shapes as records; return the words of a recipe that has them."""
    records = []
    for number in range(6):
        size = [(200, 200), (300, 100), (50, 40)][number % 3]
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
        turns = '[{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "Red."}]'
        records.append(f'{{"id": "{number}", "image": "{number}.png", "conversations": {turns}}}')
    (folder / "data.json").write_text(f"[{','.join(records)}]")
    return [f"data.train={folder / 'data.json'}", f"data.images={folder}"]


def test_the_mean_sample_is_that_of_the_data(tmp_path):
    recipe = recipes.load_recipe([*TILED, *write_pictures(tmp_path)])
    vlm = meta_vlm(recipe)
    found = stage_samples(recipe.stage_data("chat"), vlm.processor, None, None)
    layout = vlm.processor.view_layout
    assert layout is not None and not found.are_assumed
    grids = [
        layout.settings.tiling.choose_grid(*size, layout.side)
        for size in [(200, 200), (300, 100), (50, 40)]
    ]
    views = [len(layout.settings.tiling.list_views(grid)) for grid in grids]
    assert len(set(views)) > 1
    assert found.images_by_views == Counter({n: 2 * views.count(n) for n in views})
    assert found.mean_sample.view_count == pytest.approx(sum(views) / 3)
    assert found.mean_sample.image_count == 1


def test_without_data_an_image_of_a_stated_size_is_assumed():
    recipe = recipes.load_recipe([*TILED, "data.train=null"])
    vlm = meta_vlm(recipe)
    found = stage_samples(recipe.stage_data("chat"), vlm.processor, 1000, None)
    assert found.are_assumed and found.mean_sample.view_count > 1
    assert found.images_by_views == {found.mean_sample.view_count: 1}
    assert found.mean_sample == assumed_sample(vlm.processor, recipe.stages["chat"])


@pytest.mark.slow
def test_a_plan_says_which_image_is_assumed(capsys):
    options = parse_plan_options([*TILED, "data.train=null", "samples=1000"])
    assert run_plan(options) == 0
    said = capsys.readouterr().out
    vlm = meta_vlm(options.recipe)
    sample = assumed_sample(vlm.processor, options.recipe.stages["chat"])
    assert "an image of 1024 x 768 pixels per sample" in said
    views, positions = sample.view_count, sample.image_positions
    assert f"views of an image in chat: {views} on average; {views} (100%); images" in said
    assert f"image positions of a sample: 1, {views}, {positions}\n" in said


def test_a_reference_image_that_is_longer_than_the_text_is_refused():
    recipe = recipes.load_recipe([*TILED, "language.max_length=100"])
    processor = meta_vlm(recipe).processor
    with pytest.raises(UserError, match="1024 x 768 .* leaves no room") as error:
        assumed_sample(processor, recipe.stages["chat"])
    assert len(error.value.lines) == 1


def test_operations_of_a_sample_are_those_of_its_batch():
    recipe = recipes.load_recipe(TILED)
    vlm = build_vlm(recipe.model, recipe.stages["chat"].image_size)
    turns = (ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nWhat?"), ChatTurn("assistant", "Red."))
    sample = Sample("one", turns, (InMemoryImage(Image.new("RGB", (300, 100))),))
    encoded = vlm.processor.sample_encoder().encode(sample)
    batch = collate([[encoded]], vlm.processor.transform.load_pixels)
    assert len(batch.pixels) == encoded.view_count > 1
    shape = SampleShape(
        len(encoded.input_ids),
        1,
        encoded.view_count,
        encoded.image_position_count,
        encoded.supervised_token_count,
    )
    flops = count_step_flops(vlm.model, shape.views_per_image)
    assert sample_flops(flops, shape) == pytest.approx(flops.count_flops([batch]))


def test_a_planned_row_has_the_views_and_positions_of_its_samples():
    vlm = meta_vlm(recipes.load_recipe(TILED))
    sample = assumed_sample(vlm.processor, recipes.load_recipe(TILED).stages["chat"])
    row = full_row_shape(sample, 3 * int(sample.token_count) + 1)
    assert row.image_count == 3 and row.view_count == 3 * sample.view_count
    assert row.image_positions == 3 * sample.image_positions
    batch = build_row_batch(row, vlm.connector, (3, 8, 8))
    assert batch.view_bounds is not None and batch.visual_index is not None
    assert batch.view_bounds.diff().tolist() == [sample.view_count] * 3
    assert len(batch.visual_index) == len(batch.find_image_positions()) == row.image_positions
    assert len(batch.pixels) == row.view_count
    places = 2 * vlm.connector.tokens_per_image
    untiled = build_row_batch(SampleShape(300, 2, 2, places, 9), vlm.connector, (3, 8, 8))
    assert untiled.view_bounds is None and untiled.visual_index is None


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("glu", "newline"),
        ("flamingo", "none"),
        *(
            pytest.param(name, tags, marks=pytest.mark.slow)
            for name in ("avgpool", "deepstack", "flamingo")
            for tags in ("newline", "numbered")
        ),
    ],
)
def test_counts_are_those_of_the_whole_model(name, tags):
    words = [*TILED, f"connector.name={name}", f"vision.tiling.tags={tags}"]
    recipe = recipes.load_recipe(words)
    side = recipe.stages["chat"].image_size
    counter = cost_counter(recipe.model, [side])
    with torch.device("meta"):
        vlm = build_vlm(with_random_weights(recipe.model), side)
        whole = count_connector_cost(vlm.model, vlm.processor.view_layout)
    layout = vlm.processor.view_layout
    assert layout is not None
    tiled = tile_reference(layout)
    views = len(tiled.images[0].views)
    assert whole.tokens == len(tiled.visual_index) >= views
    built = counter.build_connector(registry.load_connector(name), recipe.model.connector_options)
    counted = {by: count(counter, built) for by, count in BUDGET_COUNTS.items()}
    assert counted == {
        "params": whole.parameters,
        "visual_tokens": whole.latents if name == "flamingo" else whole.tokens,
        "flops": whole.flops,
    }
    if name == "flamingo":
        assert whole.latents > 0 and whole.latents % views == 0


def test_graft_tells_what_the_largest_image_takes():
    recipe = recipes.load_recipe(TILED)
    vlm = meta_vlm(recipe)
    layout = vlm.processor.view_layout
    assert layout is not None
    views, positions = largest_image(layout)
    assert views == 5
    for size in (REFERENCE_SIZE, (300, 100), (56, 300)):
        grid = layout.settings.tiling.choose_grid(*size, layout.side)
        assert len(layout.settings.tiling.list_views(grid)) <= views
    head, line = shape_lines(recipe, {"chat": vlm})
    assert "most views" in head and line.split()[-4:-2] == [str(positions), str(2048 - positions)]
    limited = recipes.load_recipe([*TILED, "vision.max_visual_tokens=40"])
    assert " 40 " in shape_lines(limited, {"chat": meta_vlm(limited)})[1]
