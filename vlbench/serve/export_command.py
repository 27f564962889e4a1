"""`python -m vlbench export`: write a model in a layout that others load, with a model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlbench.command_line.arguments import ExportArguments, ExportFormat
from vlbench.command_line.overrides import format_override
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.connector.kept_source import copy_kept_source
from vlbench.errors import UserError
from vlbench.load_model import find_model_folder, load_model_folder, parse_dtype
from vlbench.model import lora_adapters
from vlbench.model.build_vlm import view_keys
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights import yi_vl_layout
from vlbench.model.weights.export_hf_llava import write_hf_llava
from vlbench.model.weights.export_hf_llava_next import write_hf_llava_next
from vlbench.model.weights.export_yi_vl import write_yi_vl
from vlbench.model.weights.tensor_files import cast_floating
from vlbench.model.weights.tensor_writer import write_tensors
from vlbench.new_folder import check_new_folder, write_new_folder
from vlbench.serve.model_card import (
    describe_training,
    render_model_card,
    tell_lost_orientation,
    training_command,
)
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import read_json
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.run_results_file import read_results


def run_export(arguments: ExportArguments) -> int:
    """Write a model to a new folder, in one of the formats, with a model card."""
    layout, to = arguments.format, Path(arguments.out)
    dtype = parse_dtype(arguments.dtype)
    check_new_folder(to)
    source = find_model_folder(arguments.model, "model")
    vlm = load_model_folder(
        source, None, template=arguments.template, trust_connector=arguments.trust_connector
    )
    if layout != "vlbench":
        _refuse_second_encoder(vlm, layout, source)
        _refuse_tiles(vlm, layout, source)
        _refuse_other_resizing(vlm, layout, source)
    _merge_or_refuse_lora(vlm, layout, arguments.merge_lora, source)
    recipe = _load_source_recipe(source, vlm)
    names = (recipe.recipe, recipe.size)
    again = training_command(*names, to, recipe.connector, recipe.last_stage_data)
    training = _tell_training(source, recipe)
    try:
        with write_new_folder(to) as writing:
            if layout == "vlbench":
                position = _training_position(source, list(recipe.stages))
                recipe_text = recipes.recipe_to_yaml(recipe)
                _write_checkpoint(vlm, writing, dtype, source, recipe_text, position)
            else:
                _write_release(layout, vlm, writing, dtype, source)
            results = _load_run_results(source)
            text = render_model_card(vlm, training, again, layout, to, source, results)
            (writing / "README.md").write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise explain_unwritable(error, f"out={to}") from error
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    if lost := tell_lost_orientation(vlm, layout):
        print(f"vlbench: {lost}", file=sys.stderr)
    print(f"wrote {to} ({size / 1e6:,.1f} MB, format {layout}); README.md in it says how to use it")
    return 0


def _tell_training(source: Path, recipe: Recipe) -> str:
    """Return what was trained until `source`, a checkpoint or a released model."""
    is_checkpoint = checkpoint_files.is_run_or_checkpoint(source)
    # a release that was written in our format has its files, and began with nothing else
    if not is_checkpoint or (
        recipe.init is None and (source / checkpoint_files.RELEASE_FOLDER).is_dir()
    ):
        return "Nothing was trained: these are the released weights."
    position = checkpoint_files.read_position(source)
    return describe_training(recipe.recipe, recipe.model, recipe.selected_stages, position)


def _refuse_second_encoder(vlm: LoadedVLM, layout: ExportFormat, source: Path) -> None:
    """Refuse to write two vision encoders in a released layout, which has one."""
    if len(vlm.vision.encoders()) > 1:
        raise UserError(
            f"{source} has two vision encoders, which format={layout} cannot hold: say "
            "format=vlbench"
        )


def _refuse_tiles(vlm: LoadedVLM, layout: ExportFormat, source: Path) -> None:
    """Refuse to write a model of images in tiles, or of any shape, where a layout has neither."""
    if vlm.processor.transform.native:
        raise UserError(
            f"{source} takes images in their own aspect ratios (vision.aspect=native), which "
            f"format={layout} cannot hold: say format=vlbench"
        )
    if vlm.processor.view_settings is not None and layout != "hf_llava_next":
        raise UserError(
            f"{source} cuts images into tiles (vision.tiling), which format={layout} cannot hold: "
            "format=hf_llava_next holds those of LLaVA-NeXT, format=vlbench all"
        )


def _refuse_other_resizing(vlm: LoadedVLM, layout: ExportFormat, source: Path) -> None:
    """Refuse to write images that the layout does not resize so; transformers' may be squashed."""
    transform = vlm.processor.transform
    may_squash = layout in ("hf_llava", "hf_llava_next")
    if transform.squash and not may_squash:
        raise UserError(
            f"images of {source} are {transform.describe()}; format={layout} holds resizing to a "
            "padded or cropped square alone: say format=vlbench"
        )


