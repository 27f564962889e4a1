"""Images in their own aspect ratios: grids, sheets of patches, and the encoder's features."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from native_models import ARGS, GRIDS, PATCH, SIDE, SIZES, native_encoder, native_vlm
from PIL import Image
from random_vlm import NoiseImage
from timm.data.naflex_transforms import get_image_size_for_seq
from timm.models.naflexvit import checkpoint_filter_fn
from torch import Tensor
from transformers.models.siglip2.image_processing_siglip2 import (
    get_image_size_for_max_num_patches,
)

from vlbench.config.recipe import load_recipe
from vlbench.connector import registry
from vlbench.data.image_processing import ImageTransform, ZeroImage
from vlbench.data.native_aspect import choose_patch_grid, keep_aspect, lay_patches
from vlbench.errors import UserError
from vlbench.model.timm_config import TimmConfig
from vlbench.model.vision_encoder import VisionEncoder

MOST = (SIDE // PATCH) ** 2
TRANSFORM = ImageTransform(
    SIDE, SIDE, (0.5,) * 3, (0.5,) * 3, squash=True, interpolation="bilinear", native=True
)


def sheets(sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the sheets of images of noise, and their grids."""
    images = [keep_aspect(NoiseImage(n, size), size, PATCH, MOST) for n, size in enumerate(sizes)]
    pixels = torch.cat([TRANSFORM.load_pixels(image) for image in images])
    return pixels, [image.grid for image in images]


