"""The keys of a recipe's data: one source or a mixture of them, and files that list a mixture.

`data.mix=FILE.yaml` names such a file, in our form or in LLaVA-OneVision's. A recipe keeps the
sources and not the name of the file: a run goes on as it began, whatever becomes of the file.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field

from vlbench.config.key_types import MAX_COUNT, Count, PathText, RecipeSection, key
from vlbench.config.recipe_files import data_files
from vlbench.connector.folder_modules import shipped_folder
from vlbench.errors import UserError, suggest_name
from vlbench.key_errors import check_file_keys
from vlbench.text_files import read_yaml

SAMPLING_PATTERN = re.compile(r"(?:(first|end|random):)?(\d{1,12}(?:\.\d{1,12})?%|\d{1,12})")
IMAGE_TAGS = ("<image>", "<image_placeholder>")
MIXTURE_LINE = re.compile(r"^(sources|datasets)\s*:", re.MULTILINE)
"""What a mixture has, and no mapping of annotation files."""


class SourceSampling(NamedTuple):
    """The part of a source that is used, in LLaVA-OneVision's words."""

    order: str
    """`first`, `end` or `random`."""
    amount: int | Fraction
    """How many samples, or which share of them."""

    def count_of(self, sample_count: int) -> int:
        """Return how many of a source's samples are used; shares are rounded up."""
        if isinstance(self.amount, int):
            return min(self.amount, sample_count)
        return math.ceil(sample_count * self.amount)


def parse_sampling(text: str) -> SourceSampling | None:
    """Return what `all`, `first:N`, `end:N%`, `random:N` or `N%` says; None for all samples."""
    if text == "all":
        return None
    match = SAMPLING_PATTERN.fullmatch(text)
    order, amount = match.groups() if match else (None, "")
    if amount.endswith("%") and 0 < (share := Fraction(amount[:-1]) / 100) <= 1:
        return SourceSampling(order or "random", share)
    if order and amount.isdigit() and 0 < int(amount) <= MAX_COUNT:
        return SourceSampling(order, int(amount))
    raise ValueError(
        "must be all, first:N, end:N or random:N, where N is a number above 0 or a percentage as "
        f"10%, or N% for random:N%, given '{text}'"
    )


def check_sampling(text: str) -> str:
    """Return a text that `parse_sampling` takes."""
    parse_sampling(text)
    return text


def check_prompt(prompt: str) -> str:
    """Return a prompt that says something, without a tag of an image."""
    for tag in IMAGE_TAGS:
        if tag in prompt:
            raise ValueError(f"has {tag} in it; the image comes before a prompt by itself")
    if not prompt.strip():
        raise ValueError("is empty; leave it out")
    return prompt


SamplingText = Annotated[str, AfterValidator(check_sampling)]
PromptText = Annotated[str, AfterValidator(check_prompt)]
Prompts = Annotated[tuple[PromptText, ...], Field(min_length=1)]


class MixtureSource(RecipeSection):
    """One source of a mixture."""

    train: PathText = key("scenes, large_scenes, or data as data.train takes them")
    images: PathText | None = key("folder of its images; null: data.images", None)
    weight: float = key("how often an epoch takes each sample", 1.0, gt=0)
    sampling: SamplingText = key("all, or the samples used: first:N, end:N, random:N, N%", "all")
    cap: Count | None = key("most of its samples in an epoch, always the same; null: all", None)
    prompts: Prompts | None = key("drawn from instead of the question of a sample", None)
    needs: str | None = key("what it needs on disk, which is said where it is missing", None)


Mixture = Annotated[tuple[MixtureSource, ...], Field(min_length=1)]


class DataConfig(RecipeSection):
    """Training and held-out data."""

    train: PathText | None = key(
        "scenes, large_scenes; JSON, JSONL, CSV, Parquet; NAME:FOLDER; a hub id; shards", None
    )
    images: PathText | None = key("folder of images; null: beside the file", None)
    allow_outside: bool = key("read images that lie outside of the folder `images`", False)
    mix: Mixture | None = key("sources, or a YAML file that lists them; instead of train", None)
    val: PathText | None = key("held-out samples, as data.train takes them", None)
    on_bad_sample: Literal["auto", "quarantine", "stop"] = key(
        "leave out and count, or stop; auto: stop above 1 %", "auto"
    )
    workers: int = key("processes that load images, beside one for texts; 0: none", 4, ge=0, le=256)
    decode: Literal["exact", "draft"] = key(
        "large JPEGs: decoded as the reference does, or faster and less exactly", "exact"
    )
    exif: Literal["ignore", "apply"] = key(
        "EXIF orientation of photographs: ignored, as the reference does, or applied", "ignore"
    )
    samples: Count = key("scenes: images in an epoch", 10000)
    questions: Count = key("scenes: questions per image, in one conversation", 3)
    scene_side: int = key("large_scenes: side of the pictures in pixels", 224, ge=112, le=1120)

    @property
    def is_given(self) -> bool:
        """Whether there is something to train on."""
        return self.train is not None or self.mix is not None


class MixtureFile(RecipeSection):
    """Our form: `sources: [{train: a.tar, weight: 0.5}, {train: b.json, cap: 50000}]`."""

    sources: Mixture = key("the sources")
    cap: Count | None = key("cap of each source that has none of its own", None)


class OneVisionSource(RecipeSection):
    """An entry of LLaVA-OneVision's list."""

    train: PathText = key("the file", alias="json_path")
    sampling: SamplingText = key(
        "all, first:N, end:N, random:N, N%", "all", alias="sampling_strategy"
    )


class OneVisionFile(RecipeSection):
    """LLaVA-OneVision's form, as its training code reads it: `datasets: [{json_path: a.json}]`."""

    datasets: Annotated[tuple[OneVisionSource, ...], Field(min_length=1)] = key("the sources")


def read_mixture(name: str, recipe_key: str = "data.mix") -> list[MixtureSource]:
    """Return the sources in a mixture's file.

    `name`, the value of `recipe_key`, is a path, or the name of a file in `./recipes/data` or of a
    shipped one. Raises a UserError with a line for each error.
    """
    file = find_mixture(name, recipe_key)
    tree = read_yaml(file)
    if "datasets" in tree:
        theirs = check_file_keys(OneVisionFile, tree, file, "a mixture").datasets
        return [MixtureSource(**dict(one)) for one in theirs]
    if not tree.keys() & MixtureFile.model_fields.keys():
        raise UserError(
            f"{file}: is no mixture, its keys are {', '.join(tree) or 'none'}; expected "
            "sources: [{train: FILE}], or LLaVA-OneVision's datasets: [{json_path: FILE}]"
        )
    ours = check_file_keys(MixtureFile, tree, file, "a mixture")
    return [one if one.cap else one.model_copy(update={"cap": ours.cap}) for one in ours.sources]


def mixture_files() -> dict[str, Path]:
    """Return the files of mixtures by name: those of `./recipes/data`, then the shipped ones."""
    return data_files(MIXTURE_LINE, takes_unreadable=False)


def find_mixture(name: str, recipe_key: str) -> Path:
    """Return the file of a mixture; a UserError suggests another name where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = mixture_files()
    shipped = shipped_folder("recipes").parent / name  # recipes/data/NAME.yaml, of another folder
    if name in known or shipped.is_file():
        return known.get(name, shipped)
    raise UserError(
        f"{recipe_key}={name}: there is no such file; known mixtures: {', '.join(known)}, or a "
        f"file NAME.yaml.{suggest_name(path.stem, known)}"
    )
