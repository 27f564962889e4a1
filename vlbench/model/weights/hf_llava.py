"""The folder that transformers' `LlavaForConditionalGeneration` loads: LLaVA's, with one MLP.

The projector there is Linear, activation, Linear. A single Linear layer is written with no
activation and the identity after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model.vlm import VLM
from vlbench.model.weights import chat_template, clip
from vlbench.model.weights.groups import BUFFERS, Group, tied
from vlbench.model.weights.release import (
    Blueprint,
    kept_files,
    language_config,
    preprocessing,
    require,
)
from vlbench.model.weights.shards import read, shapes, weight_files

LINEAR = "linear"  # transformers' name of the activation that is none
# Names of the parts in files, which transformers changed with versions 4.52 and 5.
TOWERS = (
    *("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    *("vision_tower.", "model.vision_tower."),
)
LANGUAGES = ("language_model.model.", "model.language_model.")
HEADS = ("language_model.lm_head.", "lm_head.")
PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")


def recognise(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is of this layout."""
    return config.get("model_type") == "llava" and "text_config" in config


def blueprint(folder: Path) -> Blueprint:
    """Read what the small files in `folder` describe."""
    file = folder / "config.json"
    config = read_json(file)
    require(config, ("text_config", "vision_config", "image_token_index"), file)
    if config["text_config"].get("model_type") != "llama":
        raise Mistake(f"{file}: the language model is no Llama (model_type of text_config)")
    vision = clip.vision_config(config["vision_config"], file)
    if config.get("vision_feature_select_strategy", "default") != "default":
        raise Mistake(f"{file}: vision_feature_select_strategy must be 'default' (patches alone)")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or not -vision["num_hidden_layers"] <= layer < 0:
        raise Mistake(f"{file}: vision_feature_layer is {layer!r}; wanted is one negative number")
    act = config.get("projector_hidden_act", "gelu")
    if act not in ("gelu", LINEAR):
        raise Mistake(f"{file}: projector_hidden_act is {act!r}; known are gelu and {LINEAR}")
    template, why = chat_template.of_hf_llava(folder)
    return Blueprint(
        language=language_config(config["text_config"], file),
        vision=vision,
        layer=layer,
        preprocess=_preprocess(folder),
        depth=1 if act == LINEAR else 2,
        norm=False,
        template=template,
        why=why,
        words=config["image_token_index"],
    )


def small_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of a release."""
    return kept_files(folder)


def _preprocess(folder: Path) -> dict[str, Any]:
    """Read the image processor, which transformers 5 writes into processor_config.json."""
    file = folder / "processor_config.json"
    inner = read_json(file).get("image_processor") if file.is_file() else None
    if inner is None:
        file = folder / "preprocessor_config.json"
        inner = read_json(file)
    return preprocessing(inner, file, pad=bool(inner.get("do_pad", False)))


def groups(folder: Path, vlm: VLM) -> list[Group]:
    """Return the files of weights in `folder` and where in `vlm` their tensors belong.

    A connector that is no projector starts anew: the projector in the files is ignored.
    """
    files = weight_files(folder)
    found = {name for file in files for name in shapes(file)}
    wanted = {
        _start(TOWERS, found) + key: ("vision", key)
        for key in clip.to_hugging_face(vlm.vision.visual)
    }
    again = tied(vlm.language)
    for key in (key for key in vlm.language.state_dict() if key not in again):
        starts = HEADS if key.startswith("lm_head.") else LANGUAGES
        bare = key.removeprefix("lm_head.").removeprefix("model.")
        wanted[_start(starts, found) + bare] = ("language", key)
    ignored = "|".join([BUFFERS, *(rf"(.*\.)?{re.escape(key)}" for key in again)])
    projector, start = vlm.connector.projector(), _start(PROJECTORS, found)
    if projector is None:
        ignored = rf"{ignored}|{start}.*"
    else:
        linear = {0: f"{start}linear_1.", 2: f"{start}linear_2."}
        for key in projector.state_dict():
            number, kind = key.split(".")
            wanted[linear[int(number)] + kind] = ("connector", key)
        if len(projector) == 1:
            _check_identity(files, linear[2])
            ignored = rf"{ignored}|{linear[2]}.*"
    return [Group(files, wanted, ignored)]


def _start(starts: tuple[str, ...], found: Collection[str]) -> str:
    """Return the beginning of names that is used in the files."""
    return next((s for s in starts if any(name.startswith(s) for name in found)), starts[0])


def _check_identity(files: list[Path], start: str) -> None:
    """Refuse a projector without activation whose second layer does something."""
    for file in files:
        for name, tensor in read(file, [name for name in shapes(file) if name.startswith(start)]):
            plain = torch.eye(len(tensor)) if tensor.dim() == 2 else torch.zeros(len(tensor))
            if not torch.equal(tensor.float(), plain):
                raise Mistake(
                    f"{file}: {name} is not the identity, and two Linear layers without an "
                    "activation between them are no connector here"
                )
