"""From the folder of a released model to a VLM: first its description, then its weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlbench import plugins
from vlbench.data.template import TEMPLATES
from vlbench.data.tokenizer import Tokenizer
from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model.language import empty_language, end_ids
from vlbench.model.vision import Tower
from vlbench.model.vlm import VLM
from vlbench.model.weights import clip, hf_llava, yi_vl
from vlbench.model.weights.groups import check_groups
from vlbench.model.weights.release import Blueprint, fill, states_of
from vlbench.words import typed

LAYOUTS = (yi_vl, hf_llava)
PROJECTOR = "llava_mlp"
"""The connector that released projectors are: Yi-VL's own, and LLaVA's."""


@dataclass(frozen=True)
class Choice:
    """What a recipe chooses for itself when it begins with a released model; None: as released."""

    connector: str | None = None
    options: dict[str, Any] | None = None
    layer: int | None = None
    norm: bool = False
    template: str | None = None
    max_length: int | None = None


def is_release(folder: Path) -> bool:
    """Tell whether a folder holds a released model, or the small files of one."""
    file = folder / "config.json"
    return file.is_file() and any(layout.recognise(read_json(file)) for layout in LAYOUTS)


def layout_of(folder: Path) -> ModuleType:
    """Return the module that knows the layout of a released folder."""
    config = read_json(folder / "config.json")
    for layout in LAYOUTS:
        if layout.recognise(config):
            return layout
    raise Mistake(
        f"{folder / 'config.json'} describes neither a Yi-VL nor a LLaVA model (model_type is "
        f"{config.get('model_type')!r})"
    )


def load_release(
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    choice: Choice = Choice(),
    mapped: bool = False,
) -> VLM:
    """Return the model in a released folder; `dtype` None keeps every tensor as it is stored.

    With `mapped` the weights of the language model stay in its files, as they are stored.
    """
    if choice.connector == PROJECTOR:
        _check_projector(layout_of(folder).blueprint(folder), choice, folder)
    vlm = assemble(folder, choice)
    fill(vlm, layout_of(folder).groups(folder, vlm), dtype, device, mapped)
    return vlm


def check_release(folder: Path, choice: Choice = Choice()) -> None:
    """Compare names and shapes of a released folder's weights with what its small files describe.

    No number is read.
    """
    if choice.connector == PROJECTOR:
        _check_projector(layout_of(folder).blueprint(folder), choice, folder)
    vlm = assemble(folder, choice)
    check_groups(layout_of(folder).groups(folder, vlm), states_of(vlm))


def assemble(folder: Path, choice: Choice = Choice()) -> VLM:
    """Build the model that small files describe; tower and language model have no memory yet."""
    layout = layout_of(folder)
    plan: Blueprint = layout.blueprint(folder)
    tower = bare_tower(plan, plan.layer if choice.layer is None else choice.layer, choice.norm)
    options = {"depth": plan.depth, "norm": plan.norm}
    if choice.connector is not None:
        options = dict(choice.options or {})
    language = empty_language(plan.language)
    language.generation_config.eos_token_id = end_ids(folder, plan.language)
    tokenizer = Tokenizer.load(folder, plan.words)
    vlm = VLM(
        tower,
        plugins.connector(choice.connector or PROJECTOR),
        options,
        language,
        tokenizer,
        TEMPLATES[choice.template or template_of(folder, plan)],
        choice.max_length or plan.language.max_position_embeddings,
    )
    vlm.tokenizer.limit(plan.words or tokenizer.size)
    vlm.release = layout.small_files(folder)
    return vlm


def template_of(folder: Path, plan: Blueprint, key: str = "template") -> str:
    """Return the chat template of a release, and say why it is that one unless Yi-VL itself asks.

    `key` is what a user says to choose another. Raises a Mistake where none is known.
    """
    if not plan.template:
        raise Mistake(f"{folder}: {plan.why}; say {key}=NAME, one of {', '.join(TEMPLATES)}")
    if plan.why and os.environ.get("RANK", "0") == "0":
        print(
            f"vlbench: {folder}: template {plan.template}, as {plan.why}; {key}= chooses another",
            file=sys.stderr,
        )
    return plan.template


def bare_tower(plan: Blueprint, layer: int, norm: bool) -> Tower:
    """Build the tower that small files describe, without memory for its weights."""
    with torch.device("meta"):
        visual = clip.build(plan.vision)
    return Tower(visual, layer, norm, plan.preprocess)


def _check_projector(plan: Blueprint, choice: Choice, folder: Path) -> None:
    """Refuse a projector of another form than the release's, whose weights it is to have."""
    released = {"depth": plan.depth, "norm": plan.norm, "mlp_ratio": 1.0}
    if choice.options != released:
        say = " ".join(typed(f"connector.{key}", value) for key, value in released.items())
        raise Mistake(
            f"init={folder} has another projector: say {say}, or name another connector, which "
            "then starts anew"
        )
