"""From the folder of a released model to a VLM: first its description, then its weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlbench.config.overrides import format_override
from vlbench.connector import registry
from vlbench.data.chat_template import CHAT_TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError
from vlbench.model.language_model import build_empty_language, read_eos_token_ids
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip_layouts, hf_llava_layout, yi_vl_layout
from vlbench.model.weights.release_files import ReleaseSpec, collect_part_states, load_vlm_weights
from vlbench.model.weights.tensor_groups import check_tensor_groups
from vlbench.text_files import read_json

RELEASE_LAYOUTS = (yi_vl_layout, hf_llava_layout)
RELEASED_CONNECTOR = "llava_mlp"
"""The connector that released projectors are: Yi-VL's own, and LLaVA's."""


@dataclass(frozen=True)
class ReleaseOverrides:
    """What a recipe chooses for itself when it begins with a released model; None: as released."""

    connector_name: str | None = None
    connector_options: dict[str, Any] | None = None
    vision_layer: int | None = None
    vision_norm: bool = False
    template_name: str | None = None
    max_length: int | None = None


def is_release(folder: Path) -> bool:
    """Tell whether a folder holds a released model, or the small files of one."""
    file = folder / "config.json"
    return file.is_file() and any(
        layout.is_layout_config(read_json(file)) for layout in RELEASE_LAYOUTS
    )


def find_layout_module(folder: Path) -> ModuleType:
    """Return the module that knows the layout of a released folder."""
    config = read_json(folder / "config.json")
    for layout in RELEASE_LAYOUTS:
        if layout.is_layout_config(config):
            return layout
    raise UserError(
        f"{folder / 'config.json'} describes neither a Yi-VL nor a LLaVA model (model_type is "
        f"{config.get('model_type')!r})"
    )


def load_release(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    overrides: ReleaseOverrides = ReleaseOverrides(),
    mmap_language: bool = False,
) -> VLM:
    """Return the model in a released folder; `dtype` None keeps every tensor as it is stored.

    With `mapped` the weights of the language model stay in its files, as they are stored.
    """
    if overrides.connector_name == RELEASED_CONNECTOR:
        _check_released_projector(
            find_layout_module(folder).read_release_spec(folder), overrides, folder
        )
    vlm = build_released_vlm(folder, overrides)
    load_vlm_weights(
        vlm,
        find_layout_module(folder).build_tensor_groups(folder, vlm),
        dtype,
        device,
        mmap_language,
    )
    return vlm


def check_release(folder: Path, overrides: ReleaseOverrides = ReleaseOverrides()) -> None:
    """Compare names and shapes of a released folder's weights with what its small files describe.

    No number is read.
    """
    if overrides.connector_name == RELEASED_CONNECTOR:
        _check_released_projector(
            find_layout_module(folder).read_release_spec(folder), overrides, folder
        )
    vlm = build_released_vlm(folder, overrides)
    check_tensor_groups(
        find_layout_module(folder).build_tensor_groups(folder, vlm), collect_part_states(vlm)
    )


def build_released_vlm(folder: Path, overrides: ReleaseOverrides = ReleaseOverrides()) -> VLM:
    """Build the model that small files describe; tower and language model have no memory yet."""
    layout = find_layout_module(folder)
    plan: ReleaseSpec = layout.read_release_spec(folder)
    tower = build_meta_encoder(
        plan,
        plan.vision_layer if overrides.vision_layer is None else overrides.vision_layer,
        overrides.vision_norm,
    )
    options = {"depth": plan.projector_depth, "norm": plan.projector_norm}
    if overrides.connector_name is not None:
        options = dict(overrides.connector_options or {})
    language = build_empty_language(plan.language_config)
    language.generation_config.eos_token_id = read_eos_token_ids(folder, plan.language_config)
    tokenizer = Tokenizer.load(folder, plan.id_limit)
    vlm = VLM(
        tower,
        registry.load_connector(overrides.connector_name or RELEASED_CONNECTOR),
        options,
        language,
        tokenizer,
        CHAT_TEMPLATES[overrides.template_name or resolve_template_name(folder, plan)],
        overrides.max_length or plan.language_config.max_position_embeddings,
    )
    vlm.tokenizer.limit_embeddings(plan.id_limit or tokenizer.vocab_size)
    vlm.release_files = layout.read_release_files(folder)
    return vlm


def resolve_template_name(folder: Path, spec: ReleaseSpec, key: str = "template") -> str:
    """Return the chat template of a release, and say why it is that one unless Yi-VL itself asks.

    `key` is what a user says to choose another. Raises a Mistake where none is known.
    """
    if not spec.template_name:
        raise UserError(
            f"{folder}: {spec.template_reason}; say {key}=NAME, one of {', '.join(CHAT_TEMPLATES)}"
        )
    if spec.template_reason and os.environ.get("RANK", "0") == "0":
        print(
            f"vlbench: {folder}: template {spec.template_name}, as {spec.template_reason}; "
            f"{key}= chooses another",
            file=sys.stderr,
        )
    return spec.template_name


def build_meta_encoder(spec: ReleaseSpec, layer: int, norm: bool) -> VisionEncoder:
    """Build the tower that small files describe, without memory for its weights."""
    with torch.device("meta"):
        visual = clip_layouts.build_clip_vit(spec.vision_config)
    return VisionEncoder(visual, layer, norm, spec.preprocess)


def _check_released_projector(spec: ReleaseSpec, overrides: ReleaseOverrides, folder: Path) -> None:
    """Refuse a projector of another form than the release's, whose weights it is to have."""
    released = {"depth": spec.projector_depth, "norm": spec.projector_norm, "mlp_ratio": 1.0}
    if overrides.connector_options != released:
        say = " ".join(
            format_override(f"connector.{key}", value) for key, value in released.items()
        )
        raise UserError(
            f"init={folder} has another projector: say {say}, or name another connector, which "
            "then starts anew"
        )
