"""What the shipped sizes say of the parts that they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlbench.config.recipe_files import size_files
from vlbench.config.resolve import mapping_in
from vlbench.text_files import read_yaml


def size_parts(key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the sections of a part in all sizes; of `encoders` each kind with its section."""
    for path in size_files().values():
        section = mapping_in(read_yaml(path), key)
        if key == "encoders":
            yield from section.items()
        elif section:
            yield key, section


def size_weights(part: str, name: str) -> str | None:
    """Return the weights that a size gives to the part `name`, None where no size has it."""
    sections = [section for key in (part, "encoders") for _, section in size_parts(key)]
    return next((str(one["weights"]) for one in sections if one.get("name") == name), None)
