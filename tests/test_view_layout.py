"""Visual tokens of tiled images stand where LLaVA-NeXT's do; budgets reduce tiles by one rule."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden_release import CHECKPOINT
from PIL import Image

from vlbench.data.chat_template import YI_VL
from vlbench.data.image_tiling import ImageTiling, TiledImage, count_views
from vlbench.data.packing import collate, number_image_tokens, number_image_views
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX, SampleEncoder
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import NEWLINE_INDEX, ViewLayout, ViewSettings
from vlbench.errors import BadSample, UserError

REFERENCE = json.loads((Path(__file__).parent / "reference_tilings.json").read_text())
TOKENIZER = Tokenizer.load(CHECKPOINT)
SIDE = 28


@dataclass(frozen=True)
class SizedImage:
    """An image of which the size alone is known."""

    name: str
    size: tuple[int, int]

    def read_size(self, exif: bool) -> tuple[int, int]:
        return self.size

    def open(self) -> Image.Image:
        raise AssertionError("planning opened an image")


def layout(
    tiles: int = 4,
    rule: str = "llava_next",
    tags: str = "newline",
    token_grid: tuple[int, int] | None = (2, 2),
    thumbnail: bool = True,
    **limits: int,
) -> ViewLayout:
    settings = ViewSettings(ImageTiling(tiles, rule, thumbnail), tags, **limits)
    return ViewLayout(settings, SIDE, 4, token_grid)


def tile(given: ViewLayout, *size: int) -> TiledImage:
    return given.tile_sample(sample(size)).images[0]


def sample(*sizes: tuple[int, ...], name: str = "s1") -> Sample:
    images = tuple(SizedImage(f"{n}.png", tuple(size)) for n, size in enumerate(sizes))
    tags = f"{IMAGE_PLACEHOLDER}\n" * len(sizes)
    turns = (ChatTurn("human", f"{tags}what?"), ChatTurn("assistant", "It is red."))
    return Sample(name, turns, images)


def encoder(given: ViewLayout | None, max_length: int = 512, **options: object) -> SampleEncoder:
    return SampleEncoder(TOKENIZER, YI_VL, 4, max_length, view_layout=given, **options)


def test_200_images_have_as_many_tokens_as_in_llava_next():
    for case in REFERENCE["llava_next"]:
        side, token_side = case["side"], case["token_side"]
        given = ViewLayout(
            ViewSettings(ImageTiling(case["tiles"])), side, token_side**2, (token_side, token_side)
        )
        found = [given.count_positions(tile(given, *size)) for size in REFERENCE["sizes"]]
        assert found == [row[2] for row in case["grids"]]


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (55, 50), (100, 37), (28, 28)])
def test_tokens_are_ordered_as_in_llava_next(size):
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    given = ViewLayout(ViewSettings(ImageTiling(6)), 24, 9, (3, 3))
    tiled = tile(given, *size)
    pinpoints = [[r * 24, n // r * 24] for n in range(2, 7) for r in range(1, n + 1) if n % r == 0]
    vision = SimpleNamespace(image_size=24, patch_size=8)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints)
    numbers = torch.arange(count_views(tiled) * 9.0).view(-1, 9, 1)
    [packed], _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [numbers],
        torch.tensor([size[::-1]]),
        "default",
        torch.tensor([float(NEWLINE_INDEX)]),
    )
    assert packed[:, 0].long().tolist() == list(given.order_tokens(tiled))


def test_a_grid_of_another_number_of_tokens_is_refused():
    with pytest.raises(UserError, match="token_grid is 2 x 3, and its tokens_per_image is 4"):
        layout(token_grid=(2, 3))


def test_one_view_ends_with_one_newline():
    assert layout(1).order_tokens(tile(layout(1), 90, 20)) == (0, 1, 2, 3, NEWLINE_INDEX)


def test_squashed_images_keep_all_tokens_row_by_row_and_their_thumbnail_is_last():
    given = layout(rule="internvl")
    tiled = tile(given, 60, 28)
    assert tiled.grid == (1, 2)
    first, second = (0, 1, 4, 5, NEWLINE_INDEX), (2, 3, 6, 7, NEWLINE_INDEX)
    assert given.order_tokens(tiled) == (*first, *second, 8, 9, 10, 11)
    whole = layout(rule="internvl", thumbnail=False)
    assert whole.order_tokens(tile(whole, 60, 28)) == (*first, *second)


def test_tokens_without_places_are_one_row_of_each_tile_and_none_is_cut():
    given = layout(token_grid=None)
    tiled = tile(given, 28, 80)
    assert tiled.grid == (3, 1)
    rows = [(*range(at, at + 4), NEWLINE_INDEX) for at in (4, 8, 12)]
    assert given.order_tokens(tiled) == (0, 1, 2, 3, *rows[0], *rows[1], *rows[2])


def test_a_strip_without_thumbnail_keeps_tokens():
    for size in ((4000, 3), (3, 4000)):
        given = layout(thumbnail=False)
        order = given.order_tokens(tile(given, *size))
        assert any(number >= 0 for number in order)


@pytest.mark.parametrize("rule", ["llava_next", "internvl"])
@pytest.mark.parametrize("tags", ["none", "newline", "numbered"])
def test_a_tiled_sample_has_as_many_positions_as_its_layout_says(rule, tags):
    given = layout(6, rule, tags)
    encoded = encoder(given).encode(sample((60, 20), (28, 28), (30, 90)))
    assert encoded.input_ids.count(IMAGE_TOKEN_INDEX) == len(encoded.visual_index)
    assert sum(encoded.image_lengths) == encoded.image_position_count == len(encoded.visual_index)
    used = sorted(number for number in encoded.visual_index if number >= 0)
    assert used == list(dict.fromkeys(used)) and used[-1] < encoded.view_count * 4
    if tags != "newline":
        assert used == list(range(encoded.view_count * 4)) == encoded.visual_index


def test_numbered_views_have_their_texts_before_them():
    given = layout(rule="internvl", tags="numbered")
    encoded = encoder(given).encode(sample((60, 28), (28, 28)))
    marked = [IMAGE_TOKEN_INDEX] * 4
    expected: list[int] = []
    for tag in ("<tile_1>", "<tile_2>", "<tile_global_thumbnail>"):
        expected += [*TOKENIZER.encode(tag, False), *marked]
    start = encoded.input_ids.index(IMAGE_TOKEN_INDEX) - len(TOKENIZER.encode("<tile_1>", False))
    assert encoded.input_ids[start : start + len(expected)] == expected
    text = TOKENIZER.decode([i for i in encoded.input_ids if i != IMAGE_TOKEN_INDEX])
    assert text.count("<tile_1>") == 1 and text.count("<tile_global_thumbnail>") == 2


def test_tiles_are_reduced_where_there_are_most_until_the_budget_fits():
    sizes = ((60, 20), (56, 56), (58, 58))
    free = layout(6, "internvl", "none").tile_sample(sample(*sizes))
    assert [image.grid for image in free.images] == [(1, 3), (2, 2), (2, 2)]
    total = 4 * (4 + 5 + 5)
    found = []
    for limit in range(total, 11, -1):
        given = layout(6, "internvl", "none", max_visual_tokens=limit)
        tiled = given.tile_sample(sample(*sizes))
        assert len(tiled.visual_index) <= limit
        assert tiled.is_reduced == (limit < total)
        grids = [image.grid for image in tiled.images]
        found += [grids] if grids not in found else []
    assert found[:3] == [
        [(1, 3), (2, 2), (2, 2)],
        [(1, 3), (1, 1), (2, 2)],  # of two with most tiles the first; 3 tiles are no better shape
        [(1, 3), (1, 1), (1, 1)],
    ]
    assert found[-1] == [(1, 1)] * 3
    with pytest.raises(BadSample, match="3 images of 4 visual tokens.*max_visual_tokens is 11"):
        layout(6, "internvl", "none", max_visual_tokens=11).tile_sample(sample(*sizes))


def test_too_many_views_are_a_bad_sample_and_not_cut():
    limited = encoder(layout(4, max_views=5))
    assert limited.encode(sample((60, 60))).view_count == 5
    with pytest.raises(BadSample, match="10 views.*max_views is 5"):
        limited.encode(sample((60, 60), (60, 60)))
    budget = layout(4, max_views=5, max_visual_tokens=16)
    assert encoder(budget).encode(sample((60, 60), (60, 60))).is_reduced


def test_a_cut_keeps_whole_images_and_their_tokens():
    given = layout(4)
    full = encoder(given).encode(sample((60, 20), (60, 60)))
    ends = [
        position
        for position, token in enumerate(full.input_ids)
        if token == IMAGE_TOKEN_INDEX and full.input_ids[position + 1] != IMAGE_TOKEN_INDEX
    ]
    assert len(ends) == 2
    with pytest.raises(BadSample, match="cuts through image 2, which takes 24 tokens.*max_visual"):
        encoder(given, ends[1]).encode(sample((60, 20), (60, 60)))
    turns = (
        ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nwhat?"),
        ChatTurn("assistant", "It is red."),
        ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nand here?"),
        ChatTurn("assistant", "It is blue."),
    )
    two = Sample("s2", turns, sample((60, 20), (60, 60)).images)
    whole = encoder(given).encode(two)
    first = whole.input_ids.index(IMAGE_TOKEN_INDEX)
    second = whole.input_ids.index(IMAGE_TOKEN_INDEX, first + whole.image_lengths[0])
    cut = encoder(given, second).encode(two)
    assert cut.is_truncated and len(cut.sample.images) == 1 and cut.view_count == 4
    assert cut.visual_index == whole.visual_index[: whole.image_lengths[0]]


def test_a_size_that_cannot_be_read_is_a_bad_sample(tmp_path):
    from vlbench.data.image_processing import ImageFile

    turns = sample((1, 1)).turns
    broken = Sample("s1", turns, (ImageFile(tmp_path / "gone.png"),))
    with pytest.raises(BadSample, match=r"s1: image .*gone\.png"):
        encoder(layout()).encode(broken)


def pixels_of(image: TiledImage) -> torch.Tensor:
    """Return views whose pixels are the width of their image and their number."""
    numbers = torch.arange(count_views(image)) + 100.0 * image.size[0]
    return numbers[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize("tags", ["none", "newline", "numbered"])
def test_packed_samples_have_their_own_views(tags):
    given = layout(6, tags=tags)
    made = [
        encoder(given).encode(one)
        for one in (sample((60, 20)), sample(name="s2"), sample((28, 28), (30, 90), name="s3"))
    ]
    packed = collate([[made[0], made[1]], [made[2]]], pixels_of)
    assert packed.view_bounds.tolist() == [0, 4, 7, 11]
    assert len(packed.pixels) == len(packed.image_ids) == len(set(packed.image_ids)) == 11
    views, tokens = number_image_views(packed, 4), number_image_tokens(packed, 4)
    first = 0
    for number, one in enumerate(made):
        alone = collate([[one]], pixels_of)
        where = packed.sample_index == number
        own = number_image_views(alone, 4)[0]
        assert torch.equal(tokens[where], number_image_tokens(alone, 4)[0])
        assert torch.equal(views[where], own.where(own < 0, own + first))
        shown = own >= 0
        if shown.any():
            assert torch.equal(packed.pixels[views[where][shown]], alone.pixels[own[shown]])
        bounds = packed.view_bounds[packed.image_index[where][shown]]
        assert bool((views[where][shown] >= bounds).all())
        first += one.view_count


def test_untiled_batches_have_no_views():
    encoded = encoder(None).encode(sample((60, 20)))
    batch = collate([[encoded]], lambda image: torch.zeros(3, 2, 2))
    assert encoded.visual_index is None and encoded.image_lengths is None
    assert batch.visual_index is None and batch.view_bounds is None
    assert number_image_views(batch, 4) is None


def test_each_view_has_the_question_of_its_image():
    encoded = encoder(layout(), question_length=3).encode(sample((60, 20), (28, 28)))
    batch = collate([[encoded]], pixels_of)
    assert len(batch.question_ids) == len(batch.pixels) == encoded.view_count
    assert (batch.question_ids == batch.question_ids[0]).all()


def test_captions_are_tiled_as_conversations_are():
    captions = encoder(layout(), sample_format="caption")
    encoded = captions.encode(sample((60, 20), (60, 60)))
    assert encoded.view_count == 4 and len(encoded.sample.images) == 1
    assert encoded.input_ids[: len(encoded.visual_index)].count(IMAGE_TOKEN_INDEX) == len(
        encoded.visual_index
    )
