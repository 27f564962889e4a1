"""Private parts of open_clip and timm: how their vision transformers are built and laid out.

Checked with open_clip 3.3 and timm 1.0.31; 3.1 and 1.0.31 are the oldest that vlbench allows. A
vision encoder is open_clip's `VisionTransformer`, or its `TimmModel`, which holds a model of timm
as `trunk`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


def build_open_clip_encoder(
    embed_dim: int, vision_config: dict[str, Any], quick_gelu: bool
) -> nn.Module:
    """Build a vision encoder of open_clip with random weights: `model._build_vision_tower`.

    `create_model` would build the text encoder as well. If it goes, no vision encoder is built.
    open_clip builds a model of timm at the size of its name, whatever `image_size` says.
    """
    from open_clip.model import _build_vision_tower

    visual: Any = _build_vision_tower(embed_dim, vision_config, quick_gelu)
    patch_embed = getattr(visual.trunk, "patch_embed", None) if has_timm_trunk(visual) else None
    if getattr(patch_embed, "img_size", None) not in (None, visual.image_size):
        visual.set_input_size(visual.image_size)
    module: nn.Module = visual
    return module


def build_timm_encoder(architecture: str, model_args: dict[str, Any], image_size: int) -> nn.Module:
    """Build a model of timm with random weights and no classifier, as open_clip holds one.

    `model_args` are those of timm's own config.json. open_clip's `TimmModel.__init__` takes no
    arguments of the model and decides on its pooling, and so on tensors: its methods are used, with
    a trunk as timm builds it.
    """
    import timm
    from open_clip.timm_model import TimmModel
    from torch import nn

    own = {**model_args, "img_size": image_size, "num_classes": 0, "pretrained": False}
    visual: Any = TimmModel.__new__(TimmModel)
    nn.Module.__init__(visual)
    visual.trunk = timm.create_model(architecture, **own)
    visual.head = nn.Sequential()
    visual.image_size = (image_size, image_size)
    module: nn.Module = visual
    return module


def timm_module_name(architecture: str) -> str | None:
    """Return which file of timm builds an architecture ("eva", "fastvit"), None if none does."""
    from timm.models import is_model, model_entrypoint

    return (
        model_entrypoint(architecture).__module__.split(".")[-1] if is_model(architecture) else None
    )


def timm_architecture_names() -> list[str]:
    """Return the names of all architectures of the installed timm."""
    from timm.models import list_models

    return list(list_models())


def timm_pretrained_names() -> list[str]:
    """Return the names ARCHITECTURE.TAG of all weights that the installed timm knows of."""
    from timm.models import list_pretrained

    return list(list_pretrained())


def has_class_token(visual: Any) -> bool:
    """Tell whether a vision encoder has a class token: `cls_token` of timm, `class_embedding`.

    Registers are no class token: models of timm may have registers alone.
    """
    if has_timm_trunk(visual):
        trunk = visual.trunk
        holder = trunk.embeds if takes_any_grid(visual) else trunk
        return getattr(holder, "cls_token", None) is not None
    return getattr(visual, "class_embedding", None) is not None


def has_final_norm(visual: Any) -> bool:
    """Tell whether a vision encoder has a norm after its last block, that of all its tokens."""
    from torch import nn

    norm = visual.trunk.norm if has_timm_trunk(visual) else visual.ln_post
    return not isinstance(norm, nn.Identity)


def resample_radio_positions(positions: Tensor, visual: Any, architecture: str) -> Tensor:
    """Return RADIO's position embeddings `[1, patches, width]` for the grid of `visual`.

    C-RADIO's files hold a grid of 128 x 128; timm makes a model's grid of it as it loads them.
    """
    from timm.layers import resample_abs_pos_embed
    from timm.models import vision_transformer

    names: tuple[str, ...] = vision_transformer._RADIO_ALIGN_CORNERS
    resampled: Tensor = resample_abs_pos_embed(
        positions,
        new_size=encoder_grid(visual),
        num_prefix_tokens=0,
        interpolation="bilinear",
        antialias=False,
        align_corners=any(name in architecture for name in names),
    )
    return resampled


def has_timm_trunk(visual: nn.Module) -> bool:
    """Tell whether a vision encoder of open_clip holds a model of timm."""
    return hasattr(visual, "trunk")


def has_encoder_blocks(visual: nn.Module) -> bool:
    """Tell whether a vision encoder is a transformer: ResNets have no list of blocks."""
    return hasattr(visual, "transformer") or hasattr(getattr(visual, "trunk", None), "blocks")


def encoder_blocks(visual: Any) -> nn.ModuleList:
    """Return the transformer blocks of a vision encoder, the first one first.

    `trunk.blocks` of timm, `transformer.resblocks` of open_clip.
    """
    blocks = visual.trunk.blocks if has_timm_trunk(visual) else visual.transformer.resblocks
    return blocks  # type: ignore[no-any-return]


def keep_encoder_blocks(visual: Any, block_count: int) -> None:
    """Drop all but the first `block_count` blocks of a vision encoder."""
    kept = encoder_blocks(visual)[:block_count]
    if has_timm_trunk(visual):
        visual.trunk.blocks = kept
    else:
        visual.transformer.resblocks = kept


def encoder_width(visual: Any) -> int:
    """Return the width of one patch feature: `trunk.embed_dim`, or of the position embeddings."""
    if has_timm_trunk(visual):
        return int(visual.trunk.embed_dim)
    return int(visual.positional_embedding.shape[-1])


def patch_projection(visual: Any) -> Tensor:
    """Return the weights that make an embedding of the pixels of a patch.

    `trunk.patch_embed.proj` of timm, of a `NaFlexVit` `trunk.embeds.proj`; `conv1` of open_clip.
    """
    if not has_timm_trunk(visual):
        weight: Tensor = visual.conv1.weight
        return weight
    holder = visual.trunk.embeds if takes_any_grid(visual) else visual.trunk.patch_embed
    weight = holder.proj.weight
    return weight


def encoder_image_size(visual: Any) -> int:
    """Return the side of the square input in pixels: `image_size`, a pair."""
    return int(visual.image_size[0])


def takes_any_grid(visual: Any) -> bool:
    """Tell whether a vision encoder takes pictures of any shape: timm's `NaFlexVit`."""
    from timm.models.naflexvit import NaFlexVit

    return has_timm_trunk(visual) and isinstance(visual.trunk, NaFlexVit)


