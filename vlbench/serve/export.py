"""`python -m vlbench export`: write a model in a layout that others load, with a model card."""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vlbench import recipe as recipes
from vlbench.data.template import template_named
from vlbench.files import read_json
from vlbench.mistakes import Mistake, nearest
from vlbench.model import lora
from vlbench.model.vlm import VLM
from vlbench.model.weights import yi_vl
from vlbench.model.weights.shards import write
from vlbench.model.weights.to_hf_llava import write_hf_llava
from vlbench.model.weights.to_yi_vl import write_yi_vl
from vlbench.schema import Recipe
from vlbench.serve.card import card
from vlbench.serve.load import find, open_model, type_named
from vlbench.train import checkpoint
from vlbench.train.checkpoint import Position
from vlbench.words import given_keys, truth, typed

FORMATS = ("yi_vl", "hf_llava", "vlbench")


def main(words: list[str]) -> int:
    """Write `run=PATH` (run, checkpoint or released model) to the new folder `to=DIR`."""
    given = given_keys(
        "export", words, ("run", "to", "format"), ("dtype", "merge_lora", "template")
    )
    layout, to = given["format"], Path(given["to"]).expanduser()
    if layout not in FORMATS:
        known = ", ".join(FORMATS)
        raise Mistake(f"format is '{layout}'; known are {known}.{nearest(layout, FORMATS)}")
    kind, template = type_named(given.get("dtype")), template_named(given.get("template"))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Mistake(f"to={to} is there already; name a new folder")
    source = find(given["run"], "run")
    vlm = open_model(source, None, template=template)
    _settle_adapters(vlm, layout, truth(given, "merge_lora"), source)
    recipe = _recipe(source, vlm)
    writing = to.parent / f".writing-{to.name}"
    shutil.rmtree(writing, ignore_errors=True)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        writing.mkdir(parents=True)
        _write(layout, vlm, writing, kind, source, recipe)
        trained = checkpoint.holds(source)
        text = card(vlm, recipe, trained, layout, to, source, _results(source))
        (writing / "README.md").write_text(text, encoding="utf-8")
        if to.exists():
            to.rmdir()
        writing.rename(to)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Mistake(f"to={to} cannot be written ({reason})") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    print(f"wrote {to} ({size / 1e6:,.1f} MB, format {layout}); README.md in it says how to use it")
    return 0


def _settle_adapters(vlm: VLM, layout: str, merge: bool, source: Path) -> None:
    """Merge LoRA adapters into the weights if that is wanted; released layouts have none."""
    adapted = [name for name, part in vlm.parts() if lora.adapters(part)]
    if merge:
        for name in adapted:
            lora.merge(getattr(vlm, name))
    elif adapted and layout != "vlbench":
        raise Mistake(
            f"{source} has LoRA adapters ({', '.join(adapted)}), which format={layout} cannot "
            "hold: say merge_lora=true, or format=vlbench"
        )


def _leave(number: int, _: Any) -> None:
    """End as a signal asks, but by an exception: what is half written is then removed."""
    sys.exit(128 + number)


def _write(
    layout: str,
    vlm: VLM,
    folder: Path,
    kind: torch.dtype | None,
    source: Path,
    recipe: Recipe,
) -> None:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    change = cast if kind else None
    if layout == "yi_vl":
        write_yi_vl(vlm, folder, change, source if _is_yi_vl(source) else None)
    elif layout == "hf_llava":
        write_hf_llava(vlm, folder, change)
    else:
        tensors = (
            (f"{part}.{key}", change(value) if change else value)
            for part, module in vlm.parts()
            for key, value in lora.base_state(module).items()
        )
        write(tensors, folder)
        checkpoint.describe(vlm, folder, recipes.dump(recipe), _position(source, recipe))


def _is_yi_vl(source: Path) -> bool:
    return not checkpoint.holds(source) and yi_vl.recognise(read_json(source / "config.json"))


def _position(source: Path, recipe: Recipe) -> Position:
    """Return where a checkpoint stands; a released model stands before the last stage's end."""
    if checkpoint.holds(source):
        return checkpoint.position(source)
    names = list(recipe.stages)
    return Position(len(names) - 1, names[-1], 0)


def _recipe(source: Path, vlm: VLM) -> Recipe:
    """Return the recipe of a checkpoint, or the one that a released model would have had."""
    if checkpoint.holds(source):
        recipe = recipes.load_file(source / "recipe.yaml")
        template: Any = vlm.template.name
        return replace(recipe, language=replace(recipe.language, template=template))
    options = [typed(f"connector.{key}", value) for key, value in vlm.options.items()]
    layers = vlm.language.config.num_hidden_layers
    return recipes.load(
        [
            "recipe=yivl_llava",
            f"size={'34b' if layers == 60 else '6b'}",
            f"vision.layer={vlm.vision.layer}",
            f"language.template={vlm.template.name}",
            f"language.max_length={vlm.max_length}",
            *options,
        ]
    )


def _results(source: Path) -> dict[str, Any]:
    """Return the results of the run that a checkpoint lies in, {} when there are none."""
    file = source.parent.parent / "results.json"
    return read_json(file) if checkpoint.holds(source) and file.is_file() else {}
