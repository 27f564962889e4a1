"""The words of `graft` as a recipe: three names, whose weights follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vlbench.command_line.arguments import DEFAULT_MFU, GraftArguments
from vlbench.command_line.overrides import parse_overrides
from vlbench.command_line.parser import split_arguments
from vlbench.config import recipe as recipes
from vlbench.config.model_schema import LanguageModelConfig
from vlbench.config.resolve import mapping_in
from vlbench.config.schema import Recipe
from vlbench.data.data_sources import SCENES_SOURCE
from vlbench.encoder_names import (
    EMBEDDED_ENCODERS,
    check_encoder_name,
    vision_encoder_names,
)
from vlbench.errors import UserError, suggest_name
from vlbench.graft.size_parts import size_parts, size_weights
from vlbench.key_errors import declared_keys
from vlbench.new_folder import first_free_path
from vlbench.planner.gpu_table import GpuSpec, find_gpu
from vlbench.planner.options import PlanOptions

BASE_RECIPE = "yivl_llava"
"""The stages of a graft, unless `recipe=` names others."""
LANGUAGE_NAMES: tuple[str, ...] = get_args(LanguageModelConfig.model_fields["name"].annotation)


@dataclass(frozen=True)
class GraftOptions:
    """What to graft, and what to do with it."""

    recipe: Recipe
    gpu: GpuSpec | None
    """The GPU that was named; None: the one of this machine."""
    out: Path
    """The recipe to be written."""
    tries: bool
    takes_scenes: bool
    """Whether rendered scenes stand in for data that were not named."""
    names_template: bool
    """Whether `language.template` was given, or the language model by a name of Yi's."""

    def plan_options(self, gpu: GpuSpec) -> PlanOptions:
        """Return what the planner is asked: the memory on one `gpu`."""
        return PlanOptions(self.recipe, gpu, DEFAULT_MFU, (), (), probe=False)


def parse_graft_options(words: list[str]) -> GraftOptions:
    """Return the options of a command line; a UserError for anything wrong in it."""
    arguments, recipe_words = split_arguments(GraftArguments, words, declared_keys(Recipe))
    typed, _ = parse_overrides(recipe_words)  # what is wrong in it, load_recipe tells
    part_words, mistakes = _part_words(arguments, typed)
    out = Path(arguments.out) if arguments.out else first_free_path("recipes/graft-{}.yaml")
    mistakes += _out_mistakes(out)
    gpu = find_gpu(arguments.gpu) if arguments.gpu else None
    if mistakes:
        raise UserError(*mistakes)
    recipe = recipes.load_recipe([*part_words, *recipe_words])
    takes_scenes = not recipe.data.is_given
    if takes_scenes:
        data = recipe.data.model_copy(update={"train": SCENES_SOURCE})
        recipe = recipe.model_copy(update={"data": data})
    names_template = (
        "template" in mapping_in(typed, "language") or arguments.language in LANGUAGE_NAMES
    )
    return GraftOptions(recipe, gpu, out, arguments.try_, takes_scenes, names_template)


def _part_words(arguments: GraftArguments, typed: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the recipe's words for the three names, and what is wrong with the names."""
    vision, language = arguments.vision, arguments.language
    mistakes = [*_vision_mistakes(vision), *_language_mistakes(language)]
    words = [f"connector.name={arguments.connector}", f"vision.name={vision}"]
    if "weights" not in mapping_in(typed, "vision") and not mistakes:
        words += _vision_weights(vision, mistakes)
    if language in LANGUAGE_NAMES:
        words.append(f"language.name={language}")
    if "weights" not in mapping_in(typed, "language"):
        words.append(f"language.weights={size_weights('language', language) or language}")
    if "recipe" not in typed:
        words.append(f"recipe={BASE_RECIPE}")
    is_miniature = language == "tiny" and vision in EMBEDDED_ENCODERS
    if "size" not in typed:
        words.append("size=tiny" if is_miniature else "size=6b")
    return words, mistakes


def _vision_mistakes(name: str) -> Iterator[str]:
    """Yield what is wrong with `vision=NAME`."""
    try:
        check_encoder_name(name)
    except ValueError as error:
        if name not in dict(size_parts("encoders")):
            yield f"vision {error}"


def _language_mistakes(name: str) -> Iterator[str]:
    """Yield what is wrong with `language=NAME`: no known name, no folder, no hub id."""
    if name not in LANGUAGE_NAMES and "/" not in name and not Path(name).is_dir():
        yield (
            f"language is '{name}'; known are {', '.join(LANGUAGE_NAMES)}, or a folder or hub id "
            f"(OWNER/NAME) of a language model.{suggest_name(name, LANGUAGE_NAMES)}"
        )


def _vision_weights(name: str, mistakes: list[str]) -> list[str]:
    """Return the word for the weights that `vision=NAME` has: its own, of a size, or published."""
    if name in EMBEDDED_ENCODERS:
        return ["vision.weights=embedded"]
    if Path(name).is_dir():
        return [f"vision.weights={name}"]
    if name in dict(size_parts("encoders")):  # the size says which it is, weights included
        return []
    known = size_weights("vision", name)
    if known is None:
        # slow, and many names need it not
        from vlbench.model.vision_config import list_usable_tags

        known = next(iter(list_usable_tags(name)), None)
    if known is None and "/" not in name:
        mistakes.append(_no_published_weights(name))
    return [] if known is None else [f"vision.weights={known}"]


def _no_published_weights(name: str) -> str:
    """Return what is wrong with a name of open_clip to which none of its tags belongs."""
    other = f"{name}-quickgelu"
    if other in vision_encoder_names():
        return (
            f"vision is '{name}', whose published weights were all trained with QuickGELU: say "
            f"vision={other}, or vision.weights=FILE"
        )
    return f"vision.weights=FILE is needed: nobody has published weights of {name}"


def _out_mistakes(out: Path) -> list[str]:
    """Return why the recipe cannot be written as `out`; nothing there is overwritten."""
    if out.suffix not in (".yaml", ".yml"):
        return [f"out={out} must end in .yaml: it will be a recipe"]
    taken = [path for path in (out, page_path(out)) if path.exists()]
    return [f"out={out}: {path} is there already; name a new file" for path in taken[:1]]


def page_path(out: Path) -> Path:
    """Return where the page on supervised tokens is written."""
    return out.with_suffix(".html")