def _merge_or_refuse_lora(
    vlm: LoadedVLM, layout: ExportFormat, merge_lora: bool, source: Path
) -> None:
    """Merge LoRA adapters into the weights if that is wanted; released layouts have none."""
    adapted = {
        name: part
        for name, part in vlm.model.named_parts()
        if lora_adapters.adapter_parameters(part)
    }
    if merge_lora:
        for part in adapted.values():
            lora_adapters.merge_adapters(part)
    elif adapted and layout != "vlbench":
        raise UserError(
            f"{source} has LoRA adapters ({', '.join(adapted)}), which format={layout} cannot "
            "hold: say merge_lora=true, or format=vlbench"
        )


def _write_release(
    layout: ExportFormat, vlm: LoadedVLM, folder: Path, dtype: torch.dtype | None, source: Path
) -> None:
    """Write a released layout."""
    if layout == "yi_vl":
        write_yi_vl(vlm, folder, dtype, source if _is_yi_vl_release(source) else None)
    elif layout == "hf_llava_next":
        write_hf_llava_next(vlm, folder, dtype)
    else:
        write_hf_llava(vlm, folder, dtype, has_norms=layout == "yi_vl_hf")


def _write_checkpoint(
    vlm: LoadedVLM,
    folder: Path,
    dtype: torch.dtype | None,
    source: Path,
    recipe_text: str,
    position: RunPosition,
) -> None:
    """Write a checkpoint that stands alone, with every weight."""
    tensors = (
        (f"{part}.{key}", cast_floating(value, dtype))
        for part, module in vlm.model.named_parts()
        for key, value in lora_adapters.base_state_dict(module).items()
    )
    write_tensors(tensors, folder)
    checkpoint_files.write_metadata(vlm, folder, recipe_text, position)
    copy_kept_source(source, folder)


def _is_yi_vl_release(source: Path) -> bool:
    return not checkpoint_files.is_run_or_checkpoint(source) and yi_vl_layout.is_layout_config(
        read_json(source / "config.json")
    )


def _training_position(source: Path, stage_names: list[str]) -> RunPosition:
    """Return where a checkpoint stands; a released model stands before the last stage's end."""
    if checkpoint_files.is_run_or_checkpoint(source):
        return checkpoint_files.read_position(source)
    return RunPosition(len(stage_names) - 1, stage_names[-1], 0)


def _load_source_recipe(source: Path, vlm: LoadedVLM) -> Recipe:
    """Return the recipe of a checkpoint, or the one that a released model would have had."""
    if checkpoint_files.is_run_or_checkpoint(source):
        recipe = recipes.load_recipe_file(source / "recipe.yaml")
        language = recipe.language.model_copy(update={"template": vlm.processor.template.name})
        return recipe.model_copy(update={"language": language})
    options = [
        format_override(f"connector.{key}", value)
        for key, value in vlm.model.connector_options.items()
    ]
    views = view_keys(vlm.processor.view_settings)
    options += [
        format_override(f"vision.tiling.{key}", value)
        for key, value in views.pop("tiling", {}).items()
    ]
    options += [format_override(f"vision.{key}", value) for key, value in views.items()]
    layers = vlm.language.config.num_hidden_layers
    return recipes.load_recipe(
        [
            "recipe=yivl_llava",
            f"size={'34b' if layers == 60 else '6b'}",
            f"vision.layer={vlm.vision.layer}",
            f"language.template={vlm.processor.template.name}",
            f"language.max_length={vlm.processor.max_length}",
            *options,
        ]
    )


def _load_run_results(source: Path) -> dict[str, Any]:
    """Return the results of the run whose newest checkpoint `source` is, {} when there are none."""
    file = source.parent.parent / "results.json"
    if not checkpoint_files.is_run_or_checkpoint(source) or not file.is_file():
        return {}
    positions = checkpoint_files.list_positions(source.parent)
    is_newest = positions[-1:] == [checkpoint_files.read_position(source)]
    return read_results(file) if is_newest else {}
