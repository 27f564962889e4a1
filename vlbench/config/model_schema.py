"""The keys of a recipe that say what a model is built from: `vision`, `language`, `connector`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from vlbench.command_line.arguments import TemplateName
from vlbench.config.key_types import MAX_COUNT, Count, ImageSize, PathText, RecipeSection, key
from vlbench.encoder_names import EMBEDDED_ENCODERS, brings_weights, check_encoder_name

ImageAspect = Literal["square", "native"]
TilingRule = Literal["llava_next", "internvl"]
ViewTags = Literal["none", "newline", "numbered"]
MAX_TILES = 64  # of an image; 6 to 12 are usual


def check_grid(text: str) -> str:
    """Return rows and columns of tiles, written as 2x3."""
    if not re.fullmatch("[1-9][0-9]?x[1-9][0-9]?", text):
        raise ValueError(f"must be ROWSxCOLUMNS, as in 2x3, given '{text}'")
    return text


def check_name(name: str, info: ValidationInfo) -> str:
    """Return a vision encoder's name; that of a saved recipe may be a folder which is gone."""
    is_saved = isinstance(info.context, dict) and info.context.get("is_saved")
    return name if is_saved else check_encoder_name(name)


EncoderName = Annotated[PathText, AfterValidator(check_name)]
GridText = Annotated[str, AfterValidator(check_grid)]
Grids = Annotated[tuple[GridText, ...], Field(min_length=1)]


