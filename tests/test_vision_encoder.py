"""Vision encoders: records of open_clip, CLIP and EVA-CLIP, at both image sizes."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from random_vlm import SMALL, make_batch, make_sample, small_vlm
from reference_records import GOLDENS, assert_gradient, assert_outputs, load_record
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva, checkpoint_filter_fn

from vlbench.connector import registry
from vlbench.model.loaded_vlm import assemble_vlm
from vlbench.model.vision_encoder import VisionEncoder, build_vision_encoder
from vlbench.model.weights import clip_layouts
from vlbench.model.weights.clip_folder import load_clip_folder

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "pad": False}


@register_model
def recorded_eva02(pretrained: bool = False, **kwargs: object) -> Eva:
    """Build the encoder of the record `eva_clip_tower_eva02`."""
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    own = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.6667}
    own |= {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    own |= {"use_rot_pos_emb": True, "ref_feat_shape": (6, 6), "global_pool": "token"}
    model = Eva(**{"img_size": 28, **own, **kwargs})
    model.default_cfg = {"input_size": (3, 28, 28), "pool_size": None}
    return model


def eva_encoder(layer: int, norm: bool = False) -> VisionEncoder:
    visual = TimmModel("recorded_eva02", 20, 28, "token", "", pretrained=False)
    state = checkpoint_filter_fn(load_record("eva_clip_tower_eva02", "state_dict"), visual.trunk)
    visual.trunk.load_state_dict(state)
    return VisionEncoder(visual, layer, norm, HALF)


def test_an_eva_encoder_gives_the_references_features_of_every_block():
    case = "eva_clip_tower_eva02"
    pixels, outputs = load_record(case, "inputs")["pixel_values"], load_record(case, "outputs")
    for layer in range(3):
        encoder = eva_encoder(layer)
        assert_outputs(encoder(pixels), outputs[f"block_{layer}"][:, 1:])
        encoder.class_token = True
        assert_outputs(encoder(pixels), outputs[f"block_{layer}"])
    encoder = eva_encoder(-1, norm=True)
    encoder.class_token = True
    assert_outputs(encoder(pixels), outputs["tokens_norm"])


def test_an_eva_encoder_gives_the_references_gradients():
    case = "eva_clip_tower_eva02"
    inputs, grads = load_record(case, "inputs"), load_record(case, "grads")
    encoder = eva_encoder(-1, norm=True)
    encoder.class_token = True
    pixels = inputs["pixel_values"].requires_grad_()
    tokens = encoder(pixels)
    loss = (tokens * inputs["ct.tokens_norm"]).sum()
    image = encoder.visual.trunk.head(tokens[:, 0])
    (loss + (image * inputs["ct.image_features"]).sum()).backward()
    assert_gradient(pixels.grad, grads["input.pixel_values"], "pixels")
    named = {name.removeprefix("param."): grad for name, grad in grads.items()}
    state = checkpoint_filter_fn(dict(named), encoder.visual.trunk)
    parameters = dict(encoder.visual.trunk.named_parameters())
    compared = [name for name in state if name in parameters]
    assert len(compared) > 60
    for name in compared:
        assert_gradient(parameters[name].grad, state[name], name)


def test_a_resized_eva_encoder_is_one_that_was_built_at_that_size():
    small, large = eva_encoder(-2), TimmModel("recorded_eva02", 20, 28, "token", "")
    large.trunk.set_input_size((56, 56))
    small.set_image_size(56)
    assert small.grid == (8, 8) and small.image_size == 56
    built = recorded_eva02(img_size=56, num_classes=20)
    assert small.visual.trunk.rope.get_embed().equal(built.rope.get_embed())
    pixels = torch.randn(1, 3, 56, 56)
    built.load_state_dict(small.visual.trunk.state_dict())
    _, blocks = built.forward_intermediates(pixels, output_fmt="NLC")
    assert_outputs(small(pixels), blocks[-2])


def test_openclips_tokens_are_those_before_or_after_the_final_norm():
    """OpenFlamingo's open_clip gave tokens before the norm; later versions give them after it."""
    case = "flamingo_openclip_tokens"
    visual = VisionTransformer(28, 7, 24, 3, 3, 4.0, output_dim=20)
    state = load_record(case, "state_dict")
    visual = VisionTransformer(
        28, 7, 24, sum(key.endswith("ln_1.bias") for key in state), 3, _ratio(state), output_dim=20
    )
    visual.load_state_dict(state)
    pixels = load_record(case, "inputs")["pixel_values"]
    before, after = VisionEncoder(visual, -1, False, HALF), VisionEncoder(visual, -1, True, HALF)
    assert_outputs(before(pixels), load_record(case, "outputs_open_clip_2.16")["tokens"])
    assert_outputs(after(pixels), load_record(case, "outputs_open_clip_3.3")["tokens"])
    larger = load_record("posemb", "tower_56px")
    after.set_image_size(56)
    assert_outputs(after(larger["pixel_values"]), larger["open_clip_tokens"])


