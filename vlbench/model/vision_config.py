"""What a vision encoder is, before any weight is read: its architecture and its pixel statistics.

A checkpoint keeps this as `vision/open_clip_config.json`, so that a trained encoder can be built
again where the tag, file or folder that it began from is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIPVisionCfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from vlbench.compat.vision_internals import build_open_clip_encoder
from vlbench.config.key_types import MAX_IMAGE_SIZE
from vlbench.data.image_processing import INTERPOLATIONS
from vlbench.errors import UserError, suggest_name
from vlbench.model.weights.processor_values import (
    FIXED_PIXEL_VALUES,
    check_fixed_values,
    parse_resample,
)
from vlbench.text_files import read_json, write_atomically

MINIATURES_FOLDER = Path(__file__).parents[1] / "miniatures"
EMBEDDED_ENCODERS = {
    "tiny": MINIATURES_FOLDER / "vision_encoder",
    "tiny_eva": MINIATURES_FOLDER / "eva_vision_encoder",
}
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""open_clip's own name of a file that describes a model."""
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of open_clip's weights in a folder and on a hub, in the order of preference."""
MAX_PATCHES = 1 << 16  # of an image: 256 x 256; encoders in use have 256 to 4,096
ARCHITECTURE_KEYS = ("embed_dim", "quick_gelu", "vision_cfg")
"""Keys of open_clip's `model_cfg` that say what its vision encoder is."""
RESIZE_KEYS = ("interpolation", "resize_mode")
"""Keys of open_clip's `preprocess_cfg` that say how an image is resized."""
NO_DROPOUT: dict[str, Any] = {"patch_dropout": 0.0, "timm_drop": 0.0, "timm_drop_path": None}
"""Keys of `vision_cfg` for what training leaves out at random, with their values for nothing."""
WEIGHT_NEUTRAL_KEYS = ("image_size", *NO_DROPOUT)
"""Keys of `vision_cfg` that say nothing about the weights' meaning."""


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder of open_clip without its weights."""

    embed_dim: int
    """Width of the contrastive space, of which an encoder may have a projection."""
    vision_cfg: dict[str, Any]
    """open_clip's `vision_cfg`: image and patch size (pixels), layers, width, or a timm model."""
    quick_gelu: bool
    """Whether the activation is OpenAI's x * sigmoid(1.702 x); timm models have their own."""
    mean: tuple[float, ...]
    """Of red, green and blue in the encoder's training images; 1 is white."""
    std: tuple[float, ...]
    projection: bool = True
    """False: without the contrastive projection, which Hugging Face's vision models do not have."""
    fit: str = "pad"
    """How an image becomes a square: "squash" where the encoder's authors did so; else "pad", as
    LLaVA and Yi-VL do also with encoders whose authors cropped."""
    interpolation: str = "bicubic"
    """Of the resize of images."""

    def build_module(self) -> nn.Module:
        """Return open_clip's module with random weights, on torch's default device."""
        if "timm_model_name" in self.vision_cfg:
            import vlbench.model.miniature_eva  # noqa: F401  makes its architecture known to timm
        # a connector needs the features of all patches, in training too, and what is dropped at
        # random would depend on how rows are packed
        keys = {**self.vision_cfg, "timm_model_pretrained": False, **NO_DROPOUT}
        visual: Any = build_open_clip_encoder(self.embed_dim, keys, self.quick_gelu)
        if not self.projection:
            visual.proj = None
        module: nn.Module = visual
        return module

    def computation(self) -> dict[str, Any]:
        """Return everything that decides what the same weights compute; defaults are filled in."""
        keys = asdict(CLIPVisionCfg(**self.vision_cfg))
        timm = bool(keys["timm_model_name"])
        kept = {key: value for key, value in keys.items() if key not in WEIGHT_NEUTRAL_KEYS}
        kept.pop("timm_model_pretrained")
        return {**kept, "quick_gelu": self.quick_gelu and not timm, "embed_dim": self.embed_dim}

    def preprocess(self) -> dict[str, Any]:
        """Return what is done to an image, as `VisionEncoder` takes it."""
        return {
            "mean": self.mean,
            "std": self.std,
            "fit": self.fit,
            "interpolation": self.interpolation,
        }

    def save(self, folder: Path) -> None:
        """Write it into `folder`, in open_clip's format."""
        known = asdict(self)
        model = {key: known[key] for key in (*ARCHITECTURE_KEYS, "projection")}
        pixels: dict[str, Any] = {"mean": list(self.mean), "std": list(self.std)}
        if (self.fit, self.interpolation) != ("pad", "bicubic"):
            resize_mode = "squash" if self.fit == "squash" else "shortest"
            pixels |= {"interpolation": self.interpolation, "resize_mode": resize_mode}
        text = json.dumps({"model_cfg": model, "preprocess_cfg": pixels}, indent=1)
        write_atomically(folder / OPEN_CLIP_CONFIG, text + "\n")