class PretrainedPartConfig(RecipeSection):
    """A part with weights, embedded in this package or from elsewhere."""

    part: ClassVar[str]
    embedded_names: ClassVar[Collection[str]]
    """The names that have embedded weights."""
    name: str
    weights: str

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong where embedded weights are asked of a part that has none."""
        if self.weights == "embedded" and self.name not in self.embedded_names:
            known = " and ".join(f"{self.part}.name={name}" for name in self.embedded_names)
            yield (
                f"has weights 'embedded', and none of {self.part}.name={self.name} are in this "
                f"package, as those of {known} are; say which it takes, or "
                f"{self.part}.weights=random"
            )


class NamedEncoderConfig(PretrainedPartConfig):
    """A vision encoder; a folder, and OWNER/NAME on a hub, have their own weights."""

    embedded_names = EMBEDDED_ENCODERS

    @model_validator(mode="before")
    @classmethod
    def _take_own_weights(cls, given: Any) -> Any:
        """Let `embedded` mean the weights of a folder, or of OWNER/NAME on a hub, by its name."""
        if isinstance(given, dict) and brings_weights(str(given.get("name", ""))):
            own = given.get("weights", "embedded") == "embedded"
            return {**given, "weights": given["name"]} if own else given
        return given


class SecondEncoderConfig(NamedEncoderConfig):
    """A second vision encoder, which sees the same image; features are joined by channel."""

    part = "vision.second"

    name: EncoderName = key("as vision.name; features of both are joined by channel")
    weights: PathText = key("as vision.weights", "embedded")
    layer: int = key("as vision.layer", -2, ge=-100, le=99)
    norm: bool = key("as vision.norm", False)
    image_size: ImageSize | None = key("side in pixels; null: as many patches as the first", None)


class TilingConfig(RecipeSection):
    """How an image becomes several views of the encoder's size; the defaults are LLaVA-NeXT's."""

    tiles: int = key("most tiles of an image, beside its thumbnail", 4, ge=1, le=MAX_TILES)
    grid: TilingRule = key(
        "llava_next: most pixels, padded; internvl: closest shape, squashed", "llava_next"
    )
    thumbnail: bool = key("tiled images have a view of the whole as well", True)
    tags: ViewTags = key("newline: learned, behind rows; numbered: texts before views", "newline")
    max_views: Count | None = key("a sample with more views is bad; null: any number", None)
    grids: Grids | None = key("the only grids, ROWSxCOLUMNS; null: all of up to `tiles`", None)

    @property
    def grid_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each of `grids`; () for null."""
        texts = self.grids or ()
        return tuple((int(rows), int(columns)) for rows, columns in (t.split("x") for t in texts))

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong with the grids."""
        least = 2 if self.grid == "llava_next" else 1
        if self.grids and least > self.tiles:
            yield (
                f"has grids={','.join(self.grids)} and tiles={self.tiles}: with grid={self.grid} a "
                f"grid has at least {least} tiles; leave grids out for images of one view"
            )
        for rows, columns in self.grid_sizes:
            if not least <= rows * columns <= self.tiles:
                yield (
                    f"has {rows}x{columns} among its grids; with grid={self.grid} and "
                    f"tiles={self.tiles} a grid has {least} to {self.tiles} tiles"
                )
        if len(set(self.grid_sizes)) < len(self.grid_sizes):
            yield f"has a grid twice: {', '.join(self.grids or ())}"


class VisionEncoderConfig(NamedEncoderConfig):
    """The vision encoder."""

    part = "vision"

    name: EncoderName = key(
        "ViT of open_clip, OWNER/NAME of timm's, tiny (see list), folder", "tiny"
    )
    weights: PathText = key(
        "embedded (of tiny, tiny_eva, a folder, OWNER/NAME), random, a tag, file or folder",
        "embedded",
    )
    layer: int = key("block whose output the connector gets; -1 is the last", -2, ge=-100, le=99)
    norm: bool = key("apply the encoder's final LayerNorm to its features", False)
    second: SecondEncoderConfig | None = key("a second vision encoder; null: none", None)
    aspect: ImageAspect = key("native: images keep their shape (timm's NaFlexViT)", "square")
    tiling: TilingConfig | None = key("several views of an image; null: one square", None)
    max_visual_tokens: Count | None = key(
        "image positions of a sample, to which tiles are reduced; null: any number", None
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong with its weights, and with tiles."""
        yield from super().find_conflicts()
        kinds = {"aspect=native": self.aspect == "native", "tiling": self.tiling}
        given = [kind for kind, value in {**kinds, "second": self.second}.items() if value]
        if len(given) > 1:
            yield (
                f"has {' and '.join(given)}: an image has a shape of its own, or square tiles, or "
                "two encoders; leave one of them out"
            )
        if self.max_visual_tokens is not None and self.tiling is None:
            yield (
                f"has max_visual_tokens={self.max_visual_tokens} and no tiles to reduce: give "
                "vision.tiling.tiles"
            )

    @property
    def has_views(self) -> bool:
        """Whether what an image takes of the text depends on its width and height."""
        return self.tiling is not None or self.aspect == "native"


class LanguageModelConfig(PretrainedPartConfig):
    """The language model."""

    part, embedded_names = "language", ("tiny",)

    name: Literal["tiny", "yi-6b", "yi-34b"] = key("architecture, if not of `weights`", "tiny")
    weights: PathText = key("embedded (tiny only), random, a folder or hub id", "embedded")
    template: TemplateName = key("chat template; auto: the tokenizer's own", "yi_vl")
    max_length: int = key("most tokens of a sample, images too", 4096, ge=16, le=MAX_COUNT)


@dataclass(frozen=True)
class ModelConfig:
    """What a recipe says of its model."""

    vision: VisionEncoderConfig
    language: LanguageModelConfig
    connector: dict[str, Any]
    """Its name, or a file, and its options."""
    init: str | None
    """What it begins with: a run, a checkpoint, a released model, a file of weights."""
    seed: int
    """Of weights that are random at first."""
    draft_decoding: bool
    """Whether large JPEGs are decoded faster and less exactly."""
    apply_exif: bool
    """Whether photographs are turned as their EXIF orientation says."""

    @property
    def connector_name(self) -> str:
        """The connector's name, or a file."""
        return str(self.connector["name"])

    @property
    def connector_options(self) -> dict[str, Any]:
        """The connector's options."""
        return {key: value for key, value in self.connector.items() if key != "name"}
