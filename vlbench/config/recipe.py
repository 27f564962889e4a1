"""From `recipe=... size=... key=value` to a resolved, checked `Recipe`, and to its YAML copy.

The layers are merged, a later one wins: keys of the model that `init` names, the recipe's file, the
size's file, the command line. All errors are raised together.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlbench.config.overrides import open_mappings, parse_overrides
from vlbench.config.resolve import mapping_in, merge_layers, resolve_layers
from vlbench.config.schema import Recipe, declared_keys
from vlbench.connector import kept_source, registry
from vlbench.connector.folder_modules import shipped_folder
from vlbench.errors import UserError, one_line, suggest_name
from vlbench.strict_values import StrictModel, format_value
from vlbench.text_files import read_json, read_text, write_atomically
from vlbench.version import __version__

MAX_YAML_BYTES = 1 << 18  # fifty times a recipe; PyYAML reads 40 kB in a second
RESUMABLE_KEYS = ("trainer", "log", "run", "dry_run", "profile", "trust_connector")
"""Keys that a run may change when it is resumed; so may `workers` of any data."""


def load_recipe(
    overrides: list[str], inherited_keys: Mapping[str, Any] = MappingProxyType({})
) -> Recipe:
    """Return the recipe that the words `recipe=... size=... key=value ...` describe.

    Without `recipe=`, `run=DIR` takes the recipe of that run. `inherited_keys`, those of the model
    that `init` names, are the lowest layer. Raises a UserError with a line for each error.
    """
    tree, errors = parse_overrides(overrides)
    tree = open_mappings(tree)
    base, name, size = _base_layers(tree, errors)
    if inherited_keys and not _saved_recipe_path(tree).is_file():  # a resumed run was checked
        errors += _conflicts_with_init(base, tree)
    size_name = f"size {tree.get('size', 'tiny')}"
    layers = [("init", dict(inherited_keys)), (name, base), (size_name, size), ("", tree)]
    return resolve_layers(layers, errors, list(mapping_in(base, "stages")))


def load_recipe_file(path: str | Path) -> Recipe:
    """Return the recipe that `save_recipe` wrote; an error names the version that wrote it.

    The code of a connector that is not shipped is neither needed nor run: `load_model_recipe`.
    """
    path = Path(path)
    try:
        is_kept = kept_source.has_kept_source(path.parent)
        return resolve_layers([(str(path), _read_saved(path))], [], has_all_options=is_kept)
    except UserError as error:
        made = _version_of_run(path.parent)
        if made in ("", __version__):
            raise
        raise UserError(
            *error.lines, f"{path}: was written by vlbench {made}, and this is {__version__}"
        ) from error


def load_model_recipe(folder: Path, trust_connector: bool) -> Recipe:
    """Return the recipe of a checkpoint whose model is to be built, its connector found.

    A connector that `./connectors` lacks, or has otherwise, is the one kept in the checkpoint.
    """
    recipe = load_recipe_file(folder / "recipe.yaml")
    name = kept_source.locate_source(recipe.connector, folder, trust_connector)
    return recipe.model_copy(update={"connector": {**recipe.connector, "name": name}})


def _version_of_run(folder: Path) -> str:
    """Return the version that wrote a run, from its folder or one of its checkpoints."""
    for file in (folder / "versions.json", folder.parent.parent / "versions.json"):
        if file.is_file():
            return str(read_json(file).get("vlbench", ""))
    return ""


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe as YAML."""
    write_atomically(Path(path), recipe_to_yaml(recipe))


def recipe_to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; every key is there."""
    return str(OmegaConf.to_yaml(OmegaConf.create(to_plain(recipe))))


def to_plain(section: StrictModel) -> dict[str, Any]:
    """Return a recipe, or a part of one, as nested dicts and lists with the keys of YAML."""
    tree = section.model_dump(mode="json", by_alias=True)
    if isinstance(section, Recipe):  # the file that a connector is loaded from is kept by the run
        tree["connector"]["name"] = registry.connector_label(tree["connector"]["name"])
    return tree


def flatten_keys(tree: StrictModel | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a recipe with one key for every value: `stages.chat.steps` -> 450."""
    result: dict[str, Any] = {}
    for key, value in (to_plain(tree) if isinstance(tree, StrictModel) else tree).items():
        is_leaf = not value or not isinstance(value, dict)
        result |= {prefix + key: value} if is_leaf else flatten_keys(value, f"{prefix}{key}.")
    return result


