"""From `recipe=... size=... key=value` to a resolved, checked `Recipe`, and to its YAML copy.

The layers are merged, a later one wins: keys of the model that `init` names, the recipe's file, the
size's file, the command line. All errors are raised together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlbench.command_line.overrides import parse_overrides
from vlbench.config.key_types import RecipeSection
from vlbench.config.recipe_files import recipe_files, size_files
from vlbench.config.resolve import check_merged, collect_errors, mapping_in, merge_layers
from vlbench.config.schema import Recipe
from vlbench.config.stage_schema import StageData
from vlbench.connector import kept_source, registry
from vlbench.encoder_names import brings_weights
from vlbench.errors import UserError, suggest_name
from vlbench.key_errors import declared_keys
from vlbench.text_files import format_yaml, read_json, read_yaml, write_atomically
from vlbench.version import __version__


def load_recipe(
    overrides: list[str], inherited_keys: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Return the recipe that the words `recipe=... size=... key=value ...` describe.

    Without `recipe=`, `run=DIR` takes the recipe of that run. `inherited_keys`, those of the model
    that `init` names, are the lowest layer. Raises a UserError with a line for each error.
    """
    typed, errors = parse_overrides(overrides)
    run_copy = Path(str(typed.get("run")), "recipe.yaml").expanduser()
    is_resumed = run_copy.is_file()
    is_named_by_run = is_resumed and not typed.keys() & {"recipe", "size"}
    base: dict[str, Any] = {}
    size: dict[str, Any] = {}
    source = str(run_copy if is_named_by_run else typed.get("recipe"))
    with collect_errors(errors):
        if is_named_by_run:
            base = _read_saved(run_copy)
        else:
            bare_words = [word for word in overrides if "=" not in word]
            base, source = _read_layer("recipe", typed.get("recipe"), recipe_files(), bare_words)
    size_name = typed.get("size", base.get("size", "tiny"))
    if not is_named_by_run:
        with collect_errors(errors):
            size = _read_size(size_name, base, typed)
    size_source = f"size {size_name}"
    layers = [("init", dict(inherited_keys)), (source, base), (size_source, size), ("", typed)]
    merged = merge_layers(*(tree for _, tree in layers))
    is_trusted = typed.get("trust_connector") == "true"  # typed: no folder gives it to itself
    with collect_errors(errors):
        _use_kept_connector(merged, run_copy.parent if is_named_by_run else None, is_trusted)
    is_saved = is_named_by_run or declared_keys(Recipe).keys() <= base.keys()  # a run's copy
    if is_saved and not is_trusted:
        with collect_errors(errors):
            _check_saved_callbacks(base, typed, source)
    if inherited_keys and not is_resumed:  # a resumed run was checked
        given = [typed] if is_saved else [base, typed]
        errors += _conflicts_with_init(merged, given, inherited_keys)
    return check_merged(merged, layers, errors)


def load_recipe_file(path: str | Path) -> Recipe:
    """Return the recipe that `save_recipe` wrote; an error names the version that wrote it.

    The code of a connector that is not shipped is neither needed nor run.
    """
    path = Path(path)
    try:
        saved, is_kept = _read_saved(path), kept_source.has_kept_source(path.parent)
        layers = [(str(path), saved)]
        return check_merged(merge_layers(saved), layers, [], is_kept, is_saved=True)
    except UserError as error:
        made = _version_of_run(path.parent)
        if made in ("", __version__):
            raise
        raise UserError(
            *error.lines, f"{path}: was written by vlbench {made}, and this is {__version__}"
        ) from error


def _version_of_run(folder: Path) -> str:
    """Return the version that wrote a run, from its folder or one of its checkpoints."""
    files = [one / "versions.json" for one in (folder, folder.parent.parent)]
    return next((str(read_json(file).get("vlbench", "")) for file in files if file.is_file()), "")


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML."""
    write_atomically(Path(path), recipe_to_yaml(recipe))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; every key is there."""
    return format_yaml(to_plain(recipe))


def to_plain(section: RecipeSection) -> dict[str, Any]:
    """Return a recipe, or a part of one, as nested dicts and lists with the keys of YAML."""
    tree = section.model_dump(mode="json", by_alias=True)
    if isinstance(section, Recipe):  # the file that a connector is loaded from is kept by the run
        tree["connector"]["name"] = registry.connector_label(tree["connector"]["name"])
    return tree


