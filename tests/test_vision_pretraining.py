"""The pretraining of the miniature vision encoder: what it sees, and what each patch is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vlbench.data.scene_lattice import LATTICE
from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_world import UNSEEN_PAIRS, RenderedScene, SceneObject
from vlbench.miniatures import batch_encoding, make_vision_encoder, measure_vision_encoder
from vlbench.miniatures.crowded_images import crowded_scenes, letter_scenes
from vlbench.miniatures.region_words import (
    NOT_ASKED,
    NOTHING,
    REGION_WORDS,
    RegionWords,
    region_targets,
)
from vlbench.miniatures.vision_losses import REGION_ROUND

GROUND = ((200, 200, 200),) * 4


def named_words(scene: RenderedScene, grid: int) -> list[list[tuple[str, ...] | None]]:
    """Return rows of patches: the words of each, () for nothing, None where it is not asked."""
    [targets] = region_targets([scene], grid).tolist()
    told: list[tuple[str, ...] | None] = []
    for patch in targets:
        if NOT_ASKED in patch:
            told.append(None)
            continue
        words = zip(patch, REGION_WORDS.values(), strict=True)
        told.append(tuple(known[at - 1] for at, known in words if at != NOTHING))
    return [told[row * grid : (row + 1) * grid] for row in range(grid)]


def test_a_patch_is_told_the_words_of_the_object_that_it_shows() -> None:
    star = SceneObject("red", "star", 0, 14.0, 14.0, 10.0, 0.0, (214, 38, 40))
    dotted = SceneObject("blue", "cross", 1, 42.0, 14.0, 10.0, 0.0, (38, 84, 214), has_dot=True)
    scene = RenderedScene("two", (star, dotted), GROUND, LATTICE)
    red_star, blue_cross = ("red", "star", "plain"), ("blue", "cross", "dotted")
    small = named_words(scene, 4)
    assert small[0] == [red_star, blue_cross, (), ()] and small[1:] == [[()] * 4] * 3
    large = named_words(scene, 8)
    assert large[0] == large[1] == [red_star] * 2 + [blue_cross] * 2 + [()] * 4
    assert large[2:] == [[()] * 8] * 6


def test_a_patch_that_only_touches_an_object_is_not_asked() -> None:
    star = SceneObject("red", "star", 0, 28.0, 28.0, 20.0, 0.0, (214, 38, 40))
    [first, second, *_] = named_words(RenderedScene("one", (star,), GROUND), 8)
    red_star = ("red", "star", "plain")
    assert first[0] is None and first[1:3] == [None] * 2  # 19.8 and 14 pixels away
    assert second[1:3] == [red_star] * 2 and first[5:] == [()] * 3


def test_a_colour_without_a_name_is_not_asked_but_its_shape_is() -> None:
    odd = SceneObject("", "heart", 0, 14.0, 14.0, 10.0, 0.0, (120, 80, 60))
    [[patch, *_]] = region_targets([RenderedScene("odd", (odd,), GROUND, LATTICE)], 4).tolist()
    assert patch[0] == NOT_ASKED
    assert REGION_WORDS["shape"][patch[1] - 1] == "heart"


def test_every_object_of_every_batch_is_told_to_a_patch() -> None:
    for batch in REGION_ROUND:
        scenes = replace(batch, crowded=3 * (batch.crowded > 0), letters=2, whole=1).make_scenes(5)
        targets = region_targets(scenes, batch.image_size // 14)
        shapes = REGION_WORDS["shape"]
        for scene, rows in zip(scenes, targets, strict=True):
            told = {shapes[at - 1] for at in rows[:, 1].tolist() if at > NOTHING}
            assert batch.image_size == 56 or told == {t.shape for t in scene.objects}


@pytest.mark.parametrize("make_scenes", [crowded_scenes, letter_scenes])
def test_small_objects_are_pure_functions_and_hold_no_unseen_pair(
    make_scenes: Callable[[int, int], list[RenderedScene]],
) -> None:
    scenes = make_scenes(3, 12)
    assert scenes == make_scenes(3, 12) and scenes != make_scenes(4, 12)
    things = [thing for scene in scenes for thing in scene.objects]
    assert all(UNSEEN_PAIRS.get(thing.colour) != thing.shape for thing in things)
    if make_scenes is letter_scenes:
        assert {thing.shape for thing in things} == {*LETTERS}
    else:
        assert any(thing.has_dot for thing in things)
        assert any(not thing.colour for thing in things)


def test_region_features_are_those_that_recipes_use() -> None:
    model = make_vision_encoder.build_clip().eval()
    scenes = crowded_scenes(0, 2)
    with torch.no_grad():
        ours = batch_encoding.encode_patches(model, scenes, 56)
        pixels = batch_encoding.load_pixels(scenes)
        out = model.visual.forward_intermediates(
            pixels, indices=[len(model.visual.transformer.resblocks) - 2], output_fmt="NLC"
        )
    assert torch.allclose(ours, out["image_intermediates"][0], atol=1e-5)


def test_the_loss_of_regions_falls_to_zero_for_features_that_hold_the_words() -> None:
    torch.manual_seed(0)
    targets = region_targets(crowded_scenes(1, 4), 8)
    words = RegionWords(64)
    code = torch.randn(32, 64)
    places = targets.clamp(min=0) @ torch.tensor([1, 7, 0])
    features = code[places % 32]
    optimizer = torch.optim.Adam(words.parameters(), lr=0.1)
    first = words.compute_loss(features, targets).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = words.compute_loss(features, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


def test_a_probe_finds_what_is_linear_in_the_features() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    target = (x @ torch.randn(8, 3)).argmax(1)
    weights = measure_vision_encoder.fit_probe(x[:200], target[:200], 3)
    assert ((x[200:] @ weights).argmax(1) == target[200:]).float().mean() > 0.9
