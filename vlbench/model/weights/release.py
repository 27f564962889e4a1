"""A released model: its small files, what they describe, and the weights that belong to that.

The small files (configs, tokenizer, image preprocessing) travel with every checkpoint of what is
trained from a release, so that a checkpoint stands alone and an export gives them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlbench.files import refuse_pointer
from vlbench.mistakes import Mistake
from vlbench.model.language import checked
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip
from vlbench.model.weights.groups import Group, assign_language, load_groups, place

SMALL = 64_000_000  # bytes; a tokenizer.json has some megabytes, a file of weights has more
KEPT = ("*.json", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
"""Files of a release that are kept: all but weights, pictures and the old model card."""
LLAMA = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys of a configuration that say what a Llama is."""
PROCESSOR: dict[str, float] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
}
"""What a CLIPImageProcessor could do otherwise, and Yi-VL's does not."""


@dataclass(frozen=True)
class Blueprint:
    """What a released folder describes, before any weight is read."""

    language: LlamaConfig
    vision: dict[str, Any]
    """The keys `clip.KEYS` of Hugging Face's CLIPVisionConfig."""
    layer: int
    """Block of the tower whose output is used, as `vision.layer` of a recipe."""
    preprocess: dict[str, Any]
    """mean, std, resize (shortest edge, pixels), crop (side, pixels), pad (to a square)."""
    depth: int
    """Linear layers of the projector."""
    norm: bool
    """Whether a LayerNorm follows each of them."""
    template: str
    """Name of the chat template; "" where it cannot be known."""
    why: str = ""
    """Why this one; "" where there is nothing to say of it."""
    words: int | None = None
    """Ids from here on are never written; None: all of the tokenizer and the embedding are."""


def kept_files(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Return the small files directly in `folder`, their names after `prefix`."""
    found: dict[str, bytes] = {}
    for path in sorted(path for pattern in KEPT for path in folder.glob(pattern)):
        index = path.name.endswith(".index.json")  # it describes shards, which are written anew
        if path.is_file() and not index and path.stat().st_size < SMALL:
            refuse_pointer(path)
            found[prefix + path.name] = path.read_bytes()
    return found


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the small files of a release into `folder`."""
    for name, content in files.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise Mistake(f"a file of the release would be written outside of {folder}: {name}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def require(config: Mapping[str, Any], names: Sequence[str], file: Path) -> None:
    """Raise a Mistake that names the keys which `config`, read from `file`, does not have."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise Mistake(f"{file} has no {', '.join(missing)}")


def language_config(config: Mapping[str, Any], file: Path) -> LlamaConfig:
    """Return the Llama that `config`, read from `file`, describes."""
    try:
        found = LlamaConfig(**{key: config[key] for key in LLAMA if config.get(key) is not None})
    except Exception as error:  # the library's own checks, of types and of widths that divide
        raise Mistake(f"{file}: {_line(error)}") from error
    return checked(found, file)


def preprocessing(config: Mapping[str, Any], file: Path, pad: bool) -> dict[str, Any]:
    """Return what a CLIPImageProcessor's configuration does to a picture, new or old in style."""
    require(config, ("size", "crop_size"), file)
    for key, value in PROCESSOR.items():
        given = config.get(key, value)
        if not isinstance(given, int | float) or abs(given - value) > 1e-12:
            raise Mistake(f"{file}: {key} is {given!r}; only {value} can be done here")
    return {
        "mean": _colour(config.get("image_mean") or OPENAI_CLIP_MEAN, "image_mean", file),
        "std": _colour(config.get("image_std") or OPENAI_CLIP_STD, "image_std", file),
        "resize": _side(config["size"], "size", file),
        "crop": _side(config["crop_size"], "crop_size", file),
        "pad": pad,
    }


def check_crop(preprocess: Mapping[str, Any], vision: Mapping[str, Any], folder: Path) -> None:
    """Refuse pictures that are cropped to another size than the tower of `folder` reads."""
    if preprocess["crop"] != vision["image_size"]:
        raise Mistake(
            f"{folder}: pictures are cropped to {preprocess['crop']} pixels (crop_size), but the "
            f"tower reads {vision['image_size']} (image_size of config.json)"
        )


def _side(value: Any, key: str, file: Path) -> int:
    """Return a size that is written as 448, {shortest_edge: 448} or {height: 448, width: 448}."""
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    known = not isinstance(value, Mapping) or set(value) in ({"shortest_edge"}, {"height", "width"})
    if not known or any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
        raise Mistake(f"{file}: {key} is {value}; wanted is one length, such as 448")
    return int(sides[0])


def _colour(value: Any, key: str, file: Path) -> tuple[float, ...]:
    """Return a mean or standard deviation of red, green and blue, with 1 as white."""
    whole = isinstance(value, list | tuple) and len(value) == 3
    if not whole or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in value):
        raise Mistake(f"{file}: {key} is {value!r}; wanted are three numbers from 0 to 1")
    if key == "image_std" and 0 in value:
        raise Mistake(f"{file}: {key} is {value!r}; pixels are divided by it, so 0 is none")
    return tuple(value)


def states_of(vlm: VLM) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a model by part, under the keys of Hugging Face and of a projector."""
    states = {
        "vision": clip.to_hugging_face(vlm.vision.visual),
        "language": vlm.language.state_dict(),
    }
    projector = vlm.connector.projector()
    return states | ({"connector": projector.state_dict()} if projector is not None else {})


def fill(
    vlm: VLM,
    groups: Sequence[Group],
    dtype: torch.dtype | None,
    device: torch.device | str,
    mapped: bool = False,
) -> None:
    """Read the weights of `groups` into `vlm`, tensor by tensor; `dtype` None keeps each its own.

    A connector that is no projector is not in the files and only moves to `dtype` and `device`.
    With `mapped` the weights of the language model stay in the files, as they are stored.
    """
    projector = vlm.connector.projector()
    stay = ("language",) if mapped else ()
    loaded = load_groups(groups, states_of(vlm), dtype, device, stay)
    tower = clip.to_open_clip(loaded["vision"], len(vlm.vision.blocks()))
    vlm.vision.visual.load_state_dict(tower, assign=True)
    assign_language(vlm.language, loaded["language"])
    vlm.language.model.rotary_emb.to(device)
    if projector is not None:
        projector.load_state_dict(loaded["connector"], assign=True)
    else:
        place(vlm.connector, dtype, device)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
