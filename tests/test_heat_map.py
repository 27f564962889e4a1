"""The heat map of an answer: which patches it depends on, and where they lie over the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from random_vlm import small_vlm

from vlbench.connector import registry
from vlbench.data.image_processing import ImageTransform
from vlbench.errors import UserError
from vlbench.model.train_flops import count_forward_flops, count_step_flops
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
    shares = torch.tensor([first.rows, second.rows], dtype=torch.float64)
    assert shares.shape[1:] == vlm.model.shapes.grid
    assert torch.allclose(shares.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(shares[0], shares[1])
    assert all(parameter.grad is None for parameter in vlm.parameters())
    with pytest.raises(UserError, match="image=2: the conversation has 2 pictures"):
        compute_heat_map(vlm, message("red", "blue"), "it is", 2)
    with pytest.raises(UserError, match="cannot be given"):
        compute_heat_map(vlm, message("red"), "<image_placeholder>", 0)


def test_an_answer_costs_a_third_of_what_its_training_does() -> None:
    vlm = small_vlm(registry.load_connector("llava_mlp"))
    vlm.model.requires_grad_(True)
    trained, forward = count_step_flops(vlm.model), count_forward_flops(vlm.model)
    assert forward.per_position == trained.per_position / 3
    assert all(parameter.requires_grad for parameter in vlm.parameters())
