"""From a model to a folder in Yi-VL's released layout, which the authors' code loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlbench.data.images import ImageTransform
from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model.vlm import VLM
from vlbench.model.weights import chat_template, clip, yi_vl
from vlbench.model.weights.groups import Group, surplus
from vlbench.model.weights.projector import form_of, projector_of
from vlbench.model.weights.release import (
    LLAMA,
    PROCESSOR,
    preprocessing,
    states_of,
    write_files,
)
from vlbench.model.weights.shards import write

LAYOUT = "Yi-VL's layout"
Cast = Callable[[Tensor], Tensor]


def write_yi_vl(vlm: VLM, folder: Path, cast: Cast | None, source: Path | None = None) -> None:
    """Write `vlm` into the empty `folder`; `cast` changes the type of every tensor.

    `source` is the released folder that `vlm` was read from, if nothing was trained since: then
    its small files, and the tensors in it that the reference ignores, are given back unchanged.
    """
    projector_of(vlm, LAYOUT)
    _check(vlm)
    if yi_vl.recognise(json.loads(vlm.release.get("config.json", b"{}"))):
        write_files(vlm.release, folder)
    else:
        _describe(vlm, folder)
    config = read_json(folder / "config.json")
    tower = yi_vl.tower_folder(folder, config)
    if source is None or cast:
        _update(vlm, folder, tower, cast)
    _name_template(folder, source is not None)
    if source is not None:
        groups = yi_vl.groups(source, vlm)
    else:
        keys = clip.to_hugging_face(vlm.vision.visual)
        vision = {f"vision_model.{key}": ("vision", key) for key in keys}
        groups = [Group([], yi_vl.main_names(config, vlm), ""), Group([], vision, "")]
    states = states_of(vlm)
    for group, target in zip(groups, (folder, tower), strict=True):
        own = ((name, states[part][key]) for name, (part, key) in group.wanted.items())
        tensors = chain(own, surplus(group))
        write(((name, cast(t) if cast else t) for name, t in tensors), target)


def _check(vlm: VLM) -> None:
    """Refuse what the authors' code could not know: another template, tower or tokenizer."""
    if vlm.template.name != "yi_vl":
        raise Mistake(
            f"language.template is {vlm.template.name}, and the authors' code knows yi_vl alone; "
            "format=hf_llava carries the template, format=vlbench everything"
        )
    if vlm.vision.norm:
        raise Mistake("vision.norm is true, which this layout cannot say; use format=vlbench")
    clip.config_of(vlm.vision.visual)


def _name_template(folder: Path, unchanged: bool) -> None:
    """Say in config.json that this is asked with Yi's template, where it would not be told.

    A folder that is given back `unchanged` stays as it is if it was asked so before.
    """
    name, why = chat_template.of_yi_vl(folder, read_json(folder / "config.json"))
    if name != "yi_vl" or (why and not unchanged):
        _edit(folder / "config.json", {"conv_mode": chat_template.CONV_MODE})


def _update(vlm: VLM, folder: Path, tower: Path, cast: Cast | None) -> None:
    """Make the small files of a release say what the model has become."""
    transform = vlm.transform
    depth, norm = form_of(projector_of(vlm, LAYOUT))
    projector = f"mlp{depth}x_gelu{'_Norm' if norm else ''}"
    main: dict[str, Any] = {
        "mm_vision_tower": f"./{tower.relative_to(folder).as_posix()}",
        "mm_vision_select_layer": vlm.vision.index - len(vlm.vision.blocks()),
        "torch_dtype": _type_of(vlm.language, cast),
    }
    before = read_json(folder / "config.json")
    if before["mm_projector_type"] != "linear" or depth > 1:
        main["mm_projector_type"] = projector
    tied = vlm.language.config.tie_word_embeddings
    if bool(before.get("tie_word_embeddings")) != tied:
        main["tie_word_embeddings"] = tied
    _edit(folder / "config.json", main)
    said = {"image_size": vlm.vision.image_size, "torch_dtype": _type_of(vlm.vision, cast)}
    _edit(tower / "config.json", said)
    processor = tower / "preprocessor_config.json"
    written = preprocessing(read_json(processor), processor, True)
    if (written["resize"], written["crop"]) != (transform.size, transform.crop):
        _edit(processor, sizes(transform))


def _type_of(part: nn.Module, cast: Cast | None) -> str:
    """Return the name of the type in which the weights of a part are written."""
    weight = next(part.parameters())
    return str((cast(weight[:1]) if cast else weight).dtype).removeprefix("torch.")


def _edit(file: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of a JSON file; where nothing differs the file stays byte for byte."""
    config = read_json(file)
    inner: dict[str, Any] = config.get("vision_config") or config
    if "dtype" in inner:  # as transformers 5 calls it
        changes = {"dtype" if k == "torch_dtype" else k: v for k, v in changes.items()}
    if any(inner.get(key) != value for key, value in changes.items()):
        inner |= changes
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(vlm: VLM, folder: Path) -> None:
    """Write the small files of a model that did not begin as a released Yi-VL."""
    if not (vlm.tokenizer.folder / "tokenizer.model").is_file():
        raise Mistake(
            "the tokenizer has no tokenizer.model, which the authors' code needs; use "
            "format=hf_llava or format=vlbench"
        )
    vlm.tokenizer.save(folder)
    language, tower = vlm.language.config, folder / "vit" / f"tower-{vlm.vision.image_size}"
    tower.mkdir(parents=True)
    depth, norm = form_of(projector_of(vlm, LAYOUT))
    ends = {"bos_token_id": vlm.tokenizer.bos, "eos_token_id": vlm.tokenizer.eos, "pad_token_id": 0}
    shape = {key: value for key, value in language.to_dict().items() if key in LLAMA}
    rope = dict(shape.pop("rope_parameters"))
    kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta")
    config = shape | ends
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad" if vlm.transform.pad else "square",
        "mm_hidden_size": vlm.vision.width,
        "mm_projector_type": f"mlp{depth}x_gelu{'_Norm' if norm else ''}",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vlm.vision.index - len(vlm.vision.blocks()),
        "mm_vision_tower": f"./vit/{tower.name}",
        "model_type": "llava",
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "rope_theta": theta,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_mm_proj": True,
    }
    transform = vlm.transform
    processor = {
        **{key: bool(value) for key, value in PROCESSOR.items() if key.startswith("do_")},
        "do_convert_rgb": True,
        "image_mean": list(transform.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(transform.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        **sizes(transform),
    }
    for file, content in (
        (folder / "config.json", config),
        (folder / "generation_config.json", ends),
        (tower / "config.json", clip.config_of(vlm.vision.visual)),
        (tower / "preprocessor_config.json", processor),
    ):
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sizes(transform: ImageTransform) -> dict[str, Any]:
    """Return the sizes of a transform as a CLIPImageProcessor writes them."""
    return {
        "size": {"shortest_edge": transform.size},
        "crop_size": {"height": transform.crop, "width": transform.crop},
    }
