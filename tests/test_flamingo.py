"""Flamingo: the reference's resampler, gated blocks and decoder, from its own weights."""

from __future__ import annotations

import json

import pytest
import torch
from golden_release import CHECKPOINT
from random_vlm import NoiseImage, assert_plain_logits, make_sample, small_vlm
from random_vlm import make_batch as small_batch
from reference_records import (
    GOLDENS,
    assert_gradient,
    assert_gradients,
    assert_outputs,
    load_record,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.connector import registry
from vlbench.connector.base import Shapes
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.image_processing import ImageTransform
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, Sample
from vlbench.data.sample_encoding import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.packed_attention import PACKED_ATTENTION

Flamingo = registry.load_connector("flamingo")
SMALL = {"latents": 5, "depth": 2, "heads": 4, "head_width": 8}
MODULE = __import__(Flamingo.__module__, fromlist=["PerceiverResampler", "GatedBlock"])
CASE = "flamingo_decoder_every1"
IMAGE, END = 69, 68


def test_the_resampler_equals_the_reference():
    perceiver = MODULE.PerceiverResampler(32, latents=5, depth=2, heads=4, head_width=8, mult=4)
    perceiver.load_state_dict(load_record("flamingo_perceiver", "plain_state_dict"))
    inputs = load_record("flamingo_perceiver", "plain_inputs")
    features = inputs["x"].flatten(0, 2).requires_grad_()
    out = perceiver(features)
    assert_outputs(
        out, load_record("flamingo_perceiver", "plain_outputs")["latents_out"].flatten(0, 1)
    )
    (out * inputs["ct.latents_out"].flatten(0, 1)).sum().backward()
    grads = load_record("flamingo_perceiver", "plain_grads")
    assert_gradients(perceiver, grads)
    assert_gradient(features.grad, grads["input.x"].flatten(0, 2), "x")


def test_a_gated_block_equals_the_reference():
    block = MODULE.GatedBlock(32, 24, heads=4, head_width=8, mult=4)
    block.load_state_dict(load_record("flamingo_gated_xattn", "immediate_state_dict"))
    inputs = load_record("flamingo_gated_xattn", "immediate_inputs")
    seen = inputs["media_locations"].long().cumsum(1)  # 0: none yet
    sees = torch.where(seen > 0, seen - 1 + 3 * torch.arange(3)[:, None], -1)
    hidden = inputs["x"].requires_grad_()
    media = inputs["media"].flatten(0, 1).requires_grad_()
    out = block(hidden, media, sees)
    assert_outputs(out, load_record("flamingo_gated_xattn", "immediate_outputs")["out"])
    attended = block.attn(hidden, media, sees)
    assert (attended[sees < 0] == 0).all() and (sees < 0).any()
    expected = load_record("flamingo_gated_xattn", "immediate_attn_only")["attn_out_before_gate"]
    assert_outputs(attended, expected)
    (out * inputs["ct.out"]).sum().backward()
    grads = load_record("flamingo_gated_xattn", "immediate_grads")
    assert_gradients(block, grads)
    assert_gradient(hidden.grad, grads["input.x"], "x")
    assert_gradient(media.grad, grads["input.media"].flatten(0, 1), "media")


class Recorded(nn.Module):
    """A vision encoder whose features are its pixels."""

    grid, feature_width, has_class_token, image_size, dtype = (2, 3), 16, False, 1, torch.float32
    transform = ImageTransform(4, 4, (0.0,) * 3, (1.0,) * 3)  # no image is opened
    block_index = 0

    def blocks(self) -> list[nn.Module]:
        return [self]

    def encoders(self) -> list[nn.Module]:
        return [self]

    def read_blocks(self, layers: tuple[int, ...], class_token: bool) -> None:
        assert not layers and not class_token

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


def reference_vlm() -> LoadedVLM:
    config = LlamaConfig(**json.loads((GOLDENS / CASE / "meta.json").read_text())["lm_config"])
    config._attn_implementation = PACKED_ATTENTION
    language = LlamaForCausalLM(config)
    vlm = assemble_vlm(
        Recorded(),
        Flamingo,
        {"every": 1},
        language,
        Tokenizer.load(CHECKPOINT),
        CHAT_TEMPLATES["yi_vl"],
        256,
    )
    start = "lang_encoder."
    state = {
        key.removeprefix(start).replace(".decoder_layer.", "."): value
        for key, value in load_record(CASE, "state_dict_lm").items()
    }
    language.load_state_dict(state)
    weights = load_record(CASE, "state_dict_perceiver") | load_record(CASE, "state_dict_gated")
    vlm.connector.load_reference(
        weights | {"image_embedding": language.get_input_embeddings().weight.data[IMAGE].clone()}
    )
    return vlm


def batch_of(ids: Tensor, mask: Tensor, vision: Tensor) -> PackedBatch:
    """Return the reference's batch as ours: places for its image tokens, padding as it is."""
    real = mask.bool()
    images = ((ids == IMAGE) & real).long().cumsum(1)
    first = vision.shape[1] * torch.arange(len(ids))[:, None]
    before = (~real).long().cumprod(1).sum(1).tolist()
    lengths = [
        [n for n in (pad, int(row.sum())) if n] for pad, row in zip(before, real, strict=True)
    ]
    return PackedBatch(
        input_ids=torch.where(ids == IMAGE, IMAGE_TOKEN_INDEX, ids),
        labels=None,
        position_ids=real.long().cumsum(1).sub(1).clamp(min=0),
        sample_index=torch.where(real, torch.arange(len(ids))[:, None], -1),
        image_index=torch.where(images > 0, images - 1 + first, -1),
        pixels=vision.flatten(0, 2).flatten(2).transpose(1, 2).contiguous(),
        sample_ids=[str(row) for row in range(len(ids))],
        sample_lengths=lengths,
        supervised_token_count=0,
    )


def test_the_decoder_equals_the_reference_in_logits_loss_and_gradients():
    vlm, inputs = reference_vlm(), load_record(CASE, "inputs")
    batch = batch_of(inputs["lang_x"], inputs["attention_mask"], inputs["vision_x"])
    outputs = load_record(CASE, "outputs")
    assert_outputs(vlm.visual(batch), outputs["perceiver_out"].flatten(0, 1))
    logits = vlm(batch).logits
    real = inputs["attention_mask"].bool()
    assert_outputs(logits[real], outputs["logits"][real])
    labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    batch.labels, batch.supervised_token_count = labels, int((labels != IGNORE_INDEX).sum())
    out = vlm(batch)
    loss = out.loss_sum / out.tokens
    assert_outputs(loss, outputs["loss"])
    loss.backward()
    parameters = dict(vlm.connector.named_parameters())
    for name, grad in (
        load_record(CASE, "grads_perceiver") | load_record(CASE, "grads_gated")
    ).items():
        key = name.removeprefix("param.")
        if key.startswith("lang_encoder"):
            layer, rest = key.split("layers.")[1].split(".gated_cross_attn_layer.")
            key = f"blocks.{layer}.{rest}"
        assert_gradient(parameters[key].grad, grad, key)


def test_greedy_generation_equals_the_reference():
    vlm, record = reference_vlm(), load_record(CASE, "generation")
    batch = batch_of(record["lang_x"], record["attention_mask"], record["vision_x"])
    # the reference never meets an end of text here; ours would stop, so compare up to there
    new = vlm.generate(batch, max_new_tokens=16)
    expected = record["greedy_new_tokens"].tolist()
    assert [row[: len(ours)] for row, ours in zip(expected, new, strict=True)] == new
    assert all(len(row) == 16 for row in new)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 5}, "every is 5; allowed are 1 to 4"),
        ({"latents": 0}, "latents is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
    ],
)
def test_impossible_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Flamingo(Shapes(6, (2, 3), 16, 32, 4), **options)


