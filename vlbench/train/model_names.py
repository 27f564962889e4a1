"""Which vision encoder and language model a recipe loads, in words for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlbench.config import recipe as recipes
from vlbench.config.model_schema import LanguageModelConfig, ModelConfig, NamedEncoderConfig
from vlbench.config.stage_schema import StageData
from vlbench.data.data_sources import RENDERED_SOURCES
from vlbench.train import checkpoint_files

MINIATURE_HINT = (
    "For real images: size=6b, or vision.weights= and language.weights= of your own "
    "(README, Your own images)"
)


class ModelNames(NamedTuple):
    """The names of the parts that are loaded."""

    vision: str
    language: str
    has_miniature_language: bool = False
    """True for the embedded language model, which has read of coloured shapes alone."""


def find_model_names(config: ModelConfig) -> ModelNames:
    """Return the names of the parts of a model, those of what `init` names included."""
    if config.init and not Path(config.init).is_file():
        return folder_model_names(config.init)
    return ModelNames(
        " + ".join(name_encoders(config)),
        _part_name(config.language, config.language.weights),
        config.language.weights == "embedded",
    )


def name_encoders(config: ModelConfig) -> list[str]:
    """Return the names of a model's vision encoders, without those of what `init` names."""
    return [_part_name(one, one.name) for one in (config.vision, config.vision.second) if one]


def _part_name(part: NamedEncoderConfig | LanguageModelConfig, name_of_weights: str) -> str:
    if part.weights == "embedded":
        return f"{part.name} (an embedded miniature)"
    if part.weights == "random":
        return f"{part.name} (random weights)"
    return name_of_weights if name_of_weights == part.weights else f"{part.name} ({part.weights})"


def folder_model_names(model: str) -> ModelNames:
    """Return the names of the parts of a run, a checkpoint or a released model."""
    path = Path(model).expanduser()
    if not checkpoint_files.is_run_or_checkpoint(path):
        return ModelNames(model, model)
    folder = checkpoint_files.find_checkpoint(path)
    return find_model_names(recipes.load_recipe_file(folder / "recipe.yaml").model)


def has_foreign_data(model: ModelConfig, stages: Iterable[StageData]) -> bool:
    """Tell whether the embedded language model trains on anything but rendered scenes."""
    if not find_model_names(model).has_miniature_language:
        return False
    trained_on = [
        source
        for config in (stage.config for stage in stages)
        for source in ([part.train for part in config.mix] if config.mix else [config.train])
    ]
    return any(source not in (None, *RENDERED_SOURCES) for source in trained_on)