def require_data(size: str, stages: Iterable[StageData]) -> None:
    """Raise a UserError when a stage that will run, at a `size`, has no training data."""
    for stage in stages:
        if not stage.config.is_given:
            raise UserError(
                f"size={size} needs data.train=FILE.json (LLaVA's format) and data.images=FOLDER: "
                f"stage {stage.stage_name} has no training data"
            )


def _read_layer(
    key: str, given: object, known: Mapping[str, Path], bare_words: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Return the layer of `recipe=` (name or path) or `size=`, and its name in messages.

    `bare_words` are those without a key; one of them may be the name that is missing.
    """
    name, names = str(given), ", ".join(known)
    if given is None:
        meant = (word for word in bare_words if word in known or word.endswith((".yaml", ".yml")))
        close = next((f". Did you mean '{key}={word}'?" for word in meant), "")
        raise UserError(f"{key}=NAME is needed; {key}s: {names}{close}")
    path = known.get(name) or Path(name).expanduser()
    if name not in known and (key == "size" or path.suffix not in (".yaml", ".yml")):
        raise UserError(f"no {key} '{name}'; known: {names}.{suggest_name(name, known)}")
    if not os.path.lexists(path):
        similar = suggest_name(path.stem, known)
        raise UserError(f"{key} '{name}': there is no such file; by name: {names}.{similar}")
    return read_yaml(path), path.name


def _read_size(given: object, base: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Return the layer of the size: how the recipe's stages, connector and encoder look at it."""
    size, _ = _read_layer("size", given, size_files())
    written, stages = merge_layers(base, typed), size.pop("stages", None) or {}
    for part, key in (("connector", "connectors"), ("vision", "encoders")):
        name, variants = _part_name(written, part), size.pop(key, None) or {}
        if name in variants:
            size[part] = {"name": name, **variants[name]}
            if _part_name(typed, part):  # a kind of encoder, such as eva: its model at this size
                typed[part]["name"] = size[part]["name"]
        elif part == "vision" and brings_weights(name):
            size.pop("vision", None)
    if known := mapping_in(base, "stages"):
        size["stages"] = {name: stage for name, stage in stages.items() if name in known}
    return size


def _part_name(tree: dict[str, Any], part: str) -> str:
    """Return the name that a layer gives to a part, "" for none."""
    return str(mapping_in(tree, part).get("name", ""))


def _read_saved(path: Path) -> dict[str, Any]:
    """Return the recipe of a run or checkpoint, whose connector is a name and never a file.

    A file named there could be anything that came with the folder, and would run unasked.
    """
    saved = read_yaml(path)
    if name := _part_name(saved, "connector"):
        saved["connector"]["name"] = registry.connector_label(name)
    return saved


def _use_kept_connector(merged: dict[str, Any], folder: Path | None, is_trusted: bool) -> None:
    """Let a recipe name the file of its connector that the `folder` of its run or `init` keeps."""
    connector = mapping_in(merged, "connector")
    if folder is None and merged.get("init"):
        init = Path(str(merged["init"])).expanduser()
        folder = init if kept_source.has_only_source(connector, init) else None
    if folder and kept_source.kept_file(folder, _part_name(merged, "connector")).is_file():
        connector["name"] = kept_source.locate_source(connector, folder, is_trusted)


def _check_saved_callbacks(base: dict[str, Any], typed: dict[str, Any], source: str) -> None:
    """Refuse callbacks of another's run, unless they are typed: their modules run."""
    named = mapping_in(base, "trainer").get("callbacks") or []
    if "callbacks" not in mapping_in(typed, "trainer"):
        kept_source.check_callbacks(named if isinstance(named, list) else [named], source)


def _conflicts_with_init(
    merged: dict[str, Any], layers: Iterable[dict[str, Any]], inherited_keys: Mapping[str, Any]
) -> list[str]:
    """Return errors for keys of `layers` that choose another part than comes with `init`."""
    inherited = dict(inherited_keys)
    return [
        f"{part}.{key} is '{mapping_in(layer, part)[key]}', but init={merged.get('init')} brings "
        f"its own {label}; leave {part}.{key} out"
        for layer in layers
        for part, label in (("vision", "vision encoder"), ("language", "language model"))
        for key in ("name", "weights", "second")
        if key in mapping_in(layer, part)
        and mapping_in(merged, part).get(key) != mapping_in(inherited, part).get(key)
    ]
