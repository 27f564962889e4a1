"""Mixed: another connector's tokens in the text, and gated cross-attention to them."""

from __future__ import annotations

import pytest
import torch
from random_vlm import make_batch, make_sample, small_vlm

from vlbench.connector import registry
from vlbench.connector.base import Shapes

Mixed = registry.load_connector("mixed")
SMALL = {"tokens": "llava_mlp", "every": 2, "heads": 2, "head_width": 8}
SHAPES = Shapes(patches=4, grid=(2, 2), vision_width=32, lm_width=32, lm_layers=3)


def test_closed_gates_leave_the_other_connector_alone():
    mixed, plain = small_vlm(Mixed, SMALL), small_vlm(registry.load_connector("llava_mlp"))
    plain.connector.load_state_dict(mixed.connector.inner.state_dict())
    batch = make_batch(mixed, [[make_sample(1), make_sample(2, images=2)]])
    with torch.no_grad():
        assert mixed(batch).loss_sum.equal(plain(batch).loss_sum)
        mixed.connector.blocks["1"].attn_gate.fill_(0.5)
        assert not mixed(batch).loss_sum.equal(plain(batch).loss_sum)


def test_the_other_connector_takes_its_options_and_keeps_its_losses():
    inner = Mixed(SHAPES, tokens="eva", options=("layers=1", "head_width=8"), every=3).inner
    assert len(inner.blocks) == 1 and inner.mask_weight == 1.0
    vlm = small_vlm(Mixed, SMALL | {"tokens": "eva", "options": ("layers=1", "head_width=8")})
    assert "eva" in vlm(make_batch(vlm, [[make_sample(1)]])).extra


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": "flamingo", "options": ("every=1",)}, "feeds decoder layers itself"),
        ({"tokens": "lava_mlp"}, "Did you mean 'llava_mlp'"),
        ({"tokens": "mixed"}, "tokens is 'mixed'; known"),
        ({"options": ("dept=1",)}, "has no option 'dept'.*Did you mean 'depth'"),
        ({"options": ("depth",)}, "'depth' is not KEY=VALUE"),
        ({"options": ("depth=x",)}, "depth must be a whole number"),
        ({"every": 4}, "every is 4; allowed are 1 to 3"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Mixed(SHAPES, **{**SMALL, **options})
