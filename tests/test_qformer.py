"""The Q-Former: LAVIS' numbers from LAVIS' weights, and InstructBLIP's from transformers'."""

from __future__ import annotations

import re

import pytest
import torch
from reference_records import assert_gradient, assert_outputs, load_record
from safetensors.torch import save_file
from torch import Tensor
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from vlbench.connector import registry
from vlbench.connector.base import Shapes
from vlbench.connector.question import Question
from vlbench.model.weights.connector_reference import ReferenceWeights, load_reference_weights

QFormer = registry.load_connector("qformer")
SMALL = {"queries": 6, "width": 32, "layers": 4, "heads": 4, "ffn_width": 64}
SHAPES = Shapes(patches=8, grid=(2, 4), vision_width=24, lm_width=48, lm_layers=2)
CASE = "qformer_query_only"
TEXT_SIDE = re.compile(r"text\.|.*\.layer\.\d+\.(intermediate|output)\.")


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


INSTRUCT = {"queries": 6, "width": 32, "layers": 4, "heads": 4, "ffn_width": 64}
INSTRUCT |= {"question_length": 12}


def instruct_blip() -> tuple[InstructBlipQFormerModel, dict[str, Tensor]]:
    """Return a random Q-Former of transformers, and the weights of an InstructBLIP around it."""
    torch.manual_seed(4)
    config = InstructBlipQFormerConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
        encoder_hidden_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    theirs = InstructBlipQFormerModel(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    rest = {
        "query_tokens": torch.randn(1, 6, 32),
        "vision_model.post_layernorm.weight": torch.rand(24) + 0.5,
        "vision_model.post_layernorm.bias": torch.randn(24),
        "vision_model.encoder.layers.0.layer_norm1.weight": torch.ones(24),
        "language_projection.weight": torch.randn(48, 32),
        "language_projection.bias": torch.randn(48),
        "language_model.model.norm.weight": torch.ones(48),
    }
    own = {f"qformer.{name}": tensor for name, tensor in theirs.state_dict().items()}
    return theirs, own | rest


def test_queries_that_read_a_question_equal_those_of_instruct_blip():
    theirs, weights = instruct_blip()
    connector = registry.load_connector("instruct_qformer")(SHAPES, **INSTRUCT)
    loaded = connector.load_reference(weights)
    assert set(connector.state_dict()) - loaded == {
        f"text.{layer}.{kind}" for layer in ("norm", "projection") for kind in ("weight", "bias")
    }
    connector.text.norm = connector.text.projection = torch.nn.Identity()
    ids = torch.randint(0, 50, (3, 9))
    lengths = torch.tensor([9, 4, 0])
    words = theirs.embeddings.word_embeddings(ids).detach()
    features = torch.randn(3, 8, 24, requires_grad=True)
    ours = connector(features, Question(words, lengths))
    mask = torch.cat([torch.ones(3, 6), torch.arange(9) < lengths[:, None]], dim=1)
    normed = connector.ln_vision(features)
    states = theirs(
        input_ids=ids,
        attention_mask=mask.long(),
        query_embeds=weights["query_tokens"].expand(3, -1, -1),
        encoder_hidden_states=normed,
        encoder_attention_mask=torch.ones(3, 8),
    ).last_hidden_state
    expected = connector.projection(states[:, :6])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(ours)
    grads = [torch.autograd.grad((out * probe).sum(), features)[0] for out in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_every_tensor_of_instruct_blip_is_loaded_or_left_out_by_name(tmp_path):
    _, weights = instruct_blip()
    save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / "x.safetensors")
    for name, options in (("instruct_qformer", INSTRUCT), ("qformer", SMALL)):
        connector = registry.load_connector(name)(SHAPES, **options)
        files = ReferenceWeights([tmp_path / "x.safetensors"])
        said = load_reference_weights(connector, files, name, "init")
        assert "language_model (1)" in said and "vision_model (1)" in said
        assert torch.equal(connector.query_tokens, weights["query_tokens"])
        layer, theirs = connector.qformer.encoder.layer[1], "qformer.encoder.layer.1."
        read = theirs + "intermediate.dense.weight"
        assert (read in files.used_names) == (name == "instruct_qformer")
        if name == "instruct_qformer":
            assert torch.equal(layer.intermediate.dense.weight, weights[read])
            positions = weights["qformer.embeddings.position_embeddings.weight"]
            assert torch.equal(connector.text.positions, positions[:12])


def test_blip2_fills_all_but_what_reads_the_question():
    """As a file of LAVIS' first stage does, whose text side has layers of its own."""
    connector = registry.load_connector("instruct_qformer")(SHAPES, **INSTRUCT)
    loaded = connector.load_reference(load_record(CASE, "llm_state_dict"))
    assert {name for name in connector.state_dict() if not TEXT_SIDE.match(name)} == loaded


def test_the_default_instruct_qformer_has_the_references_layers():
    with torch.device("meta"):
        shapes = Shapes(256, (16, 16), 1408, 4096, 32)
        connector = registry.load_connector("instruct_qformer")(shapes)
        theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig())
    own = sum(p.numel() for p in connector.qformer.encoder.parameters())
    last = theirs.encoder.layer[-1]
    unread = [*last.intermediate.parameters(), *last.output.parameters()]
    count = sum(p.numel() for p in theirs.encoder.parameters()) - sum(p.numel() for p in unread)
    assert own == count