def recipe_differences(before: Recipe, now: Recipe) -> list[str]:
    """Return keys that differ, as "seed (0 before, 1 now)"; not those a resume may change."""
    old, new = flatten_keys(before), flatten_keys(now)
    return [
        f"{key} ({format_value(old.get(key))} before, {format_value(new.get(key))} now)"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and key.split(".")[0] not in RESUMABLE_KEYS
        and not key.endswith("data.workers")
    ]


def require_data(recipe: Recipe) -> None:
    """Raise a UserError when a stage that will run has no training data."""
    for name, stage in recipe.stages.items():
        data = stage.data or recipe.data
        runs = recipe.only is None or name in recipe.only
        if runs and data.train is None and data.mix is None:
            raise UserError(
                f"size={recipe.size} needs data.train=FILE.json (LLaVA's format) and "
                f"data.images=FOLDER: stage {name} has no training data"
            )


def stages_to_run(recipe: Recipe) -> list[str]:
    """Return the names of the stages that `from` and `only` select, in order."""
    names = list(recipe.stages)
    if recipe.from_:
        names = names[names.index(recipe.from_) :]
    return [name for name in names if not recipe.only or name in recipe.only]


def stage_label(name: str, image_size: int) -> str:
    """Return the name of a stage; with the pixels, where its name says others."""
    named_size = re.search(r"_(\d{2,})$", name)
    if named_size is None or int(named_size[1]) == image_size:
        return name
    return f"{name} (here {image_size} pixels)"


def with_random_weights(recipe: Recipe, *parts: str) -> Recipe:
    """Return the recipe with random weights of `parts`: vision encoder and language model."""
    changed = {
        part: getattr(recipe, part).model_copy(update={"weights": "random"})
        for part in parts or ("vision", "language")
    }
    return recipe.model_copy(update=changed)


def recipe_files(folder: str = ".") -> dict[str, Path]:
    """Return the recipes by name: those of `./recipes`, then the shipped ones."""
    files: dict[str, Path] = {}
    for root in (Path("recipes"), shipped_folder("recipes")):
        for path in sorted((root / folder).glob("*.yaml")):
            files.setdefault(path.stem, path)
    return files


def size_files() -> dict[str, Path]:
    """Return the sizes by name, as `recipe_files` does."""
    return recipe_files("size")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; a UserError names the file and, if known, the line."""
    text = io.StringIO(read_text(path, MAX_YAML_BYTES))
    try:
        tree = OmegaConf.to_container(OmegaConf.load(text), resolve=False)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError(f"{path}: its lists or mappings are nested too deeply") from error
    except (ValueError, OSError) as error:  # a number of 4,300 digits; a file that is one number
        raise UserError(f"{path}: {one_line(error, max_lines=1)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a mapping of keys; a recipe is KEY: VALUE lines")
    return _with_text_keys(tree)


def _with_text_keys(tree: dict[Any, Any]) -> dict[str, Any]:
    """Return a tree of YAML in which a key such as 1 or true is text."""
    return {
        str(key): _with_text_keys(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }


def _base_layers(
    tree: dict[str, Any], errors: list[str]
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return the recipe's layer, its name in messages, and the size's layer for its stages."""
    copy = _saved_recipe_path(tree)
    if "recipe" not in tree and "size" not in tree and "run" in tree and copy.is_file():
        saved = _read_saved(copy)
        _use_kept_connector(saved, saved, copy.parent, tree, errors)
        _check_saved_callbacks(saved, str(copy), tree, errors)
        return saved, str(copy), {}
    base, name = _read_layer(tree.get("recipe"), "recipe", recipe_files(), errors)
    if declared_keys(Recipe).keys() <= base.keys():  # it is the copy that a run keeps
        _check_saved_callbacks(base, str(tree.get("recipe")), tree, errors)
    size, _ = _read_layer(tree.get("size", base.get("size", "tiny")), "size", size_files(), errors)
    for_connectors, encoders = (size.pop(key, None) or {} for key in ("connectors", "encoders"))
    written = merge_layers(base, tree)
    connector, encoder = (mapping_in(written, part).get("name") for part in ("connector", "vision"))
    if written.get("init") and _names_kept_connector(written):
        init = Path(str(written["init"])).expanduser()
        holder = tree if "name" in mapping_in(tree, "connector") else base
        _use_kept_connector(holder, written, init, tree, errors)
    if connector in for_connectors:  # options of that connector at this size
        size["connector"] = {"name": connector, **for_connectors[connector]}
    if encoder in encoders:  # a kind of vision encoder, such as eva: its model at this size
        size["vision"] = encoders[encoder]
        if "name" in mapping_in(tree, "vision"):
            tree["vision"]["name"] = encoders[encoder]["name"]
    stages = mapping_in(size, "stages")  # how stages look at this size; the recipe says which
    known = {name: stages[name] for name in stages if name in mapping_in(base, "stages")}
    size = {**size, "stages": known} if known else {k: v for k, v in size.items() if k != "stages"}
    return base, name, size


