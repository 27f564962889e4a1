"""Yi-VL's released layout.

config.json                        Llama's keys and LLaVA's (mm_*)
model-0000x-of-0000n.safetensors   language model and projector; copies of the tower are ignored,
                                   as the reference ignores them (.bin shards work as well)
tokenizer.model tokenizer_config.json ...
vit/NAME/                          the tower, a CLIPVisionModel: config.json,
                                   preprocessor_config.json, pytorch_model.bin or model.safetensors
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlbench.errors import UserError
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip_layouts, template_detection
from vlbench.model.weights.release_files import (
    LLAMA_CONFIG_KEYS,
    ReleaseSpec,
    check_crop_size,
    parse_llama_config,
    parse_preprocess_config,
    read_small_files,
    require_keys,
)
from vlbench.model.weights.tensor_files import read_tensor_shapes, weight_files
from vlbench.model.weights.tensor_groups import BUFFER_PATTERN, TensorGroup, missing_tied_keys
from vlbench.text_files import read_json

PROJECTOR_PREFIX = "model.mm_projector."
IGNORED_TENSORS = rf"model\.vision_tower\..*|{BUFFER_PATTERN}"
REQUIRED_CONFIG_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer")
FIXED_CONFIG_VALUES = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}
"""What the reference could do otherwise, and Yi-VL does not."""


def is_layout_config(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return "mm_vision_tower" in config


def read_release_spec(folder: Path) -> ReleaseSpec:
    """Read what the small files in `folder` describe."""
    file = folder / "config.json"
    config = read_json(file)
    require_keys(config, (*REQUIRED_CONFIG_KEYS, *LLAMA_CONFIG_KEYS[:4], "vocab_size"), file)
    for key, value in FIXED_CONFIG_VALUES.items():
        if config.get(key, value) != value:
            raise UserError(f"{file}: {key} is {config[key]!r}; only {value!r} can be done here")
    tower = find_encoder_folder(folder, config)
    depth, norm = parse_projector_type(config["mm_projector_type"], file)
    vision = clip_layouts.parse_vision_config(
        read_json(tower / "config.json"), tower / "config.json"
    )
    pad = config.get("image_aspect_ratio") == "pad"
    processor = tower / "preprocessor_config.json"
    preprocess = parse_preprocess_config(read_json(processor), processor, pad)
    check_crop_size(preprocess, vision, tower)
    if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
        raise UserError(
            f"{file}: mm_hidden_size is {config['mm_hidden_size']}, but the tower is "
            f"{vision['hidden_size']} wide"
        )
    template, why = template_detection.detect_yi_vl_template(folder, config)
    return ReleaseSpec(
        language_config=parse_llama_config(config, file),
        vision_config=vision,
        vision_layer=_parse_select_layer(
            config["mm_vision_select_layer"], vision["num_hidden_layers"], file
        ),
        preprocess=preprocess,
        projector_depth=depth,
        projector_norm=norm,
        template_name=template,
        template_reason=why,
    )


def read_release_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a release; a tower that lies elsewhere moves to `vit/`.

    The configuration then says so: what is written later must never reach out of its folder.
    """
    config = read_json(folder / "config.json")
    tower, home = find_encoder_folder(folder, config).resolve(), folder.resolve()
    if tower.is_relative_to(home):
        return read_small_files(folder) | read_small_files(
            tower, f"{tower.relative_to(home).as_posix()}/"
        )
    place = f"vit/{tower.name}"
    moved = json.dumps({**config, "mm_vision_tower": f"./{place}"}, indent=2, ensure_ascii=False)
    return {
        **read_small_files(folder),
        **read_small_files(tower, f"{place}/"),
        "config.json": moved.encode(),
    }


def _parse_select_layer(select_layer: Any, num_layers: int, file: Path) -> int:
    """Return the block whose output is `hidden_states[number]`; 0 is what the first block reads."""
    if type(select_layer) is not int or not (
        -num_layers <= select_layer < 0 or 0 < select_layer <= num_layers
    ):
        raise UserError(
            f"{file}: mm_vision_select_layer is {select_layer!r}; the tower has {num_layers} "
            "blocks, "
            f"so -{num_layers} to -1 and 1 to {num_layers} are allowed"
        )
    return select_layer if select_layer < 0 else select_layer - 1


def find_encoder_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder of the tower: where config.json says, or the only one under `vit/`.

    A config that the reference saved holds an absolute path of the machine that saved it.
    """
    named = str(config["mm_vision_tower"])
    places = [folder / named.removeprefix("./"), folder / "vit" / Path(named).name]
    places += [path.parent for path in sorted(folder.glob("vit/*/config.json"))][:1]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{folder / 'config.json'}: mm_vision_tower is '{named}'; there is no {places[0]} with "
        "config.json, preprocessor_config.json and pytorch_model.bin or model.safetensors"
    )


def parse_projector_type(projector_type: Any, file: Path) -> tuple[int, bool]:
    """Return depth and norm of an mm_projector_type: linear, mlp2x_gelu, mlp2x_gelu_Norm, ..."""
    if projector_type == "linear":
        return 1, False
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu(_Norm)?", str(projector_type))
    if not match:
        raise UserError(
            f"{file}: mm_projector_type is {projector_type!r}; known are linear, mlpNx_gelu, "
            "mlpNx_gelu_Norm"
        )
    return int(match[1]), bool(match[2])


def build_tensor_groups(folder: Path, vlm: VLM) -> list[TensorGroup]:
    """Return the files of weights in `folder` and where in `vlm` their tensors belong.

    A connector that is no projector starts anew: the projector in the files is ignored.
    """
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    found = [name for file in files for name in read_tensor_shapes(file)]
    other = (
        [rf"{re.escape(PROJECTOR_PREFIX)}.*"] if vlm.connector.released_projector() is None else []
    )
    main = TensorGroup(
        files, main_tensor_targets(config, vlm, found), "|".join([IGNORED_TENSORS, *other])
    )
    return [
        main,
        clip_layouts.build_clip_group(find_encoder_folder(folder, config), vlm.vision.visual),
    ]


def main_tensor_targets(
    config: dict[str, Any], vlm: VLM, file_names: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Return the tensors of the main shards: name -> (part of the model, key in that part).

    `found` are the names in files; shards that are to be written have none yet.
    """
    spared = missing_tied_keys(vlm.language, file_names)
    own = (name for name in vlm.language.state_dict() if name not in spared)
    names = {name: ("language", name) for name in own}
    projector = vlm.connector.released_projector()
    bare = config["mm_projector_type"] == "linear"  # then LLaVA numbers no layers
    for key in projector.state_dict() if projector is not None else ():
        names[PROJECTOR_PREFIX + (key.removeprefix("0.") if bare else key)] = ("connector", key)
    return names
