"""The recipe that a graft leaves behind, and the command that trains it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.connector import registry
from vlbench.errors import escape_to_one_line
from vlbench.text_files import format_yaml, write_atomically

OWN_SIZE = "own"
"""The size that names no parts: those of the recipe's file hold."""
RUN_KEYS = ("recipe", "size", "run", "only", "from", "dry_run", "trust_connector")
"""Keys of a command, which a recipe's file does not keep."""
PART_KEYS = ("vision", "language", "connector")


def fit_command(path: Path) -> str:
    """Return the command that trains the recipe in the file `path`."""
    return f"python -m vlbench fit recipe={shlex.quote(str(path))}"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write what of a recipe differs from the defaults, its parts in full.

    Above the keys stands a comment with the file's command and what it grafts.
    """
    plain = recipes.to_plain(recipe)
    changed = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    tree: dict[str, Any] = {"size": OWN_SIZE}
    tree |= {key: plain[key] for key in PART_KEYS}
    tree |= {key: value for key, value in changed.items() if key not in (*RUN_KEYS, *PART_KEYS)}
    connector = registry.connector_label(recipe.connector["name"])
    grafted = f"{recipe.vision.name} -> {connector} -> {recipe.language.weights}"
    lines = (f"# {fit_command(path)}", f"# {escape_to_one_line(grafted)}, written by graft.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join([*lines, format_yaml(tree)]))