def _ratio(state: dict[str, torch.Tensor]) -> float:
    width, inner = state["transformer.resblocks.0.mlp.c_proj.weight"].shape
    return inner / width


@pytest.mark.parametrize("case", ["4to8", "16to32", "3to5", "8to4", "16to24"])
def test_position_embeddings_are_resized_as_open_clip_does(case):
    table, expected = load_record("posemb", "inputs")[case], load_record("posemb", "outputs_libs")
    old = round((len(table) - 1) ** 0.5)
    new = round((len(expected[f"{case}/open_clip_3.3"]) - 1) ** 0.5)
    visual = VisionTransformer(old * 2, 2, table.shape[1], 2, 1, 1.0, output_dim=4)
    visual.positional_embedding.data = table
    encoder = VisionEncoder(visual, -1, False, HALF)
    encoder.set_image_size(new * 2)
    assert_outputs(encoder.visual.positional_embedding, expected[f"{case}/open_clip_3.3"])


def test_features_of_a_clip_folder_are_those_that_llava_selects(tmp_path):
    case = "clip_feature_select"
    config = json.loads((GOLDENS / case / "meta.json").read_text())["hyperparameters"]
    config |= {"model_type": "clip_vision_model", "layer_norm_eps": 1e-5, "projection_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_record(case, "state_dict"), tmp_path / "model.safetensors")
    plan = clip_layouts.parse_vision_config(config, tmp_path)
    inputs, outputs = load_record(case, "inputs"), load_record(case, "outputs")
    for layer in (-1, -2):
        encoder = VisionEncoder(clip_layouts.build_clip_vit(plan), layer, False, HALF)
        load_clip_folder(encoder, "a CLIP", tmp_path)
        assert_outputs(encoder(inputs["pixel_values"]), outputs[f"select{layer}_patch"])
        encoder.class_token = True
        assert_outputs(encoder(inputs["pixel_values"]), outputs[f"select{layer}_cls_patch"])


@pytest.mark.parametrize("name", ["EVA02-L-14-336", "EVA01-g-14", "EVA02-E-14", "EVA02-B-16"])
def test_evas_of_open_clip_take_any_image_size(name):
    with torch.device("meta"):
        encoder = build_vision_encoder(name, "random")
        for side in (224, 448):
            encoder.set_image_size(side)
            rows = side // (16 if name == "EVA02-B-16" else 14)
            assert encoder.grid == (rows, rows) and encoder.image_size == side
            assert encoder(torch.empty(1, 3, side, side)).shape == (
                1,
                rows**2,
                encoder.feature_width,
            )


@pytest.mark.parametrize("name", list(registry.connector_locations()))
def test_every_connector_stands_on_an_eva_encoder(name):
    other = small_vlm(registry.load_connector(name), SMALL.get(name))
    encoder = VisionEncoder(eva_encoder(-2).visual, -2, False, HALF)
    options = {**other.model.connector_options, **({"head_width": 12} if name == "eva" else {})}
    vlm = assemble_vlm(
        encoder,
        type(other.connector),
        options,
        other.language,
        other.tokenizer,
        other.processor.template,
        512,
    )
    for one in other.model._inject_hooks:
        one.remove()
    vlm.model.zero_grad()
    for side in (28, 56):
        vlm.set_image_size(side)
        out = vlm(make_batch(vlm, [[make_sample(1, images=2)]]))
        out.loss_sum.backward()
        assert out.loss_sum.isfinite()
        used = [p for p in vlm.vision.used_parameters() if p.grad is not None and p.grad.any()]
        flamingo = bool(vlm.connector.inject_layers)  # its gates are closed
        assert used or flamingo
