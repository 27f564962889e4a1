"""Load the model of a checkpoint, of a run, or of what `init` names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlbench import hub_download
from vlbench.command_line.overrides import format_override
from vlbench.config import recipe as recipes
from vlbench.config.key_types import ENCODER_PARTS, PART_NAMES
from vlbench.config.model_schema import LanguageModelConfig, ModelConfig
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageConfig
from vlbench.connector import kept_source, registry
from vlbench.errors import UserError
from vlbench.hub_download import fetch_hub_folder
from vlbench.model import lora_adapters
from vlbench.model.build_vlm import (
    build_checkpoint_vlm,
    build_vlm,
    release_overrides,
    view_keys,
)
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.view_tokens import NEWLINE_NAME
from vlbench.model.vlm import VLM
from vlbench.model.weights.connector_reference import ReferenceWeights, load_reference_weights
from vlbench.model.weights.load_release import (
    build_released_vlm,
    find_layout_module,
    is_release,
    load_release,
    resolve_template_name,
)
from vlbench.model.weights.quantized_weights import refuse_quantized_folder
from vlbench.model.weights.tensor_files import read_tensor_shapes, read_tensors, weight_files
from vlbench.model.weights.tensor_groups import (
    move_and_cast,
    summarize_unused_tensors,
    tie_word_embeddings,
)
from vlbench.model.weights.weight_origin import ORIGINS_FILE, make_weight_origin, read_origins
from vlbench.state_dicts import WeightMismatch, load_strict
from vlbench.text_files import read_json
from vlbench.text_tables import list_some
from vlbench.train import checkpoint_files
from vlbench.train.checkpoint_files import ADAPTERS_FOLDER, RELEASE_FOLDER

FLOAT32 = torch.float32
ACCEPTED_SOURCES = "run folder, checkpoint or released model"
SHOWN_MODELS = 5  # of a folder that holds models and is none


def load_checkpoint(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype | None = FLOAT32,
    device: torch.device | str = "cpu",
    skip_parts: tuple[str, ...] = (),
    mmap_language: bool = False,
    adapt_newline: bool = False,
) -> LoadedVLM:
    """Return the model in a checkpoint.

    Args:
        folder: The checkpoint.
        config: Describes the model.
        dtype: Of the weights; None keeps every tensor as it is stored.
        device: Where the weights are loaded to.
        skip_parts: Parts that keep their fresh weights.
        mmap_language: Whether the weights of the language model stay in their files until used.
        adapt_newline: Whether the checkpoint may lack the newline of tiled images, or have one for
            nothing, where `config` has other tags than the run had.

    """
    stored_parts = {
        name.partition(".")[0] for file in weight_files(folder) for name in read_tensor_shapes(file)
    }
    image_size, _ = checkpoint_files.read_preprocessing(folder)
    if (folder / RELEASE_FOLDER).is_dir():
        vlm = build_released_vlm(folder / RELEASE_FOLDER, release_overrides(config))
        vlm.set_image_size(image_size)
    else:
        vlm = build_checkpoint_vlm(
            config, [*_earlier_image_sizes(folder), image_size], folder, stored_parts, mmap_language
        )
    if "connector" not in skip_parts:
        vlm.model.set_objective(read_objective(folder))
    load_checkpoint_weights(
        folder, vlm.model, dtype, device, skip_parts, mmap_language, adapt_newline
    )
    vlm.processor = vlm.processor.with_decoding(config.draft_decoding, config.apply_exif)
    vlm.weight_origins = read_origins(folder / ORIGINS_FILE)
    return vlm


def load_recipe_with_init(words: list[str]) -> Recipe:
    """Return the recipe that `words` describe; what it leaves open is as in its `init`."""
    recipe = recipes.load_recipe(words)
    if not recipe.init:
        return recipe
    return recipes.load_recipe(words, inherited_keys(recipe.model, recipe.run))


def inherited_keys(config: ModelConfig, run: str | None) -> dict[str, Any]:
    """Return keys that a recipe takes from its `init` unless it sets them, as nested dicts.

    They are what the weights were trained with. A `run` that is resumed has them in its own folder,
    so its `init` may be gone.
    """
    source, own_recipe = Path(str(config.init)), Path(str(run), "recipe.yaml")
    if source.is_file():
        return {}
    if own_recipe.is_file() or checkpoint_files.is_run_or_checkpoint(source):
        if own_recipe.is_file():
            return _keys_of_run(own_recipe)
        return _keys_of_run(checkpoint_files.find_checkpoint(source) / "recipe.yaml")
    folder = fetch_hub_folder(
        str(source),
        "init",
        hub_download.RELEASE_CONTENTS,
        ACCEPTED_SOURCES,
        hub_download.SMALL_FILE_PATTERNS,
    )
    if is_blip2_folder(folder):
        return {}
    folder = find_released_model(str(source), "init", hub_download.SMALL_FILE_PATTERNS)
    spec = find_layout_module(folder).read_release_spec(folder)
    keys: dict[str, Any] = {"vision": {"layer": spec.vision_layer, **view_keys(spec.view_settings)}}
    default = LanguageModelConfig.model_fields["template"].default
    if config.language.template == default:  # else the recipe chose another
        keys["language"] = {"template": resolve_template_name(folder, spec, "language.template")}
    return keys


def _keys_of_run(file: Path) -> dict[str, Any]:
    """Return what a recipe takes from a run or checkpoint, whose recipe is `file`."""
    recipe = recipes.load_recipe_file(file)
    vision: dict[str, Any] = {"layer": recipe.vision.layer, "norm": recipe.vision.norm}
    language: dict[str, Any] = {"template": recipe.language.template}
    if recipe.vision.second is not None:
        vision["second"] = recipes.to_plain(recipe.vision.second)
    if recipe.vision.tiling is not None:
        vision["tiling"] = recipes.to_plain(recipe.vision.tiling)
        vision["max_visual_tokens"] = recipe.vision.max_visual_tokens
    if recipe.vision.aspect != "square":
        vision["aspect"] = recipe.vision.aspect
    # what has an init itself has its parts, and not those that its recipe names
    if recipe.init is None and not (file.parent / RELEASE_FOLDER).is_dir():
        vision |= {"name": recipe.vision.name, "weights": recipe.vision.weights}
        language |= {"name": recipe.language.name, "weights": recipe.language.weights}
    data = {key: getattr(recipe.data, key) for key in ("decode", "exif")}
    return {"vision": vision, "language": language, "data": data}


def build_from_init(
    config: ModelConfig, stage: StageConfig, mmap_language: bool = False
) -> LoadedVLM:
    """Return the model of `init` for `stage`: of a run, a checkpoint, a release or a file.

    Vision encoder, language model and tokenizer are those of `init`. So is the connector, unless
    the recipe names another one, which then has fresh weights.

    A file, or a folder with a BLIP-2, has the weights of a connector alone, in the layout of its
    reference implementation.
    """
    source, unused_tensors = str(config.init), ""
    name = registry.connector_label(config.connector_name)
    if Path(source).is_file():
        return _build_with_reference(config, stage, [Path(source)])
    if checkpoint_files.is_run_or_checkpoint(Path(source)):
        folder = checkpoint_files.find_checkpoint(Path(source))
        init_config = recipes.load_recipe_file(folder / "recipe.yaml").model
        is_new_connector = registry.connector_label(init_config.connector_name) != name
        other_source = kept_source.describe_other_source(config.connector, folder)
        if other_source and not is_new_connector:
            print(f"init {folder}: {other_source}; its weights go into the first one")
        config = _inherit_parts(init_config, config)
        try:
            vlm = load_checkpoint(
                folder,
                config,
                skip_parts=("connector",) if is_new_connector else (),
                mmap_language=mmap_language,
                adapt_newline=True,
            )
        except WeightMismatch as mismatch:
            raise _explain_mismatch(mismatch, init_config, config) from mismatch
    else:
        folder = fetch_hub_folder(source, "init", hub_download.RELEASE_CONTENTS, ACCEPTED_SOURCES)
        if is_blip2_folder(folder):
            return _build_with_reference(config, stage, weight_files(folder))
        folder = find_released_model(source, "init")
        torch.manual_seed(config.seed)
        vlm = load_release(
            folder, FLOAT32, overrides=release_overrides(config), mmap_language=mmap_language
        )
        is_new_connector = vlm.connector.released_projector() is None
        unused_tensors = summarize_unused_tensors(
            find_layout_module(folder).build_tensor_groups(folder, vlm.model)
        )
    if is_new_connector:
        vlm.model.set_objective(stage.objective, fresh=True)
    vlm.weight_origins = {
        **{
            part: make_weight_origin(source, encoder.visual)
            for part, encoder in zip(ENCODER_PARTS, vlm.vision.encoders(), strict=False)
        },
        "connector": make_weight_origin(
            vlm.connector.weights_source if is_new_connector else source, vlm.connector
        ),
        "language": make_weight_origin(source, vlm.language),
    }
    llama, blocks = vlm.language.config, len(vlm.vision.blocks())
    print(
        f"init {folder}: vision encoder of {blocks} blocks, {vlm.vision.feature_width} wide; "
        f"language model of {llama.num_hidden_layers} layers, {llama.hidden_size} wide"
        + (f"; connector {name} starts anew" if is_new_connector else "")
        + (f"; left out of its files: {unused_tensors}" if unused_tensors else "")
    )
    return vlm


def _explain_mismatch(
    mismatch: WeightMismatch, init_config: ModelConfig, config: ModelConfig
) -> UserError:
    """Return an error that names the connector options in which `init` differs, if any."""
    options = config.connector_options
    changed = {k: v for k, v in init_config.connector_options.items() if options.get(k) != v}
    if not changed or init_config.connector_name != config.connector_name:
        return mismatch
    words = " ".join(format_override(f"connector.{key}", value) for key, value in changed.items())
    return UserError(f"init={config.init} has another connector: say {words} ({mismatch})")


def _inherit_parts(init_config: ModelConfig, config: ModelConfig) -> ModelConfig:
    """Return `config` with the parts of `init`: its checkpoint lacks those it never trained."""
    origin = {"name", "weights"}  # a second encoder is inherited by key
    vision = config.vision.model_copy(update=init_config.vision.model_dump(include=origin))
    language = config.language.model_copy(update=init_config.language.model_dump(include=origin))
    return replace(config, vision=vision, language=language)


def _build_with_reference(config: ModelConfig, stage: StageConfig, files: list[Path]) -> LoadedVLM:
    """Return the recipe's model, its connector with the weights of a reference implementation."""
    vlm = build_vlm(config, stage.image_size, stage.objective)
    file = files[0] if len(files) == 1 else files[0].parent
    name = registry.connector_label(config.connector_name)
    summary = load_reference_weights(vlm.connector, ReferenceWeights(files), name, f"init={file}")
    vlm.weight_origins["connector"] = make_weight_origin(str(config.init), vlm.connector)
    print(f"init {file}: weights of connector {name}: {summary}")
    return vlm


