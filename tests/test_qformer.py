"""The Q-Former: LAVIS' numbers from LAVIS' weights."""

from __future__ import annotations

import re

import pytest
import torch
from reference_records import assert_gradient, assert_outputs, load_record

from vlbench.connector import registry
from vlbench.connector.base import Shapes

QFormer = registry.load_connector("qformer")
SMALL = {"queries": 6, "width": 32, "layers": 4, "heads": 4, "ffn_width": 64}
SHAPES = Shapes(patches=8, grid=(2, 4), vision_width=24, lm_width=48, lm_layers=2)
CASE = "qformer_query_only"


def test_outputs_and_gradients_equal_the_reference():
    connector = QFormer(SHAPES, **SMALL)
    connector.load_reference(load_record(CASE, "llm_state_dict"))
    inputs = load_record(CASE, "llm_inputs")
    features = inputs["vision_features"].requires_grad_()
    out = connector(features)
    assert_outputs(out, load_record(CASE, "llm_outputs")["inputs_llm"])
    (out * inputs["ct.inputs_llm"]).sum().backward()
    grads = load_record(CASE, "llm_grads")
    assert_gradient(features.grad, grads["input.vision_features"], "features")
    parameters = dict(connector.named_parameters())
    module = __import__(QFormer.__module__, fromlist=["LAVIS"])
    compared = 0
    for name, grad in grads.items():
        key = name.removeprefix("param.")
        for pattern, replacement in module.LAVIS_RENAMES:
            key = re.sub(pattern, replacement, key)
        # the bias of keys has no gradient in truth: softmax does not see it
        if name.startswith("param.") and not key.endswith("key.bias"):
            assert_gradient(parameters[key].grad, grad, key)
            compared += 1
    assert compared > 60


def test_weights_of_another_width_are_named():
    connector = QFormer(SHAPES, **{**SMALL, "width": 64})
    with pytest.raises(ValueError, match="tensor query_tokens has shape"):
        connector.load_reference(load_record(CASE, "llm_state_dict"))


def test_a_projection_to_another_language_model_stays_as_it_is():
    shapes = Shapes(patches=8, grid=(2, 4), vision_width=24, lm_width=40, lm_layers=2)
    connector = QFormer(shapes, **SMALL)
    before = connector.projection.weight.clone()
    connector.load_reference(load_record(CASE, "llm_state_dict"))
    assert torch.equal(connector.projection.weight, before)
    theirs = load_record(CASE, "llm_state_dict")["query_tokens"]
    assert torch.equal(connector.query_tokens, theirs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 5}, "heads=5 must divide width=32"),
        ({"queries": 0}, "queries is 0"),
        ({"cross_every": 9}, "cross_every is 9; allowed are 1 to layers=4"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        QFormer(SHAPES, **{**SMALL, **options})


def test_the_default_shapes_have_the_references_parameters():
    with torch.device("meta"):
        connector = QFormer(Shapes(256, (16, 16), 1408, 4096, 32))
    count = sum(p.numel() for p in connector.qformer.parameters())
    assert round(count / 1e6, 1) == 105.1


@pytest.mark.parametrize(("width", "spread"), [(768, 0.02), (192, 0.04)])
def test_a_narrower_bert_begins_with_larger_weights(width, spread):
    torch.manual_seed(0)
    shapes = Shapes(patches=4, grid=(2, 2), vision_width=32, lm_width=16, lm_layers=2)
    connector = QFormer(shapes, queries=4, width=width, layers=1, heads=4, cross_every=1)
    weight = connector.qformer.encoder.layer[0].crossattention.attention.query.weight
    assert float(weight.detach().std()) == pytest.approx(spread, rel=0.05)