def own_features(features: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
    """Return the features of each image's own patches."""
    pairs = zip(features, grids, strict=True)
    return [patches[: rows * columns] for patches, (rows, columns) in pairs]


@pytest.mark.parametrize("most", [16, 256, 576, 1024])
def test_grids_are_those_of_transformers_and_of_timm(most):
    random = np.random.default_rng(most)
    sizes = [*random.integers(16, 4000, (100, 2)).tolist(), [8000, 1], [1, 8000], [3, 3], [32, 32]]
    for width, height in sizes:
        rows, columns = choose_patch_grid(width, height, 16, most)
        theirs = get_image_size_for_max_num_patches(height, width, 16, most)
        assert (16 * rows, 16 * columns) == theirs
        assert get_image_size_for_seq((height, width), 16, most)[1] == theirs
        assert 1 <= rows * columns <= most


def test_a_sheet_has_the_patches_of_the_resized_image_row_by_row():
    for size, grid in zip(SIZES, GRIDS, strict=True):
        picture = NoiseImage(1, size).open()
        image = keep_aspect(NoiseImage(1, size), size, PATCH, MOST)
        rows, columns = image.grid
        assert image.grid == grid
        resized = picture.resize((columns * PATCH, rows * PATCH), Image.Resampling.BILINEAR)
        sheet = lay_patches(picture, image, SIDE, Image.Resampling.BILINEAR)[0]
        for number in range(MOST):
            top, left = (PATCH * place for place in divmod(number, SIDE // PATCH))
            found = sheet[top : top + PATCH, left : left + PATCH]
            if number >= rows * columns:
                assert not found.any()
                continue
            row, column = divmod(number, columns)
            box = (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH)
            assert np.array_equal(found, np.asarray(resized.crop(box)))


def test_the_sheet_of_a_square_that_fills_it_is_the_squashed_square():
    square = NoiseImage(3, (50, 50))
    sheet = TRANSFORM.load_levels(keep_aspect(square, (50, 50), PATCH, MOST))
    plain = ImageTransform(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3, squash=True,
                           interpolation="bilinear")  # fmt: skip
    assert torch.equal(sheet[0], plain.load_levels(square))
    assert TRANSFORM.transform_hash() != plain.transform_hash()
    assert "kept in its aspect ratio" in TRANSFORM.describe()
    absent = keep_aspect(ZeroImage(), (1, 1), PATCH, MOST)
    assert not TRANSFORM.load_pixels(absent).any()


@pytest.mark.parametrize("changes", [{}, {"class_token": True, "reg_tokens": 2}])
def test_an_image_has_the_same_features_alone_as_among_others_in_any_order(changes):
    encoder = native_encoder(**changes).eval()
    assert encoder.has_class_token == bool(changes)
    pixels, grids = sheets()
    with torch.no_grad():
        together = own_features(encoder(pixels, grids), grids)
        order = [2, 0, 3, 1]
        moved = [grids[number] for number in order]
        again = own_features(encoder(pixels[order], moved), moved)
        for place, number in enumerate(order):
            alone = encoder(pixels[number : number + 1], [grids[number]])
            (alone,) = own_features(alone, [grids[number]])
            torch.testing.assert_close(alone, together[number], atol=1e-4, rtol=0)
            torch.testing.assert_close(again[place], together[number], atol=1e-4, rtol=0)


def test_features_are_timms_without_padding_and_of_a_square_those_of_the_square():
    encoder = native_encoder().eval()
    trunk = encoder.visual.trunk
    pixels, grids = sheets()
    with torch.no_grad():
        found = own_features(encoder(pixels, grids), grids)
        for number, (size, (rows, columns)) in enumerate(zip(SIZES, grids, strict=True)):
            resized = NoiseImage(number, size).open().resize(
                (columns * PATCH, rows * PATCH), Image.Resampling.BILINEAR
            )  # fmt: skip
            picture = torch.tensor(np.asarray(resized)).permute(2, 0, 1)[None] / 255 * 2 - 1
            blocks = trunk.forward_intermediates(
                picture, indices=[1], intermediates_only=True, output_fmt="NLC"
            )
            torch.testing.assert_close(found[number], blocks[0][0], atol=1e-4, rtol=0)
        square = SIZES.index((SIDE, SIDE))
        plain = encoder(pixels[square : square + 1])
        torch.testing.assert_close(found[square], plain[0], atol=1e-4, rtol=0)


def test_a_square_has_the_features_of_timms_plain_siglip():
    args = {**ARGS, "num_classes": 0, "img_size": SIDE}
    del args["pos_embed_grid_size"]
    torch.manual_seed(1)
    plain = timm.create_model("vit_base_patch16_siglip_256", **args).eval()
    encoder = native_encoder(pos_embed_grid_size=[4, 4]).eval()
    trunk = encoder.visual.trunk
    trunk.load_state_dict(checkpoint_filter_fn(plain.state_dict(), trunk))
    pixels, grids = sheets(((SIDE, SIDE),))
    with torch.no_grad():
        (wanted,) = plain.forward_intermediates(
            pixels, indices=[1], intermediates_only=True, output_fmt="NLC"
        )
        torch.testing.assert_close(encoder(pixels, grids), wanted, atol=1e-4, rtol=0)


def test_padding_reaches_no_feature_and_the_encoder_learns_alike():
    encoder = native_encoder().to(torch.float64).train()
    pixels, grids = sheets()
    pixels = pixels.to(torch.float64)

    def gradients(shares: list[list[int]], noise: float) -> dict[str, Tensor]:
        encoder.zero_grad()
        for share in shares:
            dirty, own = pixels[share].clone(), [grids[number] for number in share]
            for image, (rows, columns) in enumerate(own):
                for patch in range(rows * columns, MOST):
                    top, left = (PATCH * place for place in divmod(patch, SIDE // PATCH))
                    dirty[image, :, top : top + PATCH, left : left + PATCH] = noise
            sum(one.square().sum() for one in own_features(encoder(dirty, own), own)).backward()
        return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients([[0, 1, 2, 3]], 0)
    for shares, noise in (([[0], [1], [2], [3]], 0), ([[3, 1], [2, 0]], 7.0)):
        found = gradients(shares, noise)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            away = float((found[name] - value).abs().max())
            near = 1e-5 if name.endswith("pos_embed") else 1e-9  # timm resizes it in float32
            assert away <= near * max(1e-3, float(value.abs().max())), name


def test_no_patch_is_dropped_in_training():
    half = (0.5, 0.5, 0.5)
    args = {**ARGS, "patch_drop_rate": 0.5}
    config = TimmConfig("naflexvit_base_patch16_siglip", args, SIDE, half, half, "squash",
                        "bilinear", 1.0)  # fmt: skip
    encoder = VisionEncoder(config.build_module(), -2, False, config.preprocess()).train()
    pixels, grids = sheets()
    state = torch.get_rng_state()
    assert torch.equal(encoder(pixels, grids), encoder(pixels, grids))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_image_size_is_another_budget_and_the_same_weights():
    vlm = native_vlm()
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    vlm.set_image_size(64)
    after = vlm.model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert after.keys() == before.keys()
    assert vlm.vision.grid == (8, 8) and vlm.connector.tokens_per_image == 64
    assert vlm.processor.transform.native and vlm.processor.view_layout.side == 64


def test_connectors_that_take_any_grid_are_those_that_are_told():
    names = registry.connector_locations()
    assert {name for name in names if registry.load_connector(name).any_grid} == {
        "linear", "llava_mlp", "dense", "deepstack",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pixel_shuffle", "qformer", "glu"])
def test_a_connector_of_one_grid_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="vision.aspect is native, and connector") as raised:
        native_vlm(name)
    assert "llava_mlp" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vision.tiling.tiles=4"], "has aspect=native and tiling"),
        (["vision.second.name=tiny"], "has aspect=native and second"),
        (["vision.max_visual_tokens=64"], "no tiles to reduce"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(UserError, match=message) as raised:
        load_recipe(["recipe=yivl_llava", "vision.aspect=native", *words])
    assert "\n" not in str(raised.value)
