"""A small random NaFlexViT, and models with it whose images keep their aspect ratios."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_vlm import CHECKPOINT, SMALL, NoiseImage, make_sample

from vlbench.connector import registry
from vlbench.contract_checks.small_model import build_small_language
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.sample import Sample
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import ViewSettings
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.timm_config import TimmConfig
from vlbench.model.vision_encoder import VisionEncoder, build_encoder_from_config

PATCH, SIDE = 8, 32  # pixels: up to 16 patches
ARCHITECTURE = "naflexvit_base_patch16_siglip"
ARGS = {
    "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2, "pos_embed_grid_size": [3, 3],
}  # fmt: skip
SIZES = ((60, 20), (32, 32), (30, 90), (24, 40))
"""Of images in pixels: on grids of 2 x 6, 4 x 4, 6 x 2 and 5 x 3 patches."""
GRIDS = ((2, 6), (4, 4), (6, 2), (5, 3))


def native_encoder(**changes: Any) -> VisionEncoder:
    """Return a small NaFlexViT, always the same; `changes` are arguments of timm's."""
    torch.manual_seed(0)
    args = {**ARGS, **changes}
    half = (0.5, 0.5, 0.5)
    config = TimmConfig(ARCHITECTURE, args, SIDE, half, half, "squash", "bilinear", 1.0)
    encoder = build_encoder_from_config(config, "small", -2, False)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return encoder


def write_native_encoder(folder: Path) -> Path:
    """Write timm's small file of it, for `vision.name=FOLDER vision.weights=random`."""
    folder.mkdir(parents=True)
    pixels = {
        "input_size": [3, SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash",
    }  # fmt: skip
    said = {"architecture": ARCHITECTURE, "model_args": ARGS, "pretrained_cfg": pixels}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def native_vlm(connector: str = "llava_mlp", native: bool = True) -> LoadedVLM:
    """Return a small model in training mode, always the same; without `native` of squares."""
    encoder = native_encoder()
    tokenizer = Tokenizer.load(CHECKPOINT)
    vlm = assemble_vlm(
        encoder,
        registry.load_connector(connector),
        dict(SMALL.get(connector) or {}),
        build_small_language(tokenizer.embedding_rows),
        tokenizer,
        CHAT_TEMPLATES["yi_vl"],
        512,
        ViewSettings(None) if native else None,
    )
    vlm.vision.requires_grad_(False)
    for parameter in vlm.vision.used_parameters():  # DDP waits for a gradient of all others, too
        parameter.requires_grad_(True)
    return vlm.train()


def native_sample(number: int, images: int = 1) -> Sample:
    """Return a conversation whose images differ in size."""
    sample = make_sample(number, images)
    sized = [NoiseImage(one.seed, SIZES[one.seed % len(SIZES)]) for one in sample.images]
    return replace(sample, images=tuple(sized))
