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

from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model.vlm import VLM
from vlbench.model.weights import chat_template, clip
from vlbench.model.weights.groups import BUFFERS, Group, tied
from vlbench.model.weights.release import (
    LLAMA,
    Blueprint,
    check_crop,
    kept_files,
    language_config,
    preprocessing,
    require,
)
from vlbench.model.weights.shards import shapes, weight_files

PROJECTOR = "model.mm_projector."
IGNORED = rf"model\.vision_tower\..*|{BUFFERS}"
NEEDED = ("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer")
FIXED = {
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}
"""What the reference could do otherwise, and Yi-VL does not."""


def recognise(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return "mm_vision_tower" in config


def blueprint(folder: Path) -> Blueprint:
    """Read what the small files in `folder` describe."""
    file = folder / "config.json"
    config = read_json(file)
    require(config, (*NEEDED, *LLAMA[:4], "vocab_size"), file)
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise Mistake(f"{file}: {key} is {config[key]!r}; only {value!r} can be done here")
    tower = tower_folder(folder, config)
    depth, norm = projector_form(config["mm_projector_type"], file)
    vision = clip.vision_config(read_json(tower / "config.json"), tower / "config.json")
    pad = config.get("image_aspect_ratio") == "pad"
    processor = tower / "preprocessor_config.json"
    preprocess = preprocessing(read_json(processor), processor, pad)
    check_crop(preprocess, vision, tower)
    if config.get("mm_hidden_size", vision["hidden_size"]) != vision["hidden_size"]:
        raise Mistake(
            f"{file}: mm_hidden_size is {config['mm_hidden_size']}, but the tower is "
            f"{vision['hidden_size']} wide"
        )
    template, why = chat_template.of_yi_vl(folder, config)
    return Blueprint(
        language=language_config(config, file),
        vision=vision,
        layer=_layer(config["mm_vision_select_layer"], vision["num_hidden_layers"], file),
        preprocess=preprocess,
        depth=depth,
        norm=norm,
        template=template,
        why=why,
    )


def small_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a release; a tower that lies elsewhere moves to `vit/`.

    The configuration then says so: what is written later must never reach out of its folder.
    """
    config = read_json(folder / "config.json")
    tower, home = tower_folder(folder, config).resolve(), folder.resolve()
    if tower.is_relative_to(home):
        return kept_files(folder) | kept_files(tower, f"{tower.relative_to(home).as_posix()}/")
    place = f"vit/{tower.name}"
    moved = json.dumps({**config, "mm_vision_tower": f"./{place}"}, indent=2, ensure_ascii=False)
    return {
        **kept_files(folder),
        **kept_files(tower, f"{place}/"),
        "config.json": moved.encode(),
    }


def _layer(number: Any, layers: int, file: Path) -> int:
    """Return the block whose output is `hidden_states[number]`; 0 is what the first block reads."""
    if type(number) is not int or not (-layers <= number < 0 or 0 < number <= layers):
        raise Mistake(
            f"{file}: mm_vision_select_layer is {number!r}; the tower has {layers} blocks, "
            f"so -{layers} to -1 and 1 to {layers} are allowed"
        )
    return number if number < 0 else number - 1


def tower_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder of the tower: where config.json says, or the only one under `vit/`.

    A config that the reference saved holds an absolute path of the machine that saved it.
    """
    named = str(config["mm_vision_tower"])
    places = [folder / named.removeprefix("./"), folder / "vit" / Path(named).name]
    places += [path.parent for path in sorted(folder.glob("vit/*/config.json"))][:1]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise Mistake(
        f"{folder / 'config.json'}: mm_vision_tower is '{named}'; there is no {places[0]} with "
        "config.json, preprocessor_config.json and pytorch_model.bin or model.safetensors"
    )


def projector_form(kind: Any, file: Path) -> tuple[int, bool]:
    """Return depth and norm of an mm_projector_type: linear, mlp2x_gelu, mlp2x_gelu_Norm, ..."""
    if kind == "linear":
        return 1, False
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu(_Norm)?", str(kind))
    if not match:
        raise Mistake(
            f"{file}: mm_projector_type is {kind!r}; known are linear, mlpNx_gelu, mlpNx_gelu_Norm"
        )
    return int(match[1]), bool(match[2])


def groups(folder: Path, vlm: VLM) -> list[Group]:
    """Return the files of weights in `folder` and where in `vlm` their tensors belong.

    A connector that is no projector starts anew: the projector in the files is ignored.
    """
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    found = [name for file in files for name in shapes(file)]
    other = [rf"{re.escape(PROJECTOR)}.*"] if vlm.connector.projector() is None else []
    main = Group(files, main_names(config, vlm, found), "|".join([IGNORED, *other]))
    return [main, clip.group(tower_folder(folder, config), vlm.vision.visual)]


def main_names(
    config: dict[str, Any], vlm: VLM, found: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """Return the tensors of the main shards: name -> (part of the model, key in that part).

    `found` are the names in files; shards that are to be written have none yet.
    """
    spared = tied(vlm.language, found)
    own = (name for name in vlm.language.state_dict() if name not in spared)
    names = {name: ("language", name) for name in own}
    projector = vlm.connector.projector()
    bare = config["mm_projector_type"] == "linear"  # then LLaVA numbers no layers
    for key in projector.state_dict() if projector is not None else ():
        names[PROJECTOR + (key.removeprefix("0.") if bare else key)] = ("connector", key)
    return names
