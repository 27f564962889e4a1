"""DeepStack, the Dense Connector and Llama 3's cross-attention: what papers and references say."""

from __future__ import annotations

import pytest
import torch
from random_vlm import (
    SMALL,
    assert_later_images_are_cached,
    assert_plain_logits,
    make_batch,
    make_sample,
    small_vlm,
)
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from vlbench import listing
from vlbench.connector import registry
from vlbench.connector.base import ImagePlaces, Shapes
from vlbench.contract_checks.run_contract import open_gates
from vlbench.contract_checks.small_model import build_small_vlm, make_question

DeepStack = registry.load_connector("deepstack")
Dense = registry.load_connector("dense")
CrossAttention = registry.load_connector("cross_attention")
SHAPES = Shapes(4, (2, 2), 8, 16, 8, vision_blocks=24, vision_layer=23)


def three_images(vlm):
    return make_batch(vlm, [[make_sample(1), make_sample(2, images=2), make_sample(3, images=0)]])


def test_deepstack_with_all_levels_zero_equals_llava_mlp_bit_for_bit():
    deep, plain = small_vlm(DeepStack, SMALL["deepstack"]), small_vlm(load("llava_mlp"))
    plain.connector.layers.load_state_dict(deep.connector.layers.state_dict())
    batch = three_images(deep)
    with torch.no_grad():
        assert not deep(batch).loss_sum.equal(plain(batch).loss_sum)
        for merger in deep.connector.mergers:
            merger[-1].weight.zero_()
            merger[-1].bias.zero_()
        assert deep(batch).loss_sum.equal(plain(batch).loss_sum)
        batch.labels = None
        assert deep(batch).logits.equal(plain(batch).logits)


def load(name: str):
    return registry.load_connector(name)


