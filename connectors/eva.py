"""EVA-02 blocks over the vision encoder's features, trained with masked feature prediction.

The blocks are EVA-02's (Fang et al. 2023, arXiv:2303.11331: pre-norm with inner norms, SwiGLU, 2-D
rotary position embeddings) in timm's implementation, which reproduces the reference; a LayerNorm
and a Linear layer project their output to the language model's width, one token per patch. Beside
the language loss they learn EVA's objective (Fang et al. 2022, arXiv:2211.07636): blocks of patches
are masked, and the encoder's features there are predicted; the loss is the negative cosine.
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

MIN_BLOCK_ASPECT = 0.3  # aspect ratio of a masked block: from this to its inverse, as in BEiT
MAX_BLOCK_ATTEMPTS = 10  # attempts to place a block before the mask is left as it is


def block_mask(
    rng: random.Random, rows: int, columns: int, max_hidden: int, min_block_size: int
) -> Tensor:
    """Return a block-wise mask `[rows, columns]`; True is a masked patch.

    Random numbers are drawn as in BEiT, in its order.

    Args:
        rng: Source of randomness.
        rows: Rows of patches.
        columns: Columns of patches.
        max_hidden: Most masked patches.
        min_block_size: Least patches of a block, while `max_hidden` allows it.
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
    """Try to mask one more block; return the number of patches that it adds to `mask`."""
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
    """`layers` EVA-02 blocks of the vision encoder's width, then LayerNorm and Linear."""

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
        """Build the blocks.

        Args:
            shapes: Sizes of vision encoder and language model.
            layers: Number of blocks.
            head_width: Width of an attention head.
            mlp_ratio: Width of the MLP relative to the encoder's.
            mask_ratio: Share of patches that is masked (105 of 256 in the reference).
            mask_weight: Weight of the masked-feature loss beside the language loss; 0: none.
        """
        super().__init__()
        width = shapes.vision_width
        if head_width < 4 or head_width % 4 or width % head_width:
            raise ValueError(
                f"connector eva: head_width is {head_width}; it must be a multiple of 4 that "
                f"divides the vision encoder's width {width}"
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
        self.token_grid = shapes.grid
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
        """Project `[images, patches, vision_width]` to `[images, patches, lm_width]`."""
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
        """Return the sum of negative cosines at masked patches, and their number."""
        if not self.mask_weight:
            return {}
        mask = self.patch_masks(batch.image_ids, len(features))
        indices = mask.flatten().nonzero()[:, 0]  # on the CPU: nonzero would synchronize a GPU
        mask, hidden = (t.to(features.device, non_blocking=True) for t in (mask, indices))
        target = features.detach()
        inputs = torch.where(mask[..., None], self.mask_token.to(target.dtype), target)
        predicted = self.head(self.run_blocks(inputs).flatten(0, 1)[hidden]).float()
        expected = target.flatten(0, 1)[hidden].float()
        loss = -cosine_similarity(predicted, expected, dim=-1).sum()
        return {"eva": (self.mask_weight * loss, torch.tensor(len(indices)))}

    def loss_counts(self, batch: Any, objective: str = "language") -> dict[str, int]:
        """Return the number of masked patches of `batch`."""
        hidden = self.patch_masks(batch.image_ids, len(batch.image_ids)).sum()
        return {"eva": int(hidden)} if self.mask_weight else {}

    def patch_masks(self, image_ids: list[str], image_count: int) -> Tensor:
        """Return the masks `[images, patches]` of the images with these ids.

        A mask depends on the seed of the step and the image's id alone, so that packing and
        gradient accumulation do not change it. A batch without images masks nothing.
        """
        rows, columns = self.grid
        masks = torch.zeros(image_count, rows * columns, dtype=torch.bool)
        for index, name in enumerate(image_ids):
            rng = random.Random(f"{torch.initial_seed()} {name} eva")
            min_block_size = max(1, rows * columns // 16)  # 16 of 256 patches in the reference
            mask = block_mask(rng, rows, columns, self.hidden_count, min_block_size)
            masks[index] = mask.flatten()
        return masks
