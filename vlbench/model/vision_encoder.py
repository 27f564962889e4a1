"""The vision encoder: any plain ViT of open_clip or timm, up to the last block that is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlbench.compat.vision_internals import (
    encoder_blocks,
    encoder_grid,
    encoder_image_size,
    encoder_width,
    has_class_token,
    has_encoder_blocks,
    has_final_norm,
    keep_encoder_blocks,
    naflex_inputs,
    set_encoder_image_size,
    takes_any_grid,
)
from vlbench.connector.levels import Levels
from vlbench.data.image_processing import ImageTransform
from vlbench.errors import UserError, one_line
from vlbench.model.encoder_files import check_weights_choice, find_weight_file
from vlbench.model.named_encoder import (
    EncoderConfig,
    named_encoder_folder,
    resolve_encoder_config,
)
from vlbench.model.timm_config import TimmConfig
from vlbench.model.weights import open_clip_files, timm_files
from vlbench.model.weights.clip_folder import load_clip_folder
from vlbench.model.weights.tensor_groups import check_tensor_groups
from vlbench.state_dicts import check_names

RGBStats = tuple[float, float, float]
BUILD_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AssertionError),
    *(ArithmeticError, LookupError),  # a size of 0, a list that is too short
)
"""What open_clip and timm raise where numbers of an architecture do not go together."""


class VisionEncoder(nn.Module):
    """A vision encoder, computed up to the last of its blocks that is read.

    Blocks and norms after that one are kept for exports, but never computed and never trained.
    `visual` is open_clip's own module, so its state-dict keys are those of open_clip.
    """

    visual: Any

    def __init__(
        self,
        visual: nn.Module,
        layer: int,
        norm: bool,
        preprocess: dict[str, Any],
        config: EncoderConfig | None = None,
    ) -> None:
        """Wrap a module of open_clip.

        Args:
            visual: The module.
            layer: Block whose output is used, unless `read_blocks` names others; -2 is the last
                but one.
            norm: Whether the final norm is applied to the features.
            preprocess: Has `mean` and `std`, and may have `resize` and `crop` (pixels), `fit` (how
                an image becomes a square: "pad", "crop" or "squash") and `interpolation`.
            config: What `visual` was built from; None for a released model's encoder, which keeps
                its own small files.
        """
        super().__init__()
        self.visual, self.config = visual, config
        self.layer, self.norm, self.class_token = layer, norm, False
        self._read_preprocess(preprocess)
        blocks = self.blocks()
        if not -len(blocks) <= layer < len(blocks):
            raise UserError(
                f"vision.layer is {layer}; this vision encoder has {len(blocks)} blocks, "
                f"so {-len(blocks)} to {len(blocks) - 1} are allowed"
            )
        self.block_index = layer % len(blocks)
        self._read_blocks: tuple[int, ...] = ()
        if norm and not has_final_norm(visual):
            raise UserError(
                "vision.norm is true; this vision encoder has no norm after its last block: leave "
                "vision.norm out"
            )

    def _read_preprocess(self, preprocess: dict[str, Any]) -> None:
        self.mean: RGBStats = tuple(preprocess["mean"])
        self.std: RGBStats = tuple(preprocess["std"])
        # `pad` is what releases say
        self.fit: str = preprocess.get("fit") or ("pad" if preprocess.get("pad", True) else "crop")
        self.interpolation: str = preprocess.get("interpolation", "bicubic")
        # a release may resize to more than it crops; at other image sizes the ratio stays
        self.resize_ratio = preprocess.get("resize", 1) / preprocess.get("crop", 1)

    def set_preprocessing(self, config: EncoderConfig) -> None:
        """Do to images what `config`, which a checkpoint keeps of the same encoder, says."""
        self._read_preprocess(config.preprocess())
        self.config = config

    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks, first to last."""
        return encoder_blocks(self.visual)

    def read_blocks(self, layers: Sequence[int], class_token: bool) -> None:
        """Let `forward` return what a connector reads.

        Args:
            layers: Blocks, counted from 0 or from -1, the last one; features are then a tuple. None
                of them: features are one tensor, of the block `layer`.
            class_token: Whether the class token stands before the patches.

        Raises:
            UserError: for a block that this encoder does not have.
        """
        count = len(self.blocks())
        wrong = [
            layer
            for layer in layers  # of a class of one's own they may be anything
            if not hasattr(layer, "__index__") or not -count <= layer < count
        ]
        if wrong:
            raise UserError(
                f"the connector reads block {wrong[0]} of the vision encoder (vision_layers), and "
                f"this one has {count} blocks, so {-count} to {count - 1} are allowed"
            )
        self._read_blocks = tuple(layer % count for layer in layers)
        self.class_token = class_token

    def shorten(self, block_count: int) -> None:
        """Keep the first blocks alone, for counting on shapes: the last stand for those read."""
        if block_count >= self.used_block_count:
            return
        read = sorted(set(self.output_blocks))
        places = {block: block_count - len(read) + index for index, block in enumerate(read)}
        self._read_blocks = tuple(places[block] for block in self._read_blocks)
        self.block_index = places.get(self.block_index, block_count - 1)
        keep_encoder_blocks(self.visual, block_count)

    @property
    def used_block_count(self) -> int:
        """How many blocks are computed: those up to the last one that is read."""
        return 1 + max(self.output_blocks)

    @property
    def output_blocks(self) -> tuple[int, ...]:
        """The blocks, counted from 0, whose outputs are the features."""
        return self._read_blocks or (self.block_index,)

    @property
    def feature_source(self) -> int | list[int]:
        """What of the encoder features are, for caches: `layer`, or the blocks of a tuple."""
        return list(self._read_blocks) or self.layer

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder has a class token; registers are none."""
        return has_class_token(self.visual)

    @property
    def takes_any_grid(self) -> bool:
        """Whether it takes `patch_grids`: pictures of any shape."""
        return takes_any_grid(self.visual)

    @property
    def feature_width(self) -> int:
        """Width of one feature."""
        return encoder_width(self.visual)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return encoder_image_size(self.visual)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the current image size."""
        return encoder_grid(self.visual)

    @property
    def transform(self) -> ImageTransform:
        """The image transform for the current image size; large JPEGs are decoded in full."""
        crop = self.image_size
        size = round(crop * self.resize_ratio)
        return ImageTransform(
            size,
            crop,
            self.mean,
            self.std,
            pad=self.fit == "pad",
            squash=self.fit == "squash",
            interpolation=self.interpolation,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of the pixels."""
        return next(self.parameters()).dtype

    def forward(
        self, pixels: Tensor, patch_grids: Sequence[tuple[int, int]] | None = None
    ) -> Levels:
        """Turn pixels `[images, 3, height, width]` into features `[images, patches, width]`.

        With `class_token` the encoder's class token comes first: `[images, 1 + patches, width]`.
        With `patch_grids`, rows and columns of each image, pixels are sheets of patches
        (`vlbench.data.native_aspect`); features behind those of an image's own mean nothing.
        With `read_blocks` they are a tuple, an entry for each of the blocks.
        """
        blocks = sorted(set(self.output_blocks))
        inputs: Any = pixels
        if patch_grids is not None:
            inputs = naflex_inputs(self.visual, pixels, patch_grids)
        out = self.visual.forward_intermediates(
            inputs,
            indices=blocks,
            stop_early=True,
            normalize_intermediates=self.norm,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=self.class_token,
        )
        features: list[Tensor] = out["image_intermediates"]
        if self.class_token:  # the first of what comes before the patches; registers follow it
            pairs = zip(out["image_intermediates_prefix"], features, strict=True)
            features = [torch.cat([extra[:, :1], patches], dim=1) for extra, patches in pairs]
        if not self._read_blocks:
            return features[0]
        return tuple(features[blocks.index(block)] for block in self._read_blocks)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the pixels of an image."""
        return 3, self.image_size, self.image_size

    def encoders(self) -> list[VisionEncoder]:
        """Return the vision encoders that compute as one: this one alone, see `PairedEncoder`."""
        return [self]

    def set_image_size(self, image_size: int) -> None:
        """Change the input to `image_size` pixels; open_clip resizes the position embeddings."""
        if image_size == self.image_size:  # its own need not be whole patches: SigLIP's 384 by 14
            return
        patch = self.image_size // self.grid[0]
        if image_size % patch:
            raise UserError(
                f"image_size is {image_size}; this vision encoder needs a multiple of {patch}, "
                f"for example {max(1, round(image_size / patch)) * patch}"
            )
        set_encoder_image_size(self.visual, image_size)

    def used_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the features depend on; the others must not be trained."""
        unused = set()
        for block in self.blocks()[self.used_block_count :]:
            unused |= {id(p) for p in block.parameters()}
        unused |= {
            id(p) for name, p in self.visual.named_parameters() if self._is_after_blocks(name)
        }
        return [p for p in self.parameters() if id(p) not in unused]

    def _is_after_blocks(self, name: str) -> bool:
        """Tell whether a parameter belongs to what follows the last block."""
        parts = name.removeprefix("trunk.").split(".")
        norms = {"ln_post", "norm"}
        heads = {"proj", "head", "attn_pool", "attn_pool_contrastive", "fc_norm"}
        return parts[0] in heads or (parts[0] in norms and not self.norm)


def has_trained_parameters(module: nn.Module) -> bool:
    """Tell whether any weight of an encoder, or of another module, is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def build_vision_encoder(
    name: str, weights: str, layer: int = -2, norm: bool = False, load_weights: bool = True
) -> VisionEncoder:
    """Build the vision encoder `name` and load `weights`.

    Args:
        name: A model of open_clip, one of EMBEDDED_ENCODERS, or a folder or OWNER/NAME on a hub
            with open_clip's or timm's small file.
        weights: "embedded" (the miniature's or the folder's own), "random", a pretrained tag of
            open_clip, a file of an open_clip model, or a folder: of open_clip, or a CLIP in
            Hugging Face's layout. For OWNER/NAME: the same, or "random".
        layer: Block whose output is used, -2 for the last but one.
        norm: Whether the final norm follows.
        load_weights: False where shapes are enough: nothing is downloaded, weights are random.

    Raises:
        UserError: when a name is unknown, or a file is not exactly the encoder's weights.
    """
    folder = named_encoder_folder(name)
    encoder = _build_unloaded(name, weights, folder, layer, norm)
    if load_weights and weights != "random":
        _load_weights(encoder, name, weights, folder)
    return encoder


def _build_unloaded(
    name: str, weights: str, folder: Path | None, layer: int = -2, norm: bool = False
) -> VisionEncoder:
    config = resolve_encoder_config(name, weights, folder)
    check_weights_choice(name, weights, folder)
    return build_encoder_from_config(config, name, layer, norm)


def build_encoder_from_config(
    config: EncoderConfig, name: str, layer: int, norm: bool
) -> VisionEncoder:
    """Build the encoder that `config` describes, with random weights; errors call it `name`."""
    try:
        visual = config.build_module()
    except BUILD_ERRORS as error:
        reason = one_line(error)
        raise UserError(f"vision.name is '{name}', which cannot be built ({reason})") from error
    if not has_encoder_blocks(visual):
        raise UserError(
            f"vision.name is '{name}', which is no plain ViT (equal blocks over one grid of "
            "patches); those that work are open_clip's ViT-* and EVA* models and timm's ViTs, for "
            "example ViT-H-14, EVA02-L-14-336 or timm/vit_base_patch14_reg4_dinov2.lvd142m"
        )
    if min(encoder_grid(visual)) < 1:  # negative where its file has a negative image_size
        raise UserError(
            f"vision.name is '{name}', which cannot be built (its images of "
            f"{encoder_image_size(visual)} pixels are smaller than a patch)"
        )
    return VisionEncoder(visual, layer, norm, config.preprocess(), config)


def check_vision_weights(name: str, weights: str) -> None:
    """Compare tensor names and shapes of the files that `weights` means with the encoder `name`.

    Files of a hub are downloaded; no tensor is read.
    """
    folder = named_encoder_folder(name)
    with torch.device("meta"):
        encoder = _build_unloaded(name, weights, folder)
        if weights != "random":
            _load_weights(encoder, name, weights, folder, load_values=False)


def _load_weights(
    encoder: VisionEncoder,
    name: str,
    weights: str,
    folder: Path | None,
    load_values: bool = True,
) -> None:
    """Load every tensor of what `weights` means; without `load_values` compare shapes only."""
    file = find_weight_file(name, weights, folder)
    if file is None:
        loaded = load_clip_folder(encoder, name, Path(weights), load_values)
    elif isinstance(encoder.config, TimmConfig):
        loaded = timm_files.load_timm_weights(file, encoder, load_values)
    else:
        image_size = open_clip_files.infer_image_size(file, encoder.visual)
        if image_size is not None:
            encoder.set_image_size(image_size)
        if load_values:
            loaded = open_clip_files.load_open_clip_weights(file, encoder.visual)
        else:
            state = encoder.visual.state_dict()
            check_tensor_groups(
                [open_clip_files.build_open_clip_group(file, state)], {"vision": state}
            )
    if load_values:
        check_names(encoder.visual.state_dict(), loaded, f"vision.weights={weights}")
