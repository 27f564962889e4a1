"""A mixture as a file: the sources of `data.mix=FILE.yaml`, in our form or LLaVA-OneVision's.

    cap: 50000 # of each source that has no cap of its own
    sources:
      - {train: captions.tar, weight: 0.5, prompts: [Describe the image.]}

    datasets:
      - {json_path: a.json, sampling_strategy: "first:1000"}

A recipe keeps the sources and not the name of the file: a run goes on as it began, whatever becomes
of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vlbench.config.key_types import Count, PathText, RecipeSection, key
from vlbench.config.mixture_source import Mixture, MixtureSource, SamplingText
from vlbench.config.recipe_files import data_files
from vlbench.connector.folder_modules import shipped_folder
from vlbench.errors import UserError, suggest_name
from vlbench.key_errors import check_file_keys
from vlbench.text_files import read_yaml

MIXTURE_LINE = re.compile(r"^(sources|datasets)\s*:", re.MULTILINE)
"""What a mixture has, and no mapping of annotation files."""


class MixtureFile(RecipeSection):
    """Our form."""

    sources: Mixture = key("the sources")
    cap: Count | None = key("cap of each source that has none of its own", None)

    def list_sources(self) -> Iterator[MixtureSource]:
        """Yield the sources, each with its cap."""
        for source in self.sources:
            yield source if source.cap else source.model_copy(update={"cap": self.cap})


class OneVisionSource(RecipeSection):
    """An entry of LLaVA-OneVision's list."""

    json_path: PathText = key("the file")
    sampling_strategy: SamplingText = key("all, first:N, end:N, random:N, N%", "all")


class OneVisionFile(RecipeSection):
    """LLaVA-OneVision's form, as its training code reads it."""

    datasets: Annotated[tuple[OneVisionSource, ...], Field(min_length=1)] = key("the sources")

    def list_sources(self) -> Iterator[MixtureSource]:
        """Yield the sources as ours."""
        for one in self.datasets:
            yield MixtureSource(train=one.json_path, sampling=one.sampling_strategy)


def read_mixture(name: str) -> list[dict[str, Any]]:
    """Return the sources of a mixture's file, as mappings of MixtureSource's keys.

    `name` is a path, or the name of a file in `./recipes/data` or of a shipped one. Raises a
    UserError with a line for each error.
    """
    file = find_mixture(name)
    tree = read_yaml(file)
    form: type[MixtureFile | OneVisionFile]
    form = OneVisionFile if "datasets" in tree else MixtureFile
    if not tree.keys() & {"datasets", *form.model_fields}:
        raise UserError(
            f"{file}: is no mixture, its keys are {', '.join(tree) or 'none'}; expected "
            "sources: [{train: FILE}], or LLaVA-OneVision's datasets: [{json_path: FILE}]"
        )
    sources = check_file_keys(form, tree, file, "a mixture").list_sources()
    return [source.model_dump(mode="json", exclude_defaults=True) for source in sources]


def mixture_files() -> dict[str, Path]:
    """Return the files of mixtures by name: those of `./recipes/data`, then the shipped ones."""
    return data_files(MIXTURE_LINE, takes_unreadable=False)


def find_mixture(name: str) -> Path:
    """Return the file of a mixture; a UserError suggests another name where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = mixture_files()
    shipped = shipped_folder("recipes").parent / name  # recipes/data/NAME.yaml, of another folder
    if name in known or shipped.is_file():
        return known.get(name, shipped)
    raise UserError(
        f"data.mix={name}: there is no such file; known mixtures: {', '.join(known)}, or a file "
        f"NAME.yaml.{suggest_name(path.stem, known)}"
    )
