"""Several encoder blocks in, several levels out: what a connector may read and inject."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_vlm import assert_later_images_are_cached, make_batch, make_sample, small_vlm
from test_vision_encoder import eva_encoder
from torch import Tensor, nn

from vlbench.connector import registry
from vlbench.connector.base import Connector, ImagePlaces, Shapes
from vlbench.connector.levels import concat_images, stack_levels, unstack_levels
from vlbench.contract_checks.contract_table import CONTRACT
from vlbench.contract_checks.run_contract import open_gates
from vlbench.contract_checks.small_model import build_small_vlm, make_question
from vlbench.data.packing import number_image_tokens
from vlbench.errors import UserError
from vlbench.model.contrastive_loss import add_contrast_pools
from vlbench.model.fsdp_wrapping import fsdp_units
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.train.feature_cache import encoder_fingerprint
from vlbench.train.feature_computation import encode_levels


class Stacked(Connector):
    """Three encoder blocks, in an order of its own: one fills the text, two are added later."""

    vision_layers = (-1, 0, 1)
    inject_layers = (0, 2)

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.tokens_per_image = shapes.patches
        self.into = nn.ModuleList(
            nn.Linear(shapes.vision_width, shapes.lm_width) for _ in self.vision_layers
        )

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(into(level) for into, level in zip(self.into, features, strict=True))

    def inject(
        self, layer: int, hidden: Tensor, visual: tuple[Tensor, ...], where: ImagePlaces
    ) -> Tensor:
        level = visual[1 + self.inject_layers.index(layer)]
        own = level[where.image_index.clamp(min=0), where.token_index.clamp(min=0)]
        return hidden + own * (where.token_index >= 0)[..., None]


def three_images(vlm: LoadedVLM):
    return make_batch(vlm, [[make_sample(1), make_sample(2, images=2, words=20)]])


def run_blocks(vlm: LoadedVLM) -> list[int]:
    """Return the numbers of the encoder blocks that a forward pass runs."""
    ran: list[int] = []
    for number, block in enumerate(vlm.vision.blocks()):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    vlm.features(three_images(vlm))
    return ran


def test_features_are_a_tuple_of_the_blocks_in_the_order_asked():
    vlm = small_vlm(Stacked)
    encoder, pixels = vlm.vision, three_images(vlm).pixels
    features = encoder(pixels)
    for layer, level in zip(Stacked.vision_layers, features, strict=True):
        encoder.block_index = layer % 3
        encoder.read_blocks((), False)
        assert encoder(pixels).equal(level)


def test_features_of_a_timm_encoder_have_the_class_token_in_each_entry():
    pixels = torch.rand(2, 3, 28, 28)
    several = eva_encoder(-1)
    several.read_blocks((2, 0), class_token=True)
    for layer, level in zip((2, 0), several(pixels), strict=True):
        alone = eva_encoder(layer)
        alone.read_blocks((), class_token=True)
        assert alone(pixels).equal(level) and level.shape[1] == 17


def test_the_encoder_runs_once_and_stops_at_the_last_block_that_is_read():
    class Early(Stacked):
        vision_layers = (1, 0, 0)

    for connector, blocks in ((Stacked, [0, 1, 2]), (Early, [0, 1])):
        vlm = small_vlm(connector)
        assert run_blocks(vlm) == blocks
        used = {id(parameter) for parameter in vlm.vision.used_parameters()}
        trained = [any(id(p) in used for p in block.parameters()) for block in vlm.vision.blocks()]
        assert trained == [number in blocks for number in range(3)]
        assert len(vlm.vision.state_dict()) == len(small_vlm(Stacked).vision.state_dict())


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (3, "reads block 3 .* has 3 blocks, so -3 to 2"),
        (-4, "reads block -4 .* has 3 blocks, so -3 to 2"),
        (0.5, r"vision_layers is \(0, 0.5, 1\); wanted are whole numbers"),
        ("a", r"vision_layers is \(0, 'a', 1\); wanted are whole numbers"),
        (True, r"vision_layers is \(0, True, 1\); wanted are whole numbers"),
    ],
)
def test_a_block_that_is_not_there_is_refused(layer: Any, said: str):
    class Deep(Stacked):
        vision_layers = (0, layer, 1)

    with pytest.raises(UserError, match=said):
        small_vlm(Deep)


def test_numbers_of_numpy_are_whole_numbers():
    class Numbered(Stacked):
        vision_layers = (np.int64(0), -1)  # type: ignore[assignment]

    assert run_blocks(small_vlm(Numbered)) == [0, 1, 2]


def test_every_image_position_knows_its_token():
    vlm = small_vlm(Stacked)
    packed = make_batch(vlm, [[make_sample(1), make_sample(2, images=2)], [make_sample(3)]])
    prompts = vlm.processor.collate_prompts([make_question(1), make_question(2, images=2)])
    for batch in (packed, prompts, replace(packed, image_positions=None)):
        index = number_image_tokens(batch, 4)
        assert (index >= 0).equal(batch.input_ids < 0)
        for image in range(len(batch.pixels)):
            own = (batch.image_index == image) & (batch.input_ids < 0)
            assert index[own].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "check",
    [one for one in CONTRACT if one.name in ("shapes", "neighbours", "text_alone", "attention")],
    ids=lambda check: check.name,
)
def test_three_vision_layers_keep_the_contract(check):
    check.run_check(open_gates(build_small_vlm(Stacked).to(torch.float64)))


def test_a_conversation_with_images_in_later_turns_equals_recomputation():
    assert_later_images_are_cached(build_small_vlm(Stacked).to(torch.float64))


def test_stored_features_give_the_same_loss_bit_for_bit():
    vlm = small_vlm(Stacked)
    vlm.vision.requires_grad_(False)
    batch = three_images(vlm)
    with torch.no_grad():
        features = vlm.features(batch)
        stored = stack_levels(features)
        assert stored.shape == (3, 3, 4, 32)
        known = replace(batch, features=stored, pixels=batch.pixels.new_zeros(3, 3, 0, 0))
        for level, again in zip(features, vlm.features(known), strict=True):
            assert level.equal(again) and again.is_contiguous()
        assert vlm(batch).loss_sum.equal(vlm(known).loss_sum)
        assert encode_levels(
            vlm,
            torch.zeros(2, 3, 28, 28, dtype=torch.uint8),
            vlm.processor.transform.level_values(),
        ).shape == (2, 3, 4, 32)


def test_features_of_other_blocks_are_kept_apart():
    vlm = small_vlm(Stacked)
    fingerprints = {encoder_fingerprint(vlm, "cpu")}
    for layers in ((), (0,), (-1, 0), (0, -1)):
        vlm.vision.read_blocks(layers, False)
        fingerprints.add(encoder_fingerprint(vlm, "cpu"))
    assert len(fingerprints) == 5


def test_levels_of_more_images_are_joined_level_by_level():
    first, more = (tuple(torch.rand(n, 4, width) for width in (2, 3)) for n in (1, 2))
    joined = concat_images(first, more)
    assert [level.shape for level in joined] == [(3, 4, 2), (3, 4, 3)]
    assert joined[1][1:].equal(more[1])
    one = torch.rand(2, 4, 3)
    assert unstack_levels(stack_levels(one)) is one


def test_a_contrastive_objective_meets_features_of_several_blocks():
    class Contrast(Stacked):
        def objectives(self) -> tuple[str, ...]:
            return ("pull",)

        def contrast_embeddings(self, name, features, batch) -> dict[str, Tensor]:
            return {"image": features[1].mean(1)[: len(batch.sample_ids)]}

        def objective(self, name, features, batch) -> dict[str, tuple[Tensor, Tensor]]:
            other = batch.contrast_pool.gather_features(batch.contrast_pool.local_indices)
            pairs = zip(features, other, strict=True)
            loss = sum((ours - theirs).abs().sum() for ours, theirs in pairs)
            return {"pull": (loss, torch.ones(()))}

    vlm = small_vlm(Contrast)
    vlm.model.set_objective("pull")
    for trained in (True, False):
        vlm.vision.requires_grad_(trained)
        batches = [make_batch(vlm, [[make_sample(n)]]) for n in (1, 2)]
        for batch in add_contrast_pools(vlm.model, batches):
            assert vlm(batch).extra["pull"][0].item() == 0


def test_fsdp_wraps_the_modules_of_each_level():
    vlm = small_vlm(Stacked)
    assert set(vlm.connector.into) <= set(fsdp_units(vlm.model))


def test_a_connector_of_the_contract_before_is_told_what_changed(tmp_path: Path):
    file = tmp_path / "old.py"
    file.write_text(
        "from vlbench.connector import Connector\n"
        "class Old(Connector):\n"
        "    def inject(self, layer, hidden, visual, image_index):\n"
        "        return hidden\n"
    )
    with pytest.raises(UserError, match=r"old\.py: inject of Old .* write where\.image_index"):
        registry.load_connector(str(file))
