"""A vision encoder of timm, as timm's own config.json describes it, before any weight is read.

Its repositories on a hub, and folders that `timm.models.save_for_hf` writes, hold config.json with
the architecture, its arguments and the preprocessing, beside model.safetensors. A checkpoint keeps
the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlbench.compat.vision_internals import (
    build_timm_encoder,
    timm_architecture_names,
    timm_module_name,
)
from vlbench.encoder_names import hybrid_reason
from vlbench.errors import UserError, suggest_name
from vlbench.model.vision_config import check_image_grid, parse_interpolation, parse_rgb_stats
from vlbench.text_files import read_json, write_atomically

TIMM_CONFIG = "config.json"
"""timm's own name of the file that describes a model."""
TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of timm's weights in a folder and on a hub, in the order of preference."""
PLAIN_VIT_MODULES = ("vision_transformer", "eva", "beit", "deit", "naflexvit", "miniature_eva")
"""Files of timm whose models are equal blocks over one grid of patches, and our miniature's."""
DROP_RATES = (
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    "drop_path_rate",
)
"""timm's arguments for what training leaves out at random."""
CROP_MODES = {"center": "crop", "squash": "squash", "border": "pad"}
"""timm's `crop_mode`, which makes an image a square, and our word for it."""


@dataclass(frozen=True)
class TimmConfig:
    """A vision encoder of timm without its weights."""

    architecture: str
    model_args: dict[str, Any]
    """Arguments of timm's function `architecture` that differ from its own."""
    image_size: int
    """Side in pixels that its weights are for."""
    mean: tuple[float, ...]
    """Of red, green and blue in the encoder's training images; 1 is white."""
    std: tuple[float, ...]
    fit: str
    """How an image becomes a square: "crop", "squash" or "pad"."""
    interpolation: str
    crop_share: float
    """Share of the resized image that a crop keeps, timm's `crop_pct`."""

    def build_module(self) -> nn.Module:
        """Return open_clip's holder of timm's model with random weights, on the default device."""
        # a connector needs the features of all patches, in training too, and what is dropped at
        # random would depend on how rows are packed
        whole = {key: 0.0 for key in self.model_args if key in DROP_RATES}
        model_args = {**self.model_args, **whole}
        return build_timm_encoder(self.architecture, model_args, self.image_size)

    def computation(self) -> dict[str, Any]:
        """Return everything that decides what the same weights compute."""
        kept = {key: value for key, value in self.model_args.items() if key not in DROP_RATES}
        return {**kept, "architecture": self.architecture}

    def preprocess(self) -> dict[str, Any]:
        """Return what is done to an image, as `VisionEncoder` takes it."""
        resized = int(self.image_size / self.crop_share) if self.fit == "crop" else self.image_size
        return {
            "mean": self.mean,
            "std": self.std,
            "resize": resized,
            "crop": self.image_size,
            "fit": self.fit,
            "interpolation": self.interpolation,
        }

    def save(self, folder: Path) -> None:
        """Write it into `folder`, in timm's format."""
        modes = {ours: theirs for theirs, ours in CROP_MODES.items()}
        pixels = {
            "input_size": [3, self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_share,
            "crop_mode": modes[self.fit],
            "mean": list(self.mean),
            "std": list(self.std),
        }
        keys = {"architecture": self.architecture, "num_classes": 0}
        text = json.dumps(
            {**keys, "model_args": self.model_args, "pretrained_cfg": pixels}, indent=1
        )
        write_atomically(folder / TIMM_CONFIG, text + "\n")


def is_timm_folder(folder: Path) -> bool:
    """Tell whether a folder has a config.json of timm; other libraries call theirs the same."""
    file = folder / TIMM_CONFIG
    return file.is_file() and isinstance(read_json(file).get("architecture"), str)


def read_timm_config(folder: Path) -> TimmConfig:
    """Return what timm's config.json in `folder` describes.

    Raises:
        UserError: for what is no plain ViT, and says why; for values that cannot be meant.
    """
    file = folder / TIMM_CONFIG
    said = read_json(file)
    architecture = said.get("architecture")
    if not isinstance(architecture, str):
        raise UserError(f"{file}: has no architecture, so it is not timm's")
    check_plain_vit(architecture, file)
    pixels = _mapping(said.get("pretrained_cfg", said), "pretrained_cfg", file)
    model_args = _mapping(said.get("model_args") or {}, "model_args", file)
    channels = model_args.get("in_chans", 3)
    if channels != 3:
        raise UserError(f"{file}: in_chans is {channels!r}; images here have 3 channels")
    heads = model_args.get("num_heads", 1)
    if isinstance(heads, int) and heads < 1:  # timm builds a model with -1 heads
        raise UserError(f"{file}: num_heads is {heads}; wanted is a whole number from 1")
    image_size = _read_image_size(model_args.get("img_size") or pixels.get("input_size"), file)
    check_image_grid(image_size, model_args.get("patch_size", 14), file)
    crop_mode = pixels.get("crop_mode") or "center"
    if crop_mode not in tuple(CROP_MODES):  # it may be a list, which no dict looks up
        raise UserError(f"{file}: crop_mode is {crop_mode!r}; known are {', '.join(CROP_MODES)}")
    share = pixels.get("crop_pct") or 1.0
    if not isinstance(share, int | float) or not 0.1 <= share <= 1:
        raise UserError(f"{file}: crop_pct is {share!r}; wanted is a number from 0.1 to 1")
    return TimmConfig(
        architecture,
        {key: value for key, value in model_args.items() if key not in ("img_size", "num_classes")},
        image_size,
        parse_rgb_stats(pixels.get("mean"), "mean", file),
        parse_rgb_stats(pixels.get("std"), "std", file),
        CROP_MODES[crop_mode],
        parse_interpolation(pixels, file),
        float(share),
    )


def check_plain_vit(architecture: str, file: Path, key: str = "architecture") -> None:
    """Refuse an architecture that the installed timm lacks, or that is no plain ViT.

    `key` is what `file` calls it.
    """
    reason = hybrid_reason(architecture)
    module = timm_module_name(architecture)
    if reason is None and module is None:
        import timm

        raise UserError(
            f"{file}: {key} is '{architecture}', which timm {timm.__version__} does not "
            f"have; a newer one may.{suggest_name(architecture, timm_architecture_names())}"
        )
    if reason is None and module not in PLAIN_VIT_MODULES:
        reason = f"a model of timm's {module}.py, not a list of equal blocks over one patch grid"
    if reason is not None:
        raise UserError(
            f"{file}: {key} is '{architecture}', {reason}; a plain ViT is needed, for "
            "example timm/vit_base_patch14_reg4_dinov2.lvd142m"
        )


def _mapping(value: Any, key: str, file: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key} is {value!r}; wanted is a mapping")
    return value


def _read_image_size(value: Any, file: Path) -> int:
    """Return the side of a square, of `img_size` (one or two numbers) or `input_size` (three)."""
    sides = value[-2:] if isinstance(value, list) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int or sides[0] < 1:
        raise UserError(f"{file}: the input is {value!r}; wanted is the side of a square in pixels")
    return int(sides[0])