def read_vision_config(folder: Path) -> VisionConfig:
    """Return what open_clip_config.json in `folder` describes."""
    file = folder / OPEN_CLIP_CONFIG
    said = read_json(file)
    model = said.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise UserError(f"{file}: has no model_cfg with a vision_cfg, so it is not open_clip's")
    pixels = said.get("preprocess_cfg") or {}
    if not isinstance(pixels, dict):
        raise UserError(f"{file}: preprocess_cfg is {pixels!r}; wanted is a mapping")
    default = _default_pixel_stats("")
    try:
        keys = CLIPVisionCfg(**model["vision_cfg"])
        check_image_grid(keys.image_size, keys.patch_size, file)
        return VisionConfig(
            int(model["embed_dim"]),
            dict(model["vision_cfg"]),
            bool(model.get("quick_gelu", False)),
            parse_rgb_stats(pixels.get("mean", default["mean"]), "mean", file),
            parse_rgb_stats(pixels.get("std", default["std"]), "std", file),
            bool(model.get("projection", True)),
            *_read_resize(pixels, file),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file}: model_cfg cannot be read ({type(error).__name__}: {error})"
        ) from (error)


def check_image_grid(image_size: Any, patch_size: Any, file: Path) -> None:
    """Refuse an encoder, described in `file`, of so many patches that it cannot be in use.

    Sizes are sides in pixels, or pairs of them. What they are beside that is checked elsewhere.
    """
    sides, patches = (
        [side for side in (value if isinstance(value, list | tuple) else [value])]
        for value in (image_size, patch_size)
    )
    known = all(type(side) is int and side > 0 for side in (*sides, *patches))
    if not (known and sides and patches):
        return
    if max(sides) > MAX_IMAGE_SIZE:
        raise UserError(
            f"{file}: image_size is {max(sides)} pixels; at most {MAX_IMAGE_SIZE} are allowed"
        )
    if (max(sides) // min(patches)) ** 2 > MAX_PATCHES:
        raise UserError(
            f"{file}: image_size {max(sides)} and patch_size {min(patches)} make more than "
            f"{MAX_PATCHES:,} patches"
        )


def resolve_vision_config(name: str, weights: str) -> VisionConfig:
    """Return what a model of open_clip is with `vision.weights`, of which small files are read.

    Pixel statistics are those of the tag or folder in `weights`, else those that all tags of the
    architecture share.

    Raises:
        UserError: for an unknown name, and for weights that were trained as something else.
    """
    found = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if found is None:
        raise UserError(
            f"vision.name is '{name}'; known are {', '.join(EMBEDDED_ENCODERS)}, a folder with "
            f"{OPEN_CLIP_CONFIG} and the ViTs of open_clip."
            f"{suggest_name(name, [*EMBEDDED_ENCODERS, *open_clip.list_models()])}"
        )
    tag = get_pretrained_cfg(name, weights)
    pixels = tag or _default_pixel_stats(name)
    named = VisionConfig(
        found["embed_dim"],
        found["vision_cfg"],
        bool(found.get("quick_gelu", False)),
        tuple(pixels["mean"]),
        tuple(pixels["std"]),
        True,
        *_read_resize(pixels, Path(name)),
    )
    if tag.get("quick_gelu") and not named.quick_gelu:
        raise UserError(
            f"vision.weights={weights} was trained with the activation QuickGELU, and vision.name="
            f"{name} has GELU: say vision.name={name}-quickgelu"
        )
    path = Path(weights)
    # a file by open_clip's own name has what it is beside it, whether it or its folder is given
    is_named_file = path.name in OPEN_CLIP_FILES and path.is_file()
    return _merge_folder_config(named, name, path.parent if is_named_file else path)


def list_usable_tags(name: str) -> list[str]:
    """Return the tags of a model of open_clip whose weights have its activation, in its order.

    OpenAI's and others were trained with QuickGELU, which `NAME-quickgelu` has and `NAME` has not.
    """
    tags: list[str] = list_pretrained_tags_by_model(name)
    if (open_clip.get_model_config(name) or {}).get("quick_gelu"):
        return tags
    return [tag for tag in tags if not get_pretrained_cfg(name, tag).get("quick_gelu")]


def _merge_folder_config(named_config: VisionConfig, name: str, folder: Path) -> VisionConfig:
    """Return `named` with what a folder of weights says of itself; refuse another architecture."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        theirs = read_vision_config(folder)
        _check_same_architecture(named_config, theirs, name, folder)
        named_config = replace(
            named_config,
            mean=theirs.mean,
            std=theirs.std,
            fit=theirs.fit,
            interpolation=theirs.interpolation,
        )
    if find_open_clip_file(folder) or not (folder / "config.json").is_file():
        return named_config
    said, file = _read_processor_config(folder)
    mean, std = said.get("image_mean"), said.get("image_std")
    return replace(
        named_config,
        mean=parse_rgb_stats(mean, "image_mean", file) if mean else named_config.mean,
        std=parse_rgb_stats(std, "image_std", file) if std else named_config.std,
        interpolation=(
            parse_resample(said, file) if "resample" in said else named_config.interpolation
        ),
        projection=False,
    )


def _read_processor_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return what a Hugging Face folder does to its images, and the file that says so.

    transformers 5 writes it into processor_config.json, as a part of a whole model's processor.
    """
    own, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    said = read_json(own) if own.is_file() else {}
    if not own.is_file() and whole.is_file():
        own, said = whole, read_json(whole).get("image_processor") or {}
    if not isinstance(said, dict):
        raise UserError(f"{own}: image_processor is {said!r}; wanted is a mapping")
    check_fixed_values(said, FIXED_PIXEL_VALUES, own)
    return said, own


def find_open_clip_file(folder: Path) -> Path | None:
    """Return open_clip's file of weights in `folder`, None if there is none."""
    return next((folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()), None)


def _check_same_architecture(
    named_config: VisionConfig, folder_config: VisionConfig, name: str, folder: Path
) -> None:
    """Refuse a folder whose own description is another architecture than `vision.name`."""
    ours, other = named_config.computation(), folder_config.computation()
    differ = [key for key in ours | other if ours.get(key) != other.get(key)]
    if differ:
        what = ", ".join(f"{key} {other.get(key)!r} for {ours.get(key)!r}" for key in differ)
        raise UserError(
            f"{folder / OPEN_CLIP_CONFIG} describes another encoder than vision.name={name} "
            f"({what}): "
            f"say vision.name={folder} vision.weights=embedded"
        )


def _default_pixel_stats(name: str) -> Mapping[str, Any]:
    """Return the preprocessing that all tags of `name` share, else open_clip's default (CLIP's)."""
    tags = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    found = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags}
    resizes = {_read_resize(tag, Path(name)) for tag in tags}
    if len(found) != 1:
        return usual
    mean, std = found.pop()
    same = len(resizes) == 1
    return {
        **({key: tags[0].get(key) for key in RESIZE_KEYS} if same else {}),
        "mean": mean,
        "std": std,
    }


def _read_resize(pixels: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """Return `fit` and `interpolation` of open_clip's `preprocess_cfg`, or of one of its tags."""
    fit = "squash" if pixels.get("resize_mode") == "squash" else "pad"
    return fit, parse_interpolation(pixels, file)


def parse_interpolation(pixels: Mapping[str, Any], file: Path) -> str:
    """Return the `interpolation` that open_clip's or timm's preprocessing in `file` says."""
    interpolation: Any = pixels.get("interpolation") or "bicubic"
    if interpolation not in INTERPOLATIONS:
        known = ", ".join(INTERPOLATIONS)
        raise UserError(f"{file}: interpolation is {interpolation!r}; known are {known}")
    return str(interpolation)


def parse_rgb_stats(value: Any, key: str, file: Path) -> tuple[float, ...]:
    """Return a mean or standard deviation of red, green and blue, with 1 as white."""
    whole = isinstance(value, list | tuple) and len(value) == 3
    if not whole or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
        raise UserError(f"{file}: {key} is {value!r}; wanted are three numbers from 0 to 1")
    if key.endswith("std") and 0 in value:
        raise UserError(f"{file}: {key} is {value!r}; pixels are divided by it, so 0 is none")
    return tuple(value)
