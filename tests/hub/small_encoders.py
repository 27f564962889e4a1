"""Repositories of vision encoders as people fetch them from timm, with small random models.

The architectures are timm's own by name; `model_args`, which timm's config.json may have, make them
small. timm itself writes the files, and `timm.create_model` reads them as the reference.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .random_weights import write_json, write_weights
from .repository import HubRepository

SMALL_ARGS = {"embed_dim": 32, "depth": 3, "num_heads": 2}
FAMILIES = {
    "timm/vit_base_patch14_dinov2.lvd142m": 56,
    "timm/vit_base_patch14_reg4_dinov2.lvd142m": 56,
    "timm/vit_base_patch16_dinov3.lvd1689m": 64,
    "timm/vit_base_patch16_siglip_224.v2_webli": 64,
    "timm/vit_pe_core_base_patch16_224.fb": 64,
    "timm/aimv2_large_patch14_224.apple_pt": 56,
    "timm/vit_base_patch16_radio_v3.c_radio": 64,
    "timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k": 56,
    "timm/beitv2_base_patch16_224.in1k_ft_in22k": 64,
    "timm/vit_so150m_patch16_reg4_gap_256.sbb_e250_in12k": 64,
    "timm/naflexvit_base_patch16_siglip.v2_webli": 64,
}
"""Repositories, and the image sizes in pixels that their weights are for here."""
HYBRIDS = {
    "timm/fastvit_mci0.apple_mclip": "FastViT or MobileCLIP",
    "timm/vit_base_mci_224.apple_mclip": "FastViT or MobileCLIP",
    "timm/convnext_tiny.dinov3_lvd1689m": "convolutional network",
    "timm/vit_small_r26_s32_224.augreg_in21k": "a ViT behind one",
    "timm/swin_tiny_patch4_window7_224.ms_in1k": "network of stages",
    "timm/cait_s24_224.fb_dist_in1k": "cait.py",
}
"""Repositories of models that are no plain ViTs, and what is said of them."""
RADIO_GRID = 8  # rows of position embeddings in C-RADIO's file, more than its images have


def small_encoder_repositories(folder: Path) -> list[HubRepository]:
    """Return all of them; what they hold is made in `folder` when it is asked for."""
    plain = [
        HubRepository(name, folder / name, partial(write_timm, name=name, image_size=size))
        for name, size in FAMILIES.items()
    ]
    hybrids = [
        HubRepository(name, folder / name, partial(write_hybrid, name=name)) for name in HYBRIDS
    ]
    own = HubRepository("owner/small-clip", folder / "owner/small-clip", write_small_clip)
    return [*plain, *hybrids, own]


def architecture_of(name: str) -> str:
    """Return timm's architecture of a repository OWNER/ARCHITECTURE.TAG."""
    return name.split("/")[1].split(".")[0]


def write_timm(folder: Path, name: str, image_size: int) -> None:
    """Write what timm's `push_to_hf_hub` writes, with a classifier where the real one has one."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(len(name))
    args = {**SMALL_ARGS, "img_size": image_size}
    classes = timm.get_pretrained_cfg(name.split("/")[1]).num_classes and 5
    model = timm.create_model(name.split("/")[1], num_classes=classes, **args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_for_hf(model, folder, model_args=args, safe_serialization=True)
    if "radio" in name:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state["pos_embed"] = torch.randn(1, RADIO_GRID**2, SMALL_ARGS["embed_dim"])
        write_weights(state, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlibrary_name: timm\n---\n")


def write_hybrid(folder: Path, name: str) -> None:
    """Write the small file alone: nothing else may be asked for."""
    pixels = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    write_json(
        {"architecture": architecture_of(name), "num_classes": 0, "pretrained_cfg": pixels},
        folder / "config.json",
    )


def write_small_clip(folder: Path) -> None:
    """Write a repository of open_clip with a small ViT of its own, squashed images and text."""
    from open_clip.model import CLIP

    vision = {"image_size": 56, "layers": 3, "width": 32, "head_width": 16, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(5)
    model = CLIP(16, vision_cfg=vision, text_cfg=text)
    config: dict[str, Any] = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    said = {"model_cfg": config, "preprocess_cfg": {**pixels, "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    write_weights(dict(model.state_dict()), folder / "open_clip_model.safetensors")
