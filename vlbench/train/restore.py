"""From a checkpoint, a run or a released model on disk to a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlbench import recipe as recipes
from vlbench.files import read_json
from vlbench.mistakes import Mistake
from vlbench.model import lora
from vlbench.model.compose import choice_of, compose, compose_empty
from vlbench.model.vlm import PARTS, VLM
from vlbench.model.weights import hub
from vlbench.model.weights.groups import left_out, place, tie
from vlbench.model.weights.hub import fetch
from vlbench.model.weights.load import assemble, is_release, layout_of, load_release, template_of
from vlbench.model.weights.origin import ORIGINS, origin_of, read_origins
from vlbench.model.weights.quantized import refuse_quantized
from vlbench.model.weights.reference import References, load_reference
from vlbench.model.weights.shards import read, shapes, weight_files
from vlbench.schema import Language, Recipe, Stage
from vlbench.train import checkpoint
from vlbench.train.checkpoint import ADAPTERS, RELEASE
from vlbench.words import typed

FLOAT32 = torch.float32
KINDS = "run folder, checkpoint or released model"


class Misfit(Mistake):
    """Weights that do not fit into the part of a model that they were meant for."""


def restore(
    folder: Path,
    recipe: Recipe,
    dtype: torch.dtype | None = FLOAT32,
    device: torch.device | str = "cpu",
    skip: tuple[str, ...] = (),
    mapped: bool = False,
) -> VLM:
    """Return the model in a checkpoint, as `recipe` describes it.

    `dtype` None keeps every tensor as it is stored. Parts in `skip` start anew. With `mapped` the
    weights of the language model stay in their files.
    """
    held = {name.partition(".")[0] for file in weight_files(folder) for name in shapes(file)}
    side, _ = checkpoint.preprocessed(folder)
    if (folder / RELEASE).is_dir():
        vlm = assemble(folder / RELEASE, choice_of(recipe))
        vlm.resize(side)
    else:
        vlm = compose_empty(recipe, [*_earlier_sides(folder), side], folder, held, mapped)
    if "connector" not in skip:
        vlm.pursue(objective_of(folder))
    load_weights(folder, vlm, dtype, device, skip, mapped)
    vlm.vision.draft = recipe.data.decode == "draft"
    vlm.origins = read_origins(folder / ORIGINS)
    return vlm


def inherited(recipe: Recipe) -> dict[str, Any]:
    """Return keys that a recipe has from its `init` unless it says them itself, as nested dicts.

    They are what the weights were trained with. A run that goes on has them already: its `init`
    may be gone.
    """
    source, own = Path(str(recipe.init)), Path(str(recipe.run), "recipe.yaml")
    if source.is_file():
        return {}
    if own.is_file() or checkpoint.holds(source):
        before = recipes.load_file(
            own if own.is_file() else checkpoint.find(source) / "recipe.yaml"
        )
        vision = {"layer": before.vision.layer, "norm": before.vision.norm}
        return {"vision": vision, "language": {"template": before.language.template}}
    folder = fetch(str(source), "init", hub.RELEASE, KINDS, hub.SMALL)
    if of_connector(folder):
        return {}
    folder = released(str(source), "init", hub.SMALL)
    plan = layout_of(folder).blueprint(folder)
    keys: dict[str, Any] = {"vision": {"layer": plan.layer}}
    if recipe.language.template == Language.template:  # else the recipe chose another
        keys["language"] = {"template": template_of(folder, plan, "language.template")}
    return keys


def begin(recipe: Recipe, stage: Stage, mapped: bool = False) -> VLM:
    """Return the model that `init` means for `stage`: of a run, a checkpoint, a release or a file.

    A file, or a folder of BLIP-2's, holds the weights of a connector in the layout of its reference
    implementation.

    Tower, language model and tokenizer are those of `init`. The connector is as well, unless the
    recipe names another one, which then starts anew.
    """
    source, left = str(recipe.init), ""
    if Path(source).is_file():
        return _with_reference(recipe, stage, [Path(source)])
    if checkpoint.holds(Path(source)):
        folder = checkpoint.find(Path(source))
        before = recipes.load_file(folder / "recipe.yaml")
        other = before.connector["name"] != recipe.connector["name"]
        recipe = _with_parts_of(before, recipe)
        try:
            vlm = restore(folder, recipe, skip=("connector",) if other else (), mapped=mapped)
        except Misfit as misfit:
            raise _explained(misfit, before, recipe) from misfit
    else:
        folder = fetch(source, "init", hub.RELEASE, KINDS)
        if of_connector(folder):
            return _with_reference(recipe, stage, weight_files(folder))
        folder = released(source, "init")
        torch.manual_seed(recipe.seed)
        vlm = load_release(folder, FLOAT32, choice=choice_of(recipe), mapped=mapped)
        other = vlm.connector.projector() is None
        left = left_out(layout_of(folder).groups(folder, vlm))
    if other:
        vlm.pursue(stage.objective, fresh=True)
    vlm.origins = {
        "vision": origin_of(source, vlm.vision.visual),
        "connector": origin_of(vlm.connector.weights_source if other else source, vlm.connector),
        "language": origin_of(source, vlm.language),
    }
    config, blocks = vlm.language.config, len(vlm.vision.blocks())
    print(
        f"init {folder}: tower of {blocks} blocks, {vlm.vision.width} wide; language model of "
        f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
        + (f"; connector {recipe.connector['name']} starts anew" if other else "")
        + (f"; left out of its files: {left}" if left else "")
    )
    return vlm


def _explained(misfit: Misfit, before: Recipe, recipe: Recipe) -> Mistake:
    """Say which options of the connector `init` was trained with, where they are other ones."""
    differ = {k: v for k, v in before.connector.items() if recipe.connector.get(k) != v}
    if not differ or "name" in differ:
        return misfit
    say = " ".join(typed(f"connector.{key}", value) for key, value in differ.items())
    return Mistake(f"init={recipe.init} has another connector: say {say} ({misfit})")


def _with_parts_of(before: Recipe, recipe: Recipe) -> Recipe:
    """Return `recipe` with the parts of another: what that never trained no checkpoint holds."""
    parts = {
        part: replace(getattr(recipe, part), name=theirs.name, weights=theirs.weights)
        for part, theirs in (("vision", before.vision), ("language", before.language))
    }
    return replace(recipe, **parts)


def _with_reference(recipe: Recipe, stage: Stage, files: list[Path]) -> VLM:
    """Return the recipe's model, its connector with the weights of a reference implementation."""
    vlm = compose(recipe, stage.image_size, stage.objective)
    file = files[0] if len(files) == 1 else files[0].parent
    name = recipe.connector["name"]
    said = load_reference(vlm.connector, References(files), name, f"init={file}")
    vlm.origins["connector"] = origin_of(str(recipe.init), vlm.connector)
    print(f"init {file}: weights of connector {name}: {said}")
    return vlm


