"""Two vision encoders that look at the same image and compute as one.

As in Prismatic VLMs (Karamcheti et al. 2024, arXiv:2402.07865: DINOv2 with SigLIP) and Cambrian-1
(Tong et al. 2024, arXiv:2406.16860), their features are concatenated by channel on the grid of the
first.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlbench.config.model_schema import SecondEncoderConfig, VisionEncoderConfig
from vlbench.connector.levels import Levels
from vlbench.data.image_processing import ImageTransform
from vlbench.errors import UserError
from vlbench.model.vision_encoder import (
    VisionEncoder,
    check_vision_weights,
    has_trained_parameters,
)

FIRST_KEY = re.compile(r"\bvision\.(?=(?:layer|name|norm|weights)\b)")
"""The beginning of a key of the first encoder in a message."""
EncoderBuilder = Callable[[str, VisionEncoderConfig | SecondEncoderConfig], VisionEncoder]
"""Takes the name of a part and what a recipe says of it, and returns its encoder."""


def build_encoders(vision: VisionEncoderConfig, build_one: EncoderBuilder) -> VisionEncoder:
    """Return the vision encoder of a recipe, or the pair of both; `build_one` builds one."""
    first = build_one("vision", vision)
    if vision.second is None:
        return first
    with named_as_second():
        second = build_one("second_vision", vision.second)
    return PairedEncoder(first, second, vision.second.image_size)


def check_encoder_weights(vision: VisionEncoderConfig) -> None:
    """Compare tensors of the files of one encoder or of both, see `check_vision_weights`."""
    check_vision_weights(vision.name, vision.weights)
    if vision.second is not None:
        with named_as_second():
            check_vision_weights(vision.second.name, vision.second.weights)


@contextlib.contextmanager
def named_as_second() -> Iterator[None]:
    """Let errors of an encoder name the keys of `vision.second`."""
    try:
        yield
    except UserError as error:
        renamed = ((line, FIRST_KEY.sub("vision.second.", line)) for line in error.lines)
        lines = (new if new != line else f"vision.second: {line}" for line, new in renamed)
        raise UserError(*lines) from error


class PairedEncoder(VisionEncoder):
    """The first of two vision encoders, which computes with the second as one.

    The second is a part of its own: `VLM.second_vision` trains, saves and loads it. It is therefore
    no submodule of the first, whose state and parameters stay those of one encoder.
    """

    second: VisionEncoder

    def __init__(
        self, first: VisionEncoder, second: VisionEncoder, second_size: int | None = None
    ) -> None:
        """Join two encoders.

        Args:
            first: Its image size and grid are those of the pair.
            second: Its features are brought to that grid.
            second_size: Side in pixels of what the second sees at every image size of the first;
                None: what gives it as many patches as the first.

        The second gets its size with the next `set_image_size`, so that it is not resized twice.
        """
        torch.nn.Module.__init__(self)
        self.__dict__.update(first.__dict__)  # its modules too: nothing is copied
        self.__dict__["second"], self.second_size = second, second_size  # no submodule

    def _match_second(self) -> None:
        """Give the second encoder its image size."""
        side = self.second_size
        try:
            if side is None:
                side = self.grid[0] * (self.second.image_size // self.second.grid[0])
            self.second.set_image_size(side)
        except UserError as error:
            raise UserError(f"vision.second: {error}") from error

    @property
    def has_class_token(self) -> bool:
        """Whether both encoders have a class token."""
        return super().has_class_token and self.second.has_class_token

    @property
    def feature_width(self) -> int:
        """Width of one feature of the pair."""
        return super().feature_width + self.second.feature_width

    @property
    def transform(self) -> ImageTransform:
        """Both image transforms: the square is the first's, so that the grids lie on each other."""
        own, size = super().transform, self.second.image_size
        second = replace(
            own,
            size=round(size * self.resize_ratio),
            crop=size,
            mean=self.second.mean,
            std=self.second.std,
            interpolation=self.second.interpolation,
        )
        return replace(own, second=second)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the pixels of an image: three channels for each encoder."""
        side = max(self.image_size, self.second.image_size)
        return 6, side, side

    def encoders(self) -> list[VisionEncoder]:
        """Return this encoder and the second."""
        return [self, self.second]

    def set_image_size(self, image_size: int) -> None:
        """Change the image size in pixels of the first; the second follows."""
        super().set_image_size(image_size)
        self._match_second()

    def read_blocks(self, layers: Sequence[int], class_token: bool) -> None:
        """Let `forward` return what a connector reads, of the second as far from its last block.

        Where it reads the block `layer` of the first, it is the block `layer` of the second.
        """
        super().read_blocks(layers, class_token)
        count = len(self.blocks())
        places = [
            self.second.block_index if layer % count == self.block_index else layer % count - count
            for layer in layers
        ]
        with named_as_second():
            self.second.read_blocks(places, class_token)

    def forward(
        self, pixels: Tensor, patch_grids: Sequence[tuple[int, int]] | None = None
    ) -> Levels:
        """Turn pixels `[images, 6, side, side]` into features `[images, patches, both widths]`.

        Only the encoders that are trained keep what a backward pass needs. There are no
        `patch_grids`: a recipe has two encoders for squares alone.
        """
        assert patch_grids is None
        sides = (self.image_size, self.second.image_size)
        halves = [pixels[:, 3 * i : 3 * i + 3, :side, :side] for i, side in enumerate(sides)]
        wanted = torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted and has_trained_parameters(self)):
            own = super().forward(halves[0].contiguous())
        with torch.set_grad_enabled(wanted and has_trained_parameters(self.second)):
            other = self.second(halves[1].to(self.second.dtype).contiguous())
        if isinstance(own, Tensor):
            return self._join_features(own, other)
        return tuple(self._join_features(*pair) for pair in zip(own, other, strict=True))

    def _join_features(self, own: Tensor, other: Tensor) -> Tensor:
        """Concatenate by channel, the second's patches on the grid of the first."""
        first = int(self.class_token)
        if self.second.grid != self.grid:
            token, patches = other[:, :first], other[:, first:]
            maps = patches.transpose(1, 2).unflatten(2, self.second.grid)
            maps = interpolate(maps.float(), self.grid, mode="bilinear").to(other.dtype)
            other = torch.cat([token, maps.flatten(2).transpose(1, 2)], dim=1)
        return torch.cat([own, other.to(own.dtype)], dim=-1)
