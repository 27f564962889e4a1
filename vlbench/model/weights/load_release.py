"""Released models (Yi-VL, LLaVA) loaded from a folder: first the description, then the weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch

from vlbench.command_line.arguments import TemplateName
from vlbench.command_line.overrides import format_override
from vlbench.connector import registry
from vlbench.data.own_template import bind_template
from vlbench.data.tokenizer import Tokenizer
from vlbench.data.view_layout import ViewSettings
from vlbench.errors import UserError
from vlbench.model.language_model import build_empty_language, read_eos_token_ids
from vlbench.model.loaded_vlm import LoadedVLM, assemble_vlm
from vlbench.model.vision_encoder import VisionEncoder
from vlbench.model.weights import (
    hf_llava_layout,
    hf_llava_next_layout,
    vision_layouts,
    yi_vl_layout,
)
from vlbench.model.weights.release_files import ReleaseSpec, collect_part_states, load_vlm_weights
from vlbench.model.weights.tensor_groups import check_tensor_groups
from vlbench.text_files import read_json

RELEASE_LAYOUTS = (yi_vl_layout, hf_llava_layout, hf_llava_next_layout)
RELEASED_CONNECTOR = "llava_mlp"
"""The connector that Yi-VL's and LLaVA's projectors are loaded into."""


@dataclass(frozen=True)
class ReleaseOverrides:
    """What a recipe decides about a released model that it begins with; None: as released."""

    connector_name: str | None = None
    connector_options: dict[str, Any] | None = None
    vision_layer: int | None = None
    vision_norm: bool = False
    template_name: str | None = None
    max_length: int | None = None
    has_own_views: bool = True
    """Whether images become views as released, and not as `view_settings` say."""
    view_settings: ViewSettings | None = None
    """None: each image is one view."""


AS_RELEASED = ReleaseOverrides()


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
    overrides: ReleaseOverrides = AS_RELEASED,
    mmap_language: bool = False,
) -> LoadedVLM:
    """Return the model in a released folder.

    Args:
        folder: A folder of one of `RELEASE_LAYOUTS`.
        dtype: Type of all weights; None keeps each as it is stored.
        device: Where they are loaded to.
        overrides: What is not as released.
        mmap_language: Whether weights of the language model stay memory-mapped, as they are stored.

    Raises:
        UserError: when a file of the folder is not what is expected.
    """
    if overrides.connector_name == RELEASED_CONNECTOR:
        _check_released_projector(
            find_layout_module(folder).read_release_spec(folder), overrides, folder
        )
    vlm = build_released_vlm(folder, overrides)
    load_vlm_weights(
        vlm.model,
        find_layout_module(folder).build_tensor_groups(folder, vlm.model),
        dtype,
        device,
        mmap_language,
    )
    return vlm


def check_release(folder: Path, overrides: ReleaseOverrides = AS_RELEASED) -> None:
    """Compare names and shapes of a folder's weights with what its small files describe.

    No values are read.
    """
    if overrides.connector_name == RELEASED_CONNECTOR:
        _check_released_projector(
            find_layout_module(folder).read_release_spec(folder), overrides, folder
        )
    vlm = build_released_vlm(folder, overrides)
    check_tensor_groups(
        find_layout_module(folder).build_tensor_groups(folder, vlm.model),
        collect_part_states(vlm.model),
    )


def build_released_vlm(folder: Path, overrides: ReleaseOverrides = AS_RELEASED) -> LoadedVLM:
    """Build the model that small files describe; encoder and language model are on `meta`."""
    layout = find_layout_module(folder)
    spec: ReleaseSpec = layout.read_release_spec(folder)
    if spec.encoder_note:
        _tell(f"{folder}: {spec.encoder_note}")
    encoder = build_meta_encoder(
        spec,
        spec.vision_layer if overrides.vision_layer is None else overrides.vision_layer,
        overrides.vision_norm,
    )
    options = {"depth": spec.projector_depth, "norm": spec.projector_norm}
    if overrides.connector_name is not None:
        options = dict(overrides.connector_options or {})
    language = build_empty_language(spec.language_config)
    language.generation_config.eos_token_id = read_eos_token_ids(folder, spec.language_config)
    tokenizer = Tokenizer.load(folder, spec.id_limit)
    vlm = assemble_vlm(
        encoder,
        registry.load_connector(overrides.connector_name or RELEASED_CONNECTOR),
        options,
        language,
        tokenizer,
        bind_template(overrides.template_name or resolve_template_name(folder, spec), tokenizer),
        overrides.max_length or spec.language_config.max_position_embeddings,
        spec.view_settings if overrides.has_own_views else overrides.view_settings,
    )
    vlm.tokenizer.limit_embeddings(spec.id_limit or tokenizer.vocab_size)
    vlm.release_files = layout.read_release_files(folder)
    return vlm


def resolve_template_name(folder: Path, spec: ReleaseSpec, key: str = "template") -> str:
    """Return the name of a release's chat template; print why, unless it is Yi-VL's own.

    Raises:
        UserError: when none is known. `key` is the option that chooses one.
    """
    if not spec.template_name:
        raise UserError(
            f"{folder}: {spec.template_reason}; say {key}=NAME, one of "
            f"{', '.join(get_args(TemplateName))} (auto: its own)"
        )
    if spec.template_reason:
        _tell(
            f"{folder}: template {spec.template_name}, as {spec.template_reason}; "
            f"{key}= chooses another"
        )
    return spec.template_name


def _tell(line: str) -> None:
    """Print a line about a release on standard error, once for the processes of a training."""
    if os.environ.get("RANK", "0") == "0":
        print(f"vlbench: {line}", file=sys.stderr)


def build_meta_encoder(spec: ReleaseSpec, layer: int, norm: bool) -> VisionEncoder:
    """Build the vision encoder that small files describe, on `meta`."""
    with torch.device("meta"):
        visual = vision_layouts.build_vit(spec.vision_config)
    return VisionEncoder(visual, layer, norm, spec.preprocess)


def _check_released_projector(spec: ReleaseSpec, overrides: ReleaseOverrides, folder: Path) -> None:
    """Refuse connector options with which the release's projector cannot be loaded."""
    released = {"depth": spec.projector_depth, "norm": spec.projector_norm, "mlp_ratio": 1.0}
    if overrides.connector_options != released:
        words = " ".join(
            format_override(f"connector.{key}", value) for key, value in released.items()
        )
        raise UserError(
            f"init={folder} has another projector: say {words}, or name another connector, which "
            "then starts anew"
        )
