"""EVA: the reference's block, its masks draw for draw, and its loss."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm
from reference_records import assert_gradient, assert_outputs, load_record
from timm.layers import RotaryEmbeddingCat

from vlbench.connector import registry
from vlbench.connector.base import Shapes

Eva = registry.load_connector("eva")
MODULE = __import__(Eva.__module__, fromlist=["block_mask"])
SMALL = {"layers": 1, "head_width": 8}
NAMES = {
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
    "mlp.ffn_ln": "mlp.norm",
}
NAMES |= {"attn.inner_attn_ln": "attn.norm", "attn.q_bias": "attn.q_proj.bias"}
NAMES |= {"attn.v_bias": "attn.v_proj.bias"}


def ours(name: str) -> str:
    for theirs, here in NAMES.items():
        name = name.replace(theirs, here)
    return name


def test_the_block_equals_the_reference():
    connector = Eva(Shapes(16, (4, 4), 48, 40, 2), layers=1, head_width=12)
    block = connector.blocks[0]
    block.attn.num_prefix_tokens = 1  # the record has a class token, the connector has none
    state = {
        ours(k): v for k, v in load_record("eva_block", "state_dict").items() if "rope" not in k
    }
    block.load_state_dict(state)
    rope = RotaryEmbeddingCat(12, in_pixels=False, feat_shape=[4, 4], ref_feat_shape=[6, 6])
    inputs = load_record("eva_block", "inputs")
    x = inputs["x"].requires_grad_()
    out = block(x, rope=rope.get_embed())
    assert_outputs(out, load_record("eva_block", "outputs")["out"])
    (out * inputs["ct.out"]).sum().backward()
    grads = load_record("eva_block", "grads")
    assert_gradient(x.grad, grads["input.x"], "x")
    parameters = dict(block.named_parameters())
    for name, grad in grads.items():
        if name.startswith("param."):
            assert_gradient(parameters[ours(name.removeprefix("param."))].grad, grad, name)


@pytest.mark.parametrize(
    ("name", "side", "count", "least"),
    [
        ("grid16_n105_min16", 16, 105, 16),
        ("grid16_n105_min4", 16, 105, 4),
        ("grid8_n26_min4", 8, 26, 4),
    ],
)
def test_masks_are_drawn_as_in_the_reference(name, side, count, least):
    for seed, expected in enumerate(load_record("eva_mim_masks", "masks")[name]):
        mask = MODULE.block_mask(random.Random(seed), side, side, count, least)
        assert torch.equal(mask, expected.bool())


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_loss_is_the_references(weight, monkeypatch):
    """The record has the predictions at 11 hidden patches: what blocks and head would give."""
    record = load_record("eva_mim_loss", "inputs")
    found, told = record["outputs"].requires_grad_(), record["labels"].requires_grad_()
    connector = Eva(Shapes(16, (4, 4), 20, 40, 2), layers=1, head_width=4, mask_weight=weight)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask.view(-1)[torch.randperm(32, generator=torch.Generator().manual_seed(0))[:11]] = True
    predicted, features = torch.randn(2, 16, 20), torch.randn(2, 16, 20)  # elsewhere it is noise
    predicted[mask], features[mask] = found, told
    seen = []
    monkeypatch.setattr(connector, "patch_masks", lambda *_: mask)
    monkeypatch.setattr(connector, "run_blocks", lambda inputs: (seen.append(inputs), predicted)[1])
    connector.head = torch.nn.Identity()
    value, count = connector.losses(features, None, batch_of_names(["a", "b"]))["eva"]
    assert int(count) == 11
    assert_outputs(value / count, weight * load_record("eva_mim_loss", "outputs")["loss_mim"])
    (value / count * record["ct.loss_mim"]).backward()
    expected = weight * load_record("eva_mim_loss", "grads")["input.outputs"]
    assert_gradient(found.grad, expected, "predictions")
    assert told.grad is None  # the features that are told are no way to make it easy
    (inputs,) = seen
    assert torch.equal(inputs[mask], connector.mask_token.expand(11, 20))
    assert torch.equal(inputs[~mask], features[~mask])


def batch_of_names(names: list[str]) -> SimpleNamespace:
    return SimpleNamespace(image_ids=names)


def test_what_is_hidden_follows_from_step_and_image_alone():
    vlm = small_vlm(Eva, SMALL)
    samples = [make_sample(1), make_sample(2, images=2), make_sample(3, images=0)]
    packed = make_batch(vlm, [samples])
    alone = [make_batch(vlm, [[one]]) for one in samples[::-1]]
    torch.manual_seed(7)
    together = vlm(packed).extra["eva"]
    apart = [vlm(batch).extra["eva"] for batch in alone]
    torch.testing.assert_close(together[0], sum(value for value, _ in apart))
    assert together[1] == sum(count for _, count in apart) > 0
    assert apart[0][1] == 0 == apart[0][0]  # text alone
    torch.manual_seed(8)
    assert vlm(packed).extra["eva"][0] != together[0]


def test_the_weight_of_the_objective_matters():
    shares = []
    for weight in (0.0, 0.5, 1.0):
        vlm = small_vlm(Eva, {**SMALL, "mask_weight": weight})
        batch = make_batch(vlm, [[make_sample(1)]])
        torch.manual_seed(7)
        shares.append(vlm(batch).extra.get("eva"))
    assert shares[0] is None
    torch.testing.assert_close(2 * shares[1][0], shares[2][0])


def test_the_encoder_is_not_taught_to_be_easy():
    vlm = small_vlm(Eva, SMALL)
    vlm(make_batch(vlm, [[make_sample(1)]])).extra["eva"][0].backward()
    assert all(p.grad is None for p in vlm.vision.parameters())
    assert vlm.connector.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; it must lie between 0 and 1"),
        ({"head_width": 5}, "head_width is 5"),
        ({"layers": 0}, "layers is 0"),
        ({"mask_weight": -1.0}, "mask_weight is -1.0"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Eva(Shapes(16, (4, 4), 48, 40, 2), **{**SMALL, **options})
