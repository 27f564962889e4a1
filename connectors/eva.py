"""EVA's way of seeing: EVA-02 blocks over the tower's features, taught by hidden features.

The blocks are those of EVA-02 (Fang et al. 2023, arXiv:2303.11331: pre-norm with inner norms,
SwiGLU, 2-D rotary positions), timm's own, which reproduce the reference; a LayerNorm and a Linear
layer carry their output into the language model, one token per patch. Beside the language loss they
learn EVA's objective (Fang et al. 2022, arXiv:2211.07636): blocks of patches are hidden, and what
the tower says there is to be found, by negative cosine.
"""

import math
import random
from typing import Any

import torch
from timm.layers import RotaryEmbeddingCat
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from vlbench.compat.vision_internals import timm_eva_block
from vlbench.connector.base import Connector, Shapes

MIN_BLOCK_ASPECT = 0.3  # of a hidden block: from this to its inverse, as BEiT's masks
MAX_BLOCK_ATTEMPTS = 10  # to place a block before a mask is left as it is


def block_mask(
    rng: random.Random, rows: int, columns: int, max_hidden: int, min_block_size: int
) -> Tensor:
    """Return a mask `[rows, columns]` that hides at most `count` patches, block by block.

    A block has at least `least` patches while so many are left. The draws are BEiT's, in its order.
    """
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    hidden = 0
    while hidden < max_hidden:
        for _ in range(MAX_BLOCK_ATTEMPTS):
            more = _hide_block(rng, mask, max_hidden - hidden, min_block_size)
            if more:
                hidden += more
                break
        else:
            break
    return mask


def _hide_block(rng: random.Random, mask: Tensor, budget: int, min_block_size: int) -> int:
    """Try to hide one more block in `mask`; return how many patches it hides anew."""
    area = rng.uniform(min_block_size, budget)
    aspect = math.exp(rng.uniform(math.log(MIN_BLOCK_ASPECT), -math.log(MIN_BLOCK_ASPECT)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    rows, columns = mask.shape
    if not (height < rows and width < columns):
        return 0
    top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
    block = mask[top : top + height, left : left + width]
    more = int((~block).sum())
    if not 0 < more <= budget:
        return 0
    block[:] = True
    return more


class EvaConnector(Connector):
    """`layers` EVA-02 blocks of the tower's width, then LayerNorm and Linear."""

    size_options = {
        "layers": (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24),
        "mlp_ratio": (0.6667, 1.0, 1.3333, 2.0, 2.6667, 4.0, 5.3333, 8.0),
    }

    def __init__(
        self,
        shapes: Shapes,
        layers: int = 2,
        head_width: int = 64,
        mlp_ratio: float = 2.6667,
        mask_ratio: float = 0.41,
        mask_weight: float = 1.0,
    ) -> None:
        """Build the blocks; `mask_weight` is that of EVA's objective beside the language loss.

        `mask_ratio` is the share of patches that is hidden (105 of 256 in the reference).
        """
        super().__init__()
        width = shapes.vision_width
        if head_width < 4 or head_width % 4 or width % head_width:
            raise ValueError(
                f"connector eva: head_width is {head_width}; it must be a multiple of 4 that "
                f"divides the tower's width {width}"
            )
        if layers < 1:
            raise ValueError(f"connector eva: layers is {layers}; it must be at least 1")
        if not 0 < mask_ratio < 1:
            raise ValueError(
                f"connector eva: mask_ratio is {mask_ratio}; it must lie between 0 and 1"
            )
        if mask_weight < 0:
            raise ValueError(f"connector eva: mask_weight is {mask_weight}; it must not be below 0")
        self.tokens_per_image, self.grid = shapes.patches, shapes.grid
        self.hidden_count = max(1, round(mask_ratio * shapes.patches))
        self.mask_weight = mask_weight
        self.rope = RotaryEmbeddingCat(
            head_width, in_pixels=False, feat_shape=list(shapes.grid), ref_feat_shape=[16, 16]
        )
        self.blocks = nn.ModuleList(
            timm_eva_block()(
                width,
                width // head_width,
                qkv_fused=False,
                mlp_ratio=mlp_ratio,
                swiglu_mlp=True,
                scale_mlp=True,
                scale_attn_inner=True,
                num_prefix_tokens=0,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.projection = nn.Linear(width, shapes.lm_width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.head = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Carry `[images, patches, vision_width]` to `[images, patches, lm_width]`."""
        return self.projection(self.run_blocks(features))

    def run_blocks(self, features: Tensor) -> Tensor:
        """Run the blocks over `[images, patches, vision_width]`."""
        rope = self.rope.get_embed()
        for block in self.blocks:
            features = block(features, rope=rope)
        return self.norm(features)

    def losses(
        self, features: Tensor, visual: Tensor, batch: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the summed negative cosine of what is found at hidden patches, plus its count."""
        if not self.mask_weight:
            return {}
        mask = self.patch_masks(batch.image_ids, len(features))
        where = mask.flatten().nonzero()[:, 0]  # before it travels: a GPU would be waited for
        mask, hidden = (one.to(features.device, non_blocking=True) for one in (mask, where))
        target = features.detach()
        inputs = torch.where(mask[..., None], self.mask_token.to(target.dtype), target)
        found = self.head(self.run_blocks(inputs).flatten(0, 1)[hidden]).float()
        told = target.flatten(0, 1)[hidden].float()
        loss = -cosine_similarity(found, told, dim=-1).sum()
        return {"eva": (self.mask_weight * loss, torch.tensor(len(where)))}

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        """Return how many patches of `batch` are hidden."""
        hidden = self.patch_masks(batch.image_ids, len(batch.image_ids)).sum()
        return {"eva": int(hidden)} if self.mask_weight else {}

    def patch_masks(self, image_ids: list[str], image_count: int) -> Tensor:
        """Return the hidden patches `[images, patches]` of the pictures called `image_ids`.

        They follow from the step's seed and the picture's identity alone, so that packing and
        accumulation do not change them. A batch of text hides nothing.
        """
        rows, columns = self.grid
        masks = torch.zeros(image_count, rows * columns, dtype=torch.bool)
        for index, name in enumerate(image_ids):
            rng = random.Random(f"{torch.initial_seed()} {name} eva")
            # 16 of 256 patches in the reference
            least = max(1, rows * columns // 16)
            masks[index] = block_mask(rng, rows, columns, self.hidden_count, least).flatten()
        return masks
