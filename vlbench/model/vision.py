"""The vision tower: any ViT of open_clip by name, giving the features that a recipe asks for."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor, nn

from vlbench.data.images import ImageTransform
from vlbench.files import read_json
from vlbench.mistakes import Mistake, nearest
from vlbench.model.weights import clip, hub
from vlbench.model.weights.hub import fetch

Colour = tuple[float, float, float]
TINY = Path(__file__).parent / "tiny"
EMBEDDED = {"tiny": TINY / "tower", "tiny_eva": TINY / "eva_tower"}


class Tower(nn.Module):
    """A vision tower cut after one of its blocks.

    `preprocess` has mean and std, and may have resize and crop (pixels) and pad (to a square).

    Blocks and norms behind the chosen one are kept for exports, but never computed and never
    trained. `visual` is open_clip's own module, so its state-dict keys stay those of open_clip.
    """

    visual: Any

    def __init__(self, visual: nn.Module, layer: int, norm: bool, preprocess: dict) -> None:
        """Take features after block `layer` (-2: last but one), with the final norm if `norm`."""
        super().__init__()
        self.visual = visual
        self.layer, self.norm, self.class_token = layer, norm, False
        self.mean: Colour = tuple(preprocess["mean"])
        self.std: Colour = tuple(preprocess["std"])
        self.pad = bool(preprocess.get("pad", True))
        self.draft = False  # `data.decode`: whether large JPEGs are decoded smaller
        # a release may resize to more than it crops; at other image sizes the share stays
        self.margin = preprocess.get("resize", 1) / preprocess.get("crop", 1)
        blocks = self.blocks()
        if not -len(blocks) <= layer < len(blocks):
            raise Mistake(
                f"vision.layer is {layer}; this tower has {len(blocks)} blocks, "
                f"so {-len(blocks)} to {len(blocks) - 1} are allowed"
            )
        self.index = layer % len(blocks)

    def blocks(self) -> nn.ModuleList:
        """Return the transformer blocks, first to last."""
        if hasattr(self.visual, "trunk"):
            return self.visual.trunk.blocks
        return self.visual.transformer.resblocks

    @property
    def width(self) -> int:
        """Width of one feature."""
        if hasattr(self.visual, "trunk"):
            return self.visual.trunk.embed_dim
        return self.visual.positional_embedding.shape[-1]

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.visual.image_size[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the current image size."""
        if hasattr(self.visual, "trunk"):
            return tuple(self.visual.trunk.patch_embed.grid_size)
        return tuple(self.visual.grid_size)

    @property
    def transform(self) -> ImageTransform:
        """The image transform that this tower needs at its current image size."""
        crop = self.image_size
        size = round(crop * self.margin)
        return ImageTransform(size, crop, self.mean, self.std, self.pad, self.draft)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and so of the pixels that are read."""
        return next(self.parameters()).dtype

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels `[images, 3, height, width]` into features `[images, patches, width]`.

        With `class_token` the tower's class token comes first: `[images, 1 + patches, width]`.
        """
        out = self.visual.forward_intermediates(
            pixels,
            indices=[self.index],
            stop_early=True,
            normalize_intermediates=self.norm,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=self.class_token,
        )
        features = out["image_intermediates"][0]
        if self.class_token:
            first = out.get("image_intermediates_prefix")
            if first is None or not first[0].shape[1]:
                raise Mistake(
                    "this connector reads the tower's class token, and this tower has none: name "
                    "another tower or another connector"
                )
            features = torch.cat([first[0][:, :1], features], dim=1)
        return features

    def resize(self, image_size: int) -> None:
        """Change the input to `image_size` pixels; position embeddings are resized by open_clip."""
        patch = self.image_size // self.grid[0]
        if image_size % patch:
            raise Mistake(
                f"image_size is {image_size}; this tower needs a multiple of {patch}, "
                f"for example {max(1, round(image_size / patch)) * patch}"
            )
        if image_size == self.image_size:
            return
        visual = self.visual
        if hasattr(visual, "trunk"):
            visual.set_input_size(image_size)
            return
        visual.image_size = (image_size, image_size)
        visual.grid_size = (image_size // patch, image_size // patch)
        key = "visual.positional_embedding"
        state = {key: visual.positional_embedding.data}
        resize_pos_embed(state, SimpleNamespace(visual=visual))
        visual.positional_embedding = nn.Parameter(state[key].contiguous())

    def used(self) -> list[nn.Parameter]:
        """Return the parameters that the features depend on: the others must not be trained."""
        unused = set()
        for block in self.blocks()[self.index + 1 :]:
            unused |= {id(p) for p in block.parameters()}
        unused |= {id(p) for name, p in self.visual.named_parameters() if self._behind(name)}
        return [p for p in self.parameters() if id(p) not in unused]

    def _behind(self, name: str) -> bool:
        """Tell whether the parameter belongs to what follows the last block."""
        parts = name.removeprefix("trunk.").split(".")
        norms = {"ln_post", "norm", "fc_norm"}
        heads = {"proj", "head", "attn_pool", "attn_pool_contrastive"}
        return parts[0] in heads or (parts[0] in norms and not self.norm)


def build_tower(name: str, weights: str, layer: int = -2, norm: bool = False) -> Tower:
    """Build the tower `name` and load `weights`.

    `name` is a model of open_clip, one of EMBEDDED or a folder with `open_clip_config.json`;
    `weights` is "embedded", "random", a pretrained tag of open_clip, one of its files, or a folder:
    of open_clip, or a CLIP in Hugging Face's layout.
    """
    source = _source(name)
    local = source.startswith("local-dir:")
    if local and weights not in ("embedded", "random"):
        raise Mistake(
            f"vision.weights is '{weights}'; vision.name={name} has its own weights, so only "
            "'embedded' and 'random' are allowed"
        )
    pretrained = None if local or weights == "random" else _pretrained(name, weights)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip reports every load, and random weights
    try:
        model = open_clip.create_model(
            source,
            pretrained=pretrained,
            load_weights=local and weights != "random",
            device=torch.get_default_device(),  # `meta` where only shapes are wanted
        )
    except RuntimeError as error:
        raise Mistake(
            f"vision.weights is '{weights}', which cannot be read or fetched "
            f"({' '.join(str(error).split())[:300]}); wanted is {hub.TOWER}"
        ) from error
    visual = model.visual
    if not hasattr(visual, "transformer") and not hasattr(getattr(visual, "trunk", None), "blocks"):
        raise Mistake(
            f"vision.name is '{name}', which is no ViT; towers that work are open_clip's ViT-* "
            "and EVA* models, for example ViT-H-14, ViT-L-14-336 or EVA02-L-14-336"
        )
    tower = Tower(visual, layer, norm, open_clip.get_model_preprocess_cfg(model))
    if pretrained is None and Path(weights).is_dir():
        load_clip_folder(tower, Path(weights))
    return tower


def load_clip_folder(tower: Tower, folder: Path) -> None:
    """Load a CLIP in Hugging Face's layout into `tower`, at the image size of the folder."""
    file = folder / "config.json"
    config = clip.vision_config(read_json(file), file)
    needed = clip.config_of(tower.visual)
    for key in clip.KEYS:
        if config[key] != needed[key] and key != "image_size":
            raise Mistake(
                f"{file}: {key} is {config[key]}, and of the tower that vision.name names it is "
                f"{needed[key]}"
            )
    tower.resize(config["image_size"])
    clip.load(folder, tower.visual)


def _source(name: str) -> str:
    """Return what open_clip calls the tower `name`; a Mistake if it does not know it."""
    if name in EMBEDDED:
        import vlbench.model.tiny.eva  # noqa: F401  makes its architecture known to timm

        return f"local-dir:{EMBEDDED[name]}"
    if (Path(name) / "open_clip_config.json").is_file():
        return f"local-dir:{name}"
    if name not in open_clip.list_models():
        raise Mistake(
            f"vision.name is '{name}'; known are {', '.join(EMBEDDED)}, a folder with "
            "open_clip_config.json and the ViTs of open_clip."
            f"{nearest(name, [*EMBEDDED, *open_clip.list_models()])}"
        )
    return name


def _pretrained(name: str, weights: str) -> str | None:
    """Return the file or tag of open_clip that `weights` is; None for a folder of another kind."""
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        if (Path(weights) / file).is_file():
            return str(Path(weights) / file)
    if (Path(weights) / "config.json").is_file():
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights in tags:
        source = open_clip.get_pretrained_cfg(name, weights).get("hf_hub")
        if source:  # ask the hub first: open_clip tries for a minute and speaks in many lines
            owner, repository = source.split("/")[:2]
            fetch(f"{owner}/{repository}", "vision.weights", hub.TOWER, patterns=("*.json",))
    if weights in tags or Path(weights).is_file():
        return weights
    raise Mistake(
        f"vision.weights is '{weights}'; for {name} allowed are 'random', a file, a folder with "
        "open_clip_model.safetensors or with config.json of a CLIP, or one of "
        f"{', '.join(tags) or '(no tags)'}.{nearest(weights, tags)}"
    )