def test_deepstack_adds_each_token_to_its_own_position_and_nothing_to_text():
    connector = DeepStack(SHAPES, levels=2, first=0)
    levels = tuple(torch.randn(2, 4, 16) for _ in range(3))
    image_index = torch.tensor([[-1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    token_index = torch.tensor([[-1, 0, 1, 2, 3, -1, 0, 1, 2, 3, -1]])
    hidden = torch.randn(1, 11, 16)
    added = connector.inject(1, hidden, levels, ImagePlaces(image_index, token_index)) - hidden
    torch.testing.assert_close(added[0, 1:5], levels[2][0])
    torch.testing.assert_close(added[0, 6:10], levels[2][1])
    assert not added[0, [0, 5, 10]].any()


@pytest.mark.parametrize(
    ("options", "blocks", "decoder"),
    [
        ({}, (5, 11, 17), (1, 2, 3)),  # as Qwen3-VL with 24 blocks
        ({"blocks": (8, 16, -1)}, (8, 16, -1), (1, 2, 3)),
        ({"levels": 1, "first": 0}, (11,), (0,)),
    ],
)
def test_deepstack_reads_blocks_at_equal_distances(options, blocks, decoder):
    connector = DeepStack(SHAPES, **options)
    assert connector.vision_layers == (23, *blocks) and connector.inject_layers == decoder
    assert len(connector.mergers) == len(blocks)


@pytest.mark.parametrize(
    ("connector", "options", "words"),
    [
        (DeepStack, {"levels": 0}, "levels is 0; .* 1 to 7 are allowed"),
        (DeepStack, {"levels": 8}, "levels is 8; .* 1 to 7 are allowed"),
        (DeepStack, {"blocks": (1, 2)}, "blocks names 2, and levels is 3: say levels=2"),
        (DeepStack, {"first": 6}, "first is 6; with 3 levels and 8 decoder layers 0 to 5"),
        (DeepStack, {"mlp_ratio": 0.0}, "mlp_ratio is 0"),
        (Dense, {"groups": 0}, "groups is 0; .* 24 blocks, so 1 to 24"),
        (Dense, {"mlp_ratio": -1.0}, "mlp_ratio is -1"),
        (CrossAttention, {"every": 9}, "every is 9; allowed are 1 to 8"),
        (CrossAttention, {"kv_heads": 64}, "kv_heads is 64; allowed are 1 to 32"),
        (CrossAttention, {"kv_heads": 5}, "kv_heads is 5, which does not divide heads=32"),
    ],
)
def test_impossible_options_are_named(connector, options, words):
    with pytest.raises(ValueError, match=words):
        connector(SHAPES, **options)


def test_dense_puts_the_last_block_and_means_of_groups_side_by_side():
    connector = Dense(SHAPES)
    assert connector.vision_layers == (23, *range(24))
    connector.layers = torch.nn.Identity()
    features = tuple(torch.full((1, 4, 8), float(block)) for block in connector.vision_layers)
    assert connector(features)[0, 0, ::8].tolist() == [23, 5.5, 17.5]
    sparse = Dense(SHAPES, groups=3, average=False)
    assert sparse.vision_layers == (23, 7, 15, 23)
    assert sparse.layers[0].in_features == 4 * 8


def test_closed_gates_equal_the_plain_language_model_bit_for_bit():
    vlm = small_vlm(CrossAttention, SMALL["cross_attention"])
    assert_plain_logits(vlm, three_images(vlm))


def test_a_gated_layer_equals_that_of_llama_3():
    """With keys of 2 heads for 4 of queries; the first two positions stand before the image."""
    torch.manual_seed(0)
    config = MllamaTextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        num_hidden_layers=4,
        cross_attention_layers=[1],
        attn_implementation="eager",
    )
    theirs = MllamaCrossAttentionDecoderLayer(config, 1)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3)
    ours = CrossAttention(
        Shapes(5, (1, 5), 32, 32, 4), every=4, heads=4, kv_heads=2, head_width=8, mlp_ratio=1.75
    )
    names = {
        "norm": "input_layernorm",
        "to_q": "cross_attn.q_proj",
        "q_norm": "cross_attn.q_norm",
        "to_out": "cross_attn.o_proj",
        "attn_gate": "cross_attn_attn_gate",
        "ff_norm": "post_attention_layernorm",
        "up": "mlp.up_proj",
        "act": "mlp.gate_proj",
        "down": "mlp.down_proj",
        "ff_gate": "cross_attn_mlp_gate",
    }
    copy_weights(theirs, ours.gated["3"], names)
    names = {name: f"cross_attn.{other}" for name, other in KEY_NAMES.items()}
    copy_weights(theirs, ours.keys_values[0], names)
    patches, hidden = torch.randn(1, 5, 32), torch.randn(1, 6, 32)
    image_index = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    seen = (image_index >= 0)[:, None, :, None].float()
    expected = theirs(hidden, patches, torch.zeros(1, 1, 6, 5), None, seen)
    with torch.no_grad():
        level = ours.keys_values[0](patches)
        found = ours.inject(3, hidden, (level,), ImagePlaces(image_index, -torch.ones(1, 6)))
    torch.testing.assert_close(found[:, 2:], expected[:, 2:], atol=1e-5, rtol=1e-5)
    assert found[:, :2].equal(hidden[:, :2])


KEY_NAMES = {"to_k": "k_proj", "to_v": "v_proj", "k_norm": "k_norm"}


def copy_weights(theirs: torch.nn.Module, ours: torch.nn.Module, names: dict[str, str]) -> None:
    """Load every parameter of `ours` from the one of `theirs` that `names` gives."""
    state: dict[str, Tensor] = {}
    for key in ours.state_dict():
        name, dot, rest = key.partition(".")
        state[key] = theirs.state_dict()[f"{names[name]}{dot}{rest}"]
    ours.load_state_dict(state)


def test_keys_and_values_are_made_once_for_an_answer_of_any_length():
    vlm = small_vlm(CrossAttention, SMALL["cross_attention"])
    vlm.model.eval()
    made: list[int] = []
    vlm.connector.keys_values[0].register_forward_hook(lambda *_: made.append(1))
    vlm.generate(vlm.processor.collate_prompts([make_question(1)]), max_new_tokens=5)
    assert len(made) == 1


@pytest.mark.parametrize("name", ["deepstack", "cross_attention"])
def test_a_static_cache_gives_the_same_answers_as_a_growing_one(name):
    vlm = open_gates(build_small_vlm(load(name), SMALL[name])).to(torch.float64)
    vlm.model.eval()
    asked = [make_question(1), make_question(2, images=2, words=9), make_question(3, images=0)]
    batch = vlm.processor.collate_prompts(asked)
    growing, static = (
        vlm.generate(batch, max_new_tokens=5, compiled=compiled) for compiled in (False, True)
    )
    assert static == growing


@pytest.mark.parametrize("name", ["deepstack", "cross_attention"])
def test_images_in_the_second_and_third_turn_are_cached_as_they_are_computed(name):
    vlm = open_gates(build_small_vlm(load(name), SMALL[name])).to(torch.float64)
    assert_later_images_are_cached(vlm)


def test_a_listing_says_which_connector_does_not_fit(tmp_path, monkeypatch):
    """A user's own may read a block that the encoder of this size does not have."""
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors" / "far.py").write_text(
        "from vlbench.connector import Connector\n"
        "class Far(Connector):\n"
        "    vision_layers = (20,)\n"
        "    def __init__(self, shapes):\n"
        "        super().__init__()\n"
        "    def forward(self, features):\n"
        "        return features\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing, "_usable_connectors", lambda: ["far", "linear"])
    lines = listing.connector_cost_lines("tiny")
    assert lines[1].split() == ["far", "-", "-", "-", "-"] and lines[2].startswith("linear")
    assert lines[3].startswith("far does not fit: the connector reads block 20 ")