def naflex_inputs(visual: Any, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return what a `NaFlexVit` takes of sheets of patches `[images, 3, side, side]`.

    `grids` are rows and columns of each image. The result has `patches` `[images, patches, numbers
    of a patch]`, their rows and columns `patch_coord` `[images, patches, 2]`, and `attn_mask`
    `[images, 1, 1, tokens]`, False behind an image's own patches. timm would make a
    mask of `patch_valid` that hides all from padding, too: under autocast that can become NaN.
    Coordinates stay on the CPU: timm asks each image for its grid, which would wait for a GPU, and
    reads nothing else of them unless it samples.
    """
    import torch
    from timm.models.naflexvit import batch_patchify

    embeds = visual.trunk.embeds
    patches, _ = batch_patchify(
        pixels, embeds.patch_size, pad=False, channels_last=embeds.channels_last
    )
    prefix, count = visual.trunk.num_prefix_tokens, patches.shape[1]
    places = torch.zeros(len(grids), count, 2, dtype=torch.long)
    mask = torch.ones(len(grids), 1, 1, prefix + count, dtype=torch.bool)
    for image, (rows, columns) in enumerate(grids):
        own = torch.arange(rows * columns)
        places[image, : len(own), 0] = own.div(columns, rounding_mode="floor")
        places[image, : len(own), 1] = own.remainder(columns)
        mask[image, 0, 0, prefix + len(own) :] = False
    return {
        "patches": patches,
        "patch_coord": places.to(pixels.device) if embeds.pos_embed_use_grid_sample else places,
        "attn_mask": mask.to(pixels.device, non_blocking=True),
    }


def encoder_grid(visual: Any) -> tuple[int, int]:
    """Return rows and columns of patches: `trunk.patch_embed.grid_size`, or `grid_size`.

    A `NaFlexVit` has none of its own: those of a square of the image size.
    """
    if takes_any_grid(visual):
        rows, columns = visual.trunk.embeds.dynamic_feat_size(visual.image_size)
        return int(rows), int(columns)
    grid = visual.trunk.patch_embed.grid_size if has_timm_trunk(visual) else visual.grid_size
    rows, columns = grid
    return int(rows), int(columns)


def set_encoder_image_size(visual: Any, image_size: int) -> None:
    """Change the input of a vision encoder to `image_size` pixels, a multiple of its patch size.

    timm has `set_input_size`. open_clip resizes position embeddings only when it loads a file
    (`model.resize_pos_embed(state, model)`, which looks at `model.visual.grid_size`), so it is
    called here with the embeddings alone. If these change, stages cannot change the image size.
    """
    from open_clip.model import resize_pos_embed
    from torch import nn

    if has_timm_trunk(visual):
        if takes_any_grid(visual):  # it resizes its position embeddings for each picture
            visual.image_size = (image_size, image_size)
        else:
            visual.set_input_size(image_size)
        return
    patch = encoder_image_size(visual) // encoder_grid(visual)[0]
    visual.image_size = (image_size, image_size)
    visual.grid_size = (image_size // patch, image_size // patch)
    key = "visual.positional_embedding"
    state = {key: visual.positional_embedding.data}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    visual.positional_embedding = nn.Parameter(state[key].contiguous())


def timm_eva() -> type[Any]:
    """Return `timm.models.eva.Eva`, of which the embedded miniature of an EVA encoder is built."""
    from timm.models.eva import Eva

    return Eva


def timm_eva_block() -> type[Any]:
    """Return `timm.models.eva.EvaBlock`, of which the `eva` connector is built."""
    from timm.models.eva import EvaBlock

    return EvaBlock


def timm_regnet_stage() -> type[Any]:
    """Return `timm.models.regnet.RegStage`, of which the `c_abstractor` connector is built."""
    from timm.models.regnet import RegStage

    return RegStage