def of_connector(folder: Path) -> bool:
    """Tell whether a folder is a BLIP-2 in Hugging Face's layout, of which connectors are made."""
    file = folder / "config.json"
    return file.is_file() and str(read_json(file).get("model_type")).startswith("blip")


def released(source: str, key: str, patterns: tuple[str, ...] = hub.PATTERNS) -> Path:
    """Return the folder of a released model; `key` names `source` in a mistake.

    From a hub the files of `patterns` are fetched.
    """
    folder = fetch(source, key, hub.RELEASE, KINDS, patterns)
    refuse_quantized(folder)
    whole = is_release(folder)
    if (folder / "adapter_config.json").is_file() and (Path(source).is_dir() or not whole):
        weight_files(folder)  # which says what to give, unless the model is there as well
    if not whole:
        raise Mistake(
            f"{key} is '{source}', which is no run or checkpoint, and no released model: wanted is "
            "config.json of Yi-VL's layout or of Hugging Face's LLaVA"
        )
    return folder


def load_weights(
    folder: Path,
    vlm: VLM,
    dtype: torch.dtype | None = FLOAT32,
    device: torch.device | str = "cpu",
    skip: tuple[str, ...] = (),
    mapped: bool = False,
) -> None:
    """Load the parts that a checkpoint holds into `vlm`, strictly; others are only moved."""
    states = _read_parts(folder, dtype, device, mapped)
    for part, module in vlm.parts():
        if part not in states and part not in skip and _must_be_held(part, module):
            raise Misfit(f"{folder} has no weights of part {part}: its file is not whole")
        if part in states and part not in skip:
            load_part(module, states[part], f"{folder}, part {part}")
        if part not in skip:
            lora.load(module, folder / ADAPTERS / part)
        place(module, None if mapped and part == "language" else dtype, device)
    tie(vlm.language)


def _read_parts(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, mapped: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by part and key."""
    states: dict[str, dict[str, Tensor]] = {}
    for file in weight_files(folder):
        stay = {name for name in shapes(file) if mapped and name.startswith("language.")}
        for name, tensor in read(file, mapped=stay):
            part, _, key = name.partition(".")
            if part not in PARTS:
                raise Mistake(f"{file}: tensor {name} belongs to none of {', '.join(PARTS)}")
            kind = tensor.dtype
            if dtype and tensor.is_floating_point() and name not in stay:
                kind = dtype
            states.setdefault(part, {})[key] = tensor.to(device=device, dtype=kind)
    return states


def _must_be_held(part: str, module: torch.nn.Module) -> bool:
    """Tell whether only a checkpoint can have the weights of a part.

    Vision encoder and language model may have been loaded from the files that the recipe names.
    """
    return part == "connector" or any(tensor.is_meta for tensor in module.parameters())


def load_part(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into `module`; a tensor that is missing, surplus or mis-shaped is named."""
    wanted = module.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            what = "is missing" if key not in state else "does not belong there"
            raise Misfit(f"{where}: tensor {key} {what}")
        if state[key].shape != wanted[key].shape:
            raise Misfit(
                f"{where}: tensor {key} has shape {tuple(state[key].shape)}, "
                f"needed is {tuple(wanted[key].shape)}"
            )
    module.load_state_dict(state, strict=True, assign=True)


def _earlier_sides(folder: Path) -> list[int]:
    """Return the image sizes of the stages that came before that of a checkpoint, in order."""
    run, name = recipes.load_file(folder / "recipe.yaml"), checkpoint.position(folder).name
    names = recipes.stages_to_run(run)
    before = names[: names.index(name)] if name in names else []
    return [run.stages[one].image_size for one in before]


def objective_of(folder: Path) -> str:
    """Return the objective of the stage that a checkpoint belongs to."""
    name = checkpoint.position(folder).name
    stages = recipes.load_file(folder / "recipe.yaml").stages
    return stages[name].objective if name in stages else "language"
