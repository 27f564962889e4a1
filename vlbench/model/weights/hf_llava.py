"""The folder that transformers' `LlavaForConditionalGeneration` loads: LLaVA's, with one MLP.

The projector there is Linear, activation, Linear. A single Linear layer is written with no
activation and the identity after it.
"""

from __future__ import annotations

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
    check_crop,
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
    config.setdefault("image_token_index", config.get("image_token_id"))  # its name elsewhere
    require(config, ("text_config", "vision_config", "image_token_index"), file)
    _check_parts(config, file)
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
    text = config["text_config"]
    either = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    preprocess = _preprocess(folder)
    check_crop(preprocess, vision, folder)
    return Blueprint(
        language=language_config({**text, "tie_word_embeddings": either}, file),
        vision=vision,
        layer=layer,
        preprocess=preprocess,
        depth=1 if act == LINEAR else 2,
        norm=False,
        template=template,
        why=why,
        words=_words(folder, config["image_token_index"]),
    )


def _check_parts(config: dict[str, Any], file: Path) -> None:
    """Refuse a configuration whose parts are no mappings, or another language model than Llama."""
    for key in ("text_config", "vision_config"):
        if not isinstance(config[key], dict):
            raise Mistake(f"{file}: {key} is {config[key]!r}; wanted is a mapping")
    if type(config["image_token_index"]) is not int or config["image_token_index"] < 1:
        raise Mistake(
            f"{file}: image_token_index is {config['image_token_index']!r}; wanted is an id"
        )
    if config.get("multimodal_projector_bias") is False:
        raise Mistake(f"{file}: multimodal_projector_bias is False; only True can be done here")
    kind = config["text_config"].get("model_type", "llama")  # transformers' default
    if kind != "llama":
        raise Mistake(
            f"{file}: the language model is no Llama (model_type of text_config is {kind!r})"
        )


def _words(folder: Path, image: int) -> int:
    """Return the first id that is no word of the model: an image's, or what generation suppresses.

    A tokenizer may know tokens that the model never learned: an export suppresses their ids, which
    come right before the image's.
    """
    file = folder / "generation_config.json"
    never = read_json(file).get("suppress_tokens") if file.is_file() else None
    while isinstance(never, list) and image - 1 in never:
        image -= 1
    return image


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
    if not isinstance(inner, dict):
        raise Mistake(f"{file}: image_processor is {inner!r}; wanted is a mapping")
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
    language = {_language_name(key, found): key for key in vlm.language.state_dict()}
    spared = tied(vlm.language, [key for name, key in language.items() if name in found])
    wanted |= {name: ("language", key) for name, key in language.items() if key not in spared}
    ignored = BUFFERS
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


def _language_name(key: str, found: Collection[str]) -> str:
    """Return the name in the files of the language model's tensor `key`."""
    starts = HEADS if key.startswith("lm_head.") else LANGUAGES
    return _start(starts, found) + key.removeprefix("lm_head.").removeprefix("model.")


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