def is_blip2_folder(folder: Path) -> bool:
    """Tell whether a folder has a BLIP-2 or InstructBLIP of transformers, for its Q-Former."""
    file = folder / "config.json"
    model_type = str(read_json(file).get("model_type")) if file.is_file() else ""
    return model_type.startswith(("blip", "instructblip"))


def find_released_model(
    source: str, key: str, file_patterns: tuple[str, ...] = hub_download.DOWNLOAD_PATTERNS
) -> Path:
    """Return the folder of a released model; `key` names `source` in an error.

    From a hub the files that match `file_patterns` are downloaded.
    """
    folder = fetch_hub_folder(
        source, key, hub_download.RELEASE_CONTENTS, ACCEPTED_SOURCES, file_patterns
    )
    refuse_quantized_folder(folder)
    is_released_model = is_release(folder)
    if (folder / "adapter_config.json").is_file() and (
        Path(source).is_dir() or not is_released_model
    ):
        weight_files(folder)  # raises an error that helps, if only adapters are there
    if not is_released_model:
        raise UserError(
            f"{key} is '{source}', which is no run or checkpoint, and no released model: wanted is "
            f"config.json of Yi-VL's layout or of Hugging Face's LLaVA{_name_models_inside(folder)}"
        )
    return folder


def _name_models_inside(folder: Path) -> str:
    """Return a hint at the runs or checkpoints of a folder that is none itself, "" without any."""
    names = sorted(
        child.name for child in folder.iterdir() if checkpoint_files.is_run_or_checkpoint(child)
    )
    return f"; there are in it: {list_some(names, SHOWN_MODELS)}" if names else ""