def _read_saved(path: Path) -> dict[str, Any]:
    """Return the recipe of a run or checkpoint, whose connector is a name and never a file.

    A file named there could be anything that came with the folder, and would run unasked.
    """
    saved = read_yaml(path)
    name = mapping_in(saved, "connector").get("name")
    if name is not None:
        saved["connector"]["name"] = registry.connector_label(str(name))
    return saved


def _names_kept_connector(written: dict[str, Any]) -> bool:
    """Tell whether a recipe's connector, or one that its options name, is known to `init` alone."""
    kept = Path(str(written["init"]), kept_source.KEPT_FOLDER).expanduser()
    named = [text for text in mapping_in(written, "connector").values() if isinstance(text, str)]
    known = registry.find_connectors()
    return any(text not in known and (kept / f"{text}.py").is_file() for text in named)


def _use_kept_connector(
    layer: dict[str, Any],
    written: dict[str, Any],
    folder: Path,
    typed: dict[str, Any],
    errors: list[str],
) -> None:
    """Replace a connector's name in `layer` by the file kept in `folder`, where that is needed.

    Trust is typed: a recipe that came with the folder cannot give it to itself.
    """
    connector = mapping_in(written, "connector")
    name = connector.get("name")
    kept = folder / kept_source.KEPT_FOLDER / f"{name}.py"
    if not (name and kept.is_file()):
        return
    trust = typed.get("trust_connector") == "true"
    try:
        location = kept_source.locate_source(connector, folder, trust)
        layer["connector"] = {**layer["connector"], "name": location}
    except UserError as error:
        errors.append(str(error))


def _check_saved_callbacks(
    saved: dict[str, Any], source: str, typed: dict[str, Any], errors: list[str]
) -> None:
    """Refuse callbacks of another's run, unless they are typed or trusted: their modules run."""
    named = mapping_in(saved, "trainer").get("callbacks")
    is_typed = "callbacks" in mapping_in(typed, "trainer")
    if not named or is_typed or typed.get("trust_connector") == "true":
        return
    paths = [str(path) for path in (named if isinstance(named, list) else [named])]
    unknown = kept_source.unknown_callbacks(paths)
    if unknown:
        errors.append(
            f"{source} names callbacks that no run of yours had ({', '.join(unknown)}); their "
            f"modules run only with trainer.callbacks=[{','.join(paths)}] or trust_connector=true"
        )


def _saved_recipe_path(tree: dict[str, Any]) -> Path:
    """Return the path of the recipe in the run that the command line names."""
    return Path(str(tree.get("run")), "recipe.yaml").expanduser()


def _conflicts_with_init(*layers: dict[str, Any]) -> list[str]:
    """Return errors for keys that choose a part which comes with the model of `init`."""
    init = next((layer["init"] for layer in reversed(layers) if "init" in layer), None)
    return [
        f"{part}.{key} is '{mapping_in(layer, part)[key]}', but init={init} brings its own "
        f"{label}; leave {part}.{key} out"
        for layer in layers
        # the resolved copy of a run has every key, defaults included
        if not declared_keys(Recipe).keys() <= layer.keys()
        for part, label in (("vision", "vision encoder"), ("language", "language model"))
        for key in ("name", "weights")
        if key in mapping_in(layer, part)
    ]


def _read_layer(
    given: Any, key: str, known: dict[str, Path], errors: list[str]
) -> tuple[dict[str, Any], str]:
    """Return the layer of `recipe=` (name or path) or `size=`, and its name; {} after an error."""
    path = known.get(str(given)) or Path(str(given)).expanduser()
    is_path = str(given) in known or (key == "recipe" and path.suffix in (".yaml", ".yml"))
    if given is None:
        errors.append(f"{key}=NAME is needed; {key}s: {', '.join(known)}")
    elif not is_path:
        names = ", ".join(known)
        errors.append(f"no {key} '{given}'; known: {names}.{suggest_name(str(given), known)}")
    else:
        try:
            return read_yaml(path), path.name
        except UserError as error:
            errors.append(str(error))
    return {}, str(given)