def test_the_default_shapes_have_the_references_parameters():
    with torch.device("meta"):
        connector = Flamingo(Shapes(256, (16, 16), 1280, 4096, 32))
    count = sum(p.numel() for p in connector.perceiver.parameters())
    assert round(count / 1e6, 1) == 94.5
    block = sum(p.numel() for p in connector.blocks["3"].parameters())
    assert round(block / 1e6) == 140 and len(connector.blocks) == 8


def test_closed_gates_equal_the_plain_language_model_bit_for_bit():
    vlm = small_vlm(Flamingo, {"every": 1, "latents": 3, "depth": 1, "heads": 2, "head_width": 8})
    batch = small_batch(vlm, [[make_sample(1), make_sample(2, images=2), make_sample(3, images=0)]])
    assert_plain_logits(vlm, batch)


def test_recomputing_keeps_nothing_of_the_gated_blocks():
    """They run again in the backward pass, wherever transformers calls a layer's hooks."""
    vlm = small_vlm(Flamingo, SMALL | {"every": 1})
    for block in vlm.connector.blocks.values():
        block.ff_gate.data.fill_(0.5)
    calls = []
    block = vlm.connector.blocks["1"]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = small_batch(vlm, [[make_sample(1)]])
    vlm(batch).loss_sum.backward()
    assert len(calls) == 1
    vlm.model.enable_activation_checkpointing("full")
    vlm(batch).loss_sum.backward()
    assert len(calls) >= 3


def test_beams_are_refused_and_places_are_never_written():
    """A generated place would be another image's; the ids of places are below all others."""
    vlm = small_vlm(Flamingo, SMALL | {"every": 1})
    ask = Sample("s", (ChatTurn("human", f"{IMAGE_PLACEHOLDER}\nwhat?"),), (NoiseImage(1),))
    batch = vlm.processor.collate_prompts([ask])
    with pytest.raises(UserError, match="no option 'num_beams'.*no search over beams"):
        vlm.generate(batch, num_beams=3)
    drawn = vlm.generate(batch, max_new_tokens=64, temperature=1000.0)
    assert all(0 <= token < vlm.tokenizer.embedding_rows for token in drawn[0])


def test_gated_blocks_before_other_layers_are_refused():
    own = small_vlm(Flamingo, SMALL | {"every": 1}).connector.state_dict()
    theirs = {name: value for name, value in own.items() if name.startswith("perceiver.")}
    for name, value in own.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            theirs[f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer.{rest}"] = value
    connector = small_vlm(Flamingo, SMALL | {"every": 1}).connector
    connector.load_reference(theirs)
    assert connector.blocks["2"].ff[1].weight.equal(own["blocks.2.ff.1.weight"])
    with pytest.raises(ValueError, match=r"before layers \[0, 1, 2\].*their every is 1"):
        small_vlm(Flamingo, SMALL | {"every": 2}).connector.load_reference(theirs)