def load_checkpoint_weights(
    folder: Path,
    vlm: VLM,
    dtype: torch.dtype | None = FLOAT32,
    device: torch.device | str = "cpu",
    skip_parts: tuple[str, ...] = (),
    mmap_language: bool = False,
    adapt_newline: bool = False,
) -> None:
    """Load the parts that a checkpoint holds into `vlm`, strictly; move the others only.

    The arguments are those of `load_checkpoint`.
    """
    states = _read_part_tensors(folder, dtype, device, mmap_language)
    for part, module in vlm.named_parts():
        if part not in states and part not in skip_parts and _needs_stored_weights(part, module):
            raise WeightMismatch(f"{folder} has no weights of part {part}: its file is not whole")
        if part == "connector" and part in states and adapt_newline:
            states[part] = _with_newline_of(module, states[part])
        if part in states and part not in skip_parts:
            load_strict(module, states[part], f"{folder}, part {part}", assign=True)
        if part not in skip_parts:
            lora_adapters.load_adapters(module, folder / ADAPTERS_FOLDER / part)
        move_and_cast(module, None if mmap_language and part == "language" else dtype, device)
    tie_word_embeddings(vlm.language)


def _with_newline_of(connector: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the newline of `connector` where it has none; without, where that has."""
    own = dict(connector.named_parameters(recurse=False)).get(NEWLINE_NAME)
    adapted = {name: tensor for name, tensor in state.items() if name != NEWLINE_NAME}
    return adapted if own is None else {**adapted, NEWLINE_NAME: state.get(NEWLINE_NAME, own.data)}


def _read_part_tensors(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str, mmap_language: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by part and key."""
    states: dict[str, dict[str, Tensor]] = {}
    for file in weight_files(folder):
        mapped_names = {
            name
            for name in read_tensor_shapes(file)
            if mmap_language and name.startswith("language.")
        }
        for name, tensor in read_tensors(file, mmap_names=mapped_names):
            part, _, key = name.partition(".")
            if part not in PART_NAMES:
                raise UserError(f"{file}: tensor {name} belongs to none of {', '.join(PART_NAMES)}")
            target_dtype = tensor.dtype
            if dtype and tensor.is_floating_point() and name not in mapped_names:
                target_dtype = dtype
            states.setdefault(part, {})[key] = tensor.to(device=device, dtype=target_dtype)
    return states


def _needs_stored_weights(part: str, module: torch.nn.Module) -> bool:
    """Tell whether only a checkpoint can have the weights of a part.

    Vision encoder and language model may have been loaded from the files that the recipe names.
    """
    return part == "connector" or any(tensor.is_meta for tensor in module.parameters())


def _earlier_image_sizes(folder: Path) -> list[int]:
    """Return the image sizes of the stages that came before that of a checkpoint, in order."""
    recipe = recipes.load_recipe_file(folder / "recipe.yaml")
    name = checkpoint_files.read_position(folder).name
    sizes = {stage: config.image_size for stage, config in recipe.selected_stages.items()}
    return list(sizes.values())[: list(sizes).index(name)] if name in sizes else []


def read_objective(folder: Path) -> str:
    """Return the objective of the stage that a checkpoint belongs to."""
    name = checkpoint_files.read_position(folder).name
    stages = recipes.load_recipe_file(folder / "recipe.yaml").stages
    return stages[name].objective if name in stages else "language"
