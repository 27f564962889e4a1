"""The heat map of an answer: which patches it depends on, and where they lie over the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from asked_conversations import build_asked_vlm, noise
from PIL import Image
from random_vlm import small_vlm

from vlbench.connector import registry
from vlbench.data.image_processing import ImageTransform
from vlbench.data.image_tiling import ImageTiling, TiledImage
from vlbench.data.view_pixels import cut_views
from vlbench.errors import UserError
from vlbench.evaluate.attention_diagnostics import diagnose_answers
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.view_map import find_box, merge_views
from vlbench.model.train_flops import count_forward_flops, count_step_flops
from vlbench.processor import sample_from_messages
from vlbench.serve.heat_map import compute_heat_map

PLAIN = ImageTransform(size=56, crop=56, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
TRANSFORMS = {
    "pad": PLAIN,
    "squash": replace(PLAIN, squash=True),
    "crop": replace(PLAIN, pad=False),
    "crop of a larger one": replace(PLAIN, pad=False, size=64),
    "pad, then crop": replace(PLAIN, size=64),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("sides", [(200, 100), (101, 160), (80, 80)])
def test_the_box_is_where_the_pixels_come_from(name: str, sides: tuple[int, int]) -> None:
    transform, (width, height) = TRANSFORMS[name], sides
    left, top, right, bottom = transform.seen_box(width, height)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    places = np.stack([40 + 200 * x / width, 40 + 200 * y / height, np.full_like(x, 255)], -1)
    seen = transform.resize_and_crop(Image.fromarray(places.round().astype(np.uint8))).astype(float)
    steps = (np.arange(56) + 0.5) / 56
    across = left + (right - left) * steps
    down = top + (bottom - top) * steps
    inside = np.outer((0.1 < down) & (down < 0.9), (0.1 < across) & (across < 0.9))
    assert inside.any() and (seen[..., 2][inside] == 255).all()
    assert abs(seen[..., 0] - (40 + 200 * across[None]))[inside].max() < 4
    assert abs(seen[..., 1] - (40 + 200 * down[:, None]))[inside].max() < 4
    is_padded = seen[..., 2] == 0
    expected = np.outer((down < 0) | (down > 1), np.ones(56)) + ((across < 0) | (across > 1))
    assert (is_padded != (expected > 0)).mean() < 0.04  # edges are interpolated


def message(*colours: str) -> list[dict]:
    images = [{"type": "image", "image": Image.new("RGB", (8, 4), colour)} for colour in colours]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "what?"}]}]


def test_each_picture_has_its_map() -> None:
    vlm = small_vlm(registry.load_connector("llava_mlp")).eval()
    state = torch.get_rng_state()
    first, second = (
        compute_heat_map(vlm, message("red", "blue"), "it is", image) for image in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.box == second.box == (0, -0.5, 1, 1.5)
    asked = EvalQuestion(sample_from_messages(message("red", "blue")), "a", "", "en")
    told = diagnose_answers(vlm, [(asked, "it is")])["maps"][0]
    assert told["box"] == list(first.box)  # where a report lays the map
    shares = torch.tensor([first.rows, second.rows], dtype=torch.float64)
    assert shares.shape[1:] == vlm.model.shapes.grid
    assert torch.allclose(shares.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(shares[0], shares[1])
    assert all(parameter.grad is None for parameter in vlm.parameters())
    with pytest.raises(UserError, match="image=2: the conversation has 2 pictures"):
        compute_heat_map(vlm, message("red", "blue"), "it is", 2)
    with pytest.raises(UserError, match="cannot be given"):
        compute_heat_map(vlm, message("red"), "<image_placeholder>", 0)


@pytest.mark.parametrize("rule", ["llava_next", "internvl"])
@pytest.mark.parametrize("sides", [(70, 30), (28, 56), (56, 56)])
def test_the_map_of_a_tiled_picture_is_those_of_its_views_side_by_side(rule, sides) -> None:
    """A mark somewhere in the picture is where the views that show it have it."""
    tiling, (width, height), side = ImageTiling(6, rule), sides, 28
    grid = tiling.choose_grid(width, height, side)
    tiled = TiledImage(noise(0), sides, grid, tiling.list_views(grid))
    marked = np.zeros((height, width, 3), np.uint8)
    marked[height // 2 :, : width // 4] = 255
    views = cut_views(Image.fromarray(marked), tiled, tiling, side, Image.Resampling.BOX)
    maps = torch.from_numpy(views[..., 0] / 255)
    merged = merge_views(maps, tiled, tiling, side)
    assert merged.shape == (grid[0] * side, grid[1] * side)
    torch.testing.assert_close(merged.sum(), maps.sum())
    left, top, right, bottom = find_box(tiled, tiling, side)
    down = top + (bottom - top) * (torch.arange(merged.shape[0]) + 0.5) / merged.shape[0]
    across = left + (right - left) * (torch.arange(merged.shape[1]) + 0.5) / merged.shape[1]
    expected = torch.outer((0.5 < down) & (down < 1), (0 < across) & (across < width // 4 / width))
    assert ((merged > merged.max() / 2) != expected).double().mean() < 0.06  # edges


@pytest.mark.parametrize("name", ["flamingo", pytest.param("llava_mlp", marks=pytest.mark.slow)])
def test_a_tiled_picture_has_one_map(name) -> None:
    vlm = build_asked_vlm(f"tiled {name}")
    for image, (rows, columns) in enumerate(((1, 1), (1, 2), (2, 2))):
        shown = [{"type": "image", "image": noise(seed).open()} for seed in (0, 1, 2)]
        chat = [{"role": "user", "content": [*shown, {"type": "text", "text": "what?"}]}]
        found = compute_heat_map(vlm, chat, "it is", image)
        shares = torch.tensor(found.rows, dtype=torch.float64)
        if vlm.processor.view_settings.tiling.grid == "internvl":
            assert shares.shape == (2 * rows, 2 * columns) and found.box == (0, 0, 1, 1)
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0, dtype=torch.float64))
    told = diagnose_answers(vlm, [(EvalQuestion(sample_from_messages(chat), "a", "", "en"), "b")])
    drawn = torch.tensor(told["maps"][0]["relevance"])
    assert list(drawn.shape) == told["maps"][0]["grid"]
    assert (told["attention"] is not None) == (name == "flamingo")


def test_an_answer_costs_a_third_of_what_its_training_does() -> None:
    vlm = small_vlm(registry.load_connector("llava_mlp"))
    vlm.model.requires_grad_(True)
    trained, forward = count_step_flops(vlm.model), count_forward_flops(vlm.model)
    assert forward.per_position == trained.per_position / 3
    assert all(parameter.requires_grad for parameter in vlm.parameters())
