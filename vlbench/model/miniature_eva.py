"""The architecture of the EVA miniature, made known to timm: EVA-02's of CLIP, very small."""

from __future__ import annotations

from typing import Any

from timm.models import register_model

from vlbench.compat.vision_internals import timm_eva

EVA_MODEL_NAME = "vlbench_eva02_miniature"


@register_model
def vlbench_eva02_miniature(pretrained: bool = False, **kwargs: Any) -> Any:
    """Build timm's Eva as its `eva02_*_clip_*` models, 5 blocks of width 128, 56 pixels."""
    own: dict[str, Any] = {
        "img_size": 56,
        "patch_size": 14,
        "embed_dim": 128,
        "depth": 5,
        "num_heads": 4,
        "qkv_fused": False,
        "mlp_ratio": 8 / 3,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "global_pool": "token",
    }
    wanted = own | kwargs
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's own, for hubs
        wanted.pop(key, None)
    model = timm_eva()(**wanted)
    model.default_cfg = {"input_size": (3, 56, 56), "pool_size": None}
    return model
