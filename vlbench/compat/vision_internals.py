"""Private parts of open_clip and timm: how their vision transformers are built and laid out.

Checked with open_clip 3.3 and timm 1.0.31; 3.0 and 1.0.20 are the oldest that vlbench allows. A
vision encoder is open_clip's `VisionTransformer`, or its `TimmModel`, which holds a model of timm
as `trunk`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def build_open_clip_encoder(
    embed_dim: int, vision_config: dict[str, Any], quick_gelu: bool
) -> nn.Module:
    """Build a vision encoder of open_clip with random weights: `model._build_vision_tower`.

    `create_model` would build the text encoder as well. If it goes, no vision encoder is built.
    """
    from open_clip.model import _build_vision_tower

    visual: nn.Module = _build_vision_tower(embed_dim, vision_config, quick_gelu)
    return visual


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


def encoder_image_size(visual: Any) -> int:
    """Return the side of the square input in pixels: `image_size`, a pair."""
    return int(visual.image_size[0])


def encoder_grid(visual: Any) -> tuple[int, int]:
    """Return rows and columns of patches: `trunk.patch_embed.grid_size`, or `grid_size`."""
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
