"""Image and caption batches for pretraining the miniature CLIP, without wasted computation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlbench.data.scene_world import RenderedScene
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.training_images import CloseUpImage

CONTEXT_LENGTH = 40  # tokens of a caption with its start and end
_PIXEL_MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
_PIXEL_STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def load_pixels(scenes: Sequence[RenderedScene | CloseUpImage], image_size: int = 56) -> Tensor:
    """Open and normalise scenes, `[scenes, 3, side, side]`."""
    size = (image_size, image_size)
    rows = [np.asarray(s.open().resize(size, Image.Resampling.BICUBIC)) for s in scenes]
    images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
    return (images - _PIXEL_MEAN) / _PIXEL_STD


def tokenize_captions(tokenizer: Tokenizer, captions: Sequence[str]) -> Tensor:
    """Return captions as ids `[texts, CONTEXT_LENGTH]`: start, ids, end, padding."""
    rows = torch.zeros(len(captions), CONTEXT_LENGTH, dtype=torch.long)
    for row, text in zip(rows, captions, strict=True):
        ids = [
            tokenizer.bos_token_id,
            *tokenizer.encode(text)[: CONTEXT_LENGTH - 2],
            tokenizer.eos_token_id,
        ]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def encode_single_objects(model: open_clip.CLIP, scenes: Sequence[RenderedScene]) -> Tensor:
    """Encode scenes of one object, `[scenes, width]`, without patches of the empty quarters.

    That makes a step three times cheaper, and shapes need many steps.
    """
    visual = model.visual
    hidden = _embed_patches(visual, load_pixels(scenes))
    cells = torch.tensor([one.objects[0].cell for one in scenes])
    corner = cells // 2 * 8 + cells % 2 * 2  # the quarter's first patch of 4 x 4
    kept = corner[:, None] + torch.tensor([0, 1, 4, 5])
    return _encode_patches(
        visual, hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
    )


def encode_large_images(model: open_clip.CLIP, scenes: Sequence[RenderedScene]) -> Tensor:
    """Encode scenes at 112 pixels, `[scenes, width]`; position embeddings resized as in `fit`.

    A large encoder adapts to a doubled resolution over millions of images; this one has minutes.
    """
    return _encode_patches(model.visual, _embed_patches(model.visual, load_pixels(scenes, 112)))


def encode_patches(
    model: open_clip.CLIP, scenes: Sequence[RenderedScene], image_size: int
) -> Tensor:
    """Return the features before the last block, which recipes use, `[scenes, patches, width]`.

    Gradients reach everything, position embeddings resized to another image size among it.
    """
    visual = model.visual
    patches = _embed_patches(visual, load_pixels(scenes, image_size))
    hidden: Tensor = visual.ln_pre(_prepend_class_token(visual, patches))
    for block in visual.transformer.resblocks[:-1]:
        hidden = block(hidden)
    return hidden[:, 1:]


def _embed_patches(visual: open_clip.transformer.VisionTransformer, pixels: Tensor) -> Tensor:
    """Embed patches with their positions, `[images, patches, width]`."""
    hidden: Tensor = visual.conv1(pixels)
    positions = visual.positional_embedding[1:]
    if hidden.shape[-1] != 4:
        grid = positions.float().T.reshape(1, -1, 4, 4)
        size = hidden.shape[-2:]
        grid = interpolate(grid, size=size, mode="bicubic", antialias=True, align_corners=False)
        positions = grid.flatten(2).transpose(1, 2)
    embedded: Tensor = hidden.flatten(2).transpose(1, 2) + positions
    return embedded


def _prepend_class_token(
    visual: open_clip.transformer.VisionTransformer, patches: Tensor
) -> Tensor:
    start = visual.class_embedding + visual.positional_embedding[:1]
    return torch.cat([start.expand(len(patches), 1, -1), patches], 1)


def _encode_patches(visual: open_clip.transformer.VisionTransformer, patches: Tensor) -> Tensor:
    """Apply the rest of open_clip's encoder to patches `[images, patches, width]`."""
    hidden = visual.ln_pre(_prepend_class_token(visual, patches))
    hidden = visual.ln_post(visual.transformer(hidden))[:, 1:].mean(1)
    return normalize(hidden @ visual.proj, dim=-1)


def encode_text(model: open_clip.CLIP, input_ids: Tensor, eos_id: int) -> Tensor:
    """Compute `model.encode_text(ids, normalize=True)` without the columns that are all padding."""
    input_ids = input_ids[:, : int((input_ids != 0).sum(1).max())]
    length = input_ids.shape[1]
    hidden = model.token_embedding(input_ids) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    ends = (input_ids == eos_id).int().argmax(1)
    hidden = model.ln_final(hidden)[torch.arange(len(input_ids)), ends] @ model.text_projection
    return normalize(hidden, dim=-1)
