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


def encode_images(
    model: open_clip.CLIP, scenes: Sequence[RenderedScene | CloseUpImage], image_size: int
) -> Tensor:
    """Compute `model.encode_image(pixels, normalize=True)` at an image size, `[scenes, width]`.

    Position embeddings are resized as in `fit`, and gradients reach them.
    """
    visual = model.visual
    hidden = visual.transformer(_embed_patches(visual, load_pixels(scenes, image_size)))
    return normalize(visual.ln_post(hidden)[:, 1:].mean(1) @ visual.proj, dim=-1)


def encode_patches(
    model: open_clip.CLIP, scenes: Sequence[RenderedScene], image_size: int
) -> Tensor:
    """Return the features before the last block, which recipes use, `[scenes, patches, width]`."""
    hidden = _embed_patches(model.visual, load_pixels(scenes, image_size))
    for block in model.visual.transformer.resblocks[:-1]:
        hidden = block(hidden)
    return hidden[:, 1:]


def _embed_patches(visual: open_clip.transformer.VisionTransformer, pixels: Tensor) -> Tensor:
    """Embed the class token and patches with their positions, `[images, 1 + patches, width]`."""
    hidden = visual.conv1(pixels)
    size, positions = hidden.shape[-2:], visual.positional_embedding
    if size != (4, 4):
        grid = positions[1:].float().T.reshape(1, -1, 4, 4)
        grid = interpolate(grid, size=size, mode="bicubic", antialias=True, align_corners=False)
        positions = torch.cat([positions[:1], grid.flatten(2)[0].T])
    start = visual.class_embedding.expand(len(hidden), 1, -1)
    hidden = torch.cat([start, hidden.flatten(2).transpose(1, 2)], 1) + positions
    return visual.ln_pre(hidden)


def encode_text(model: open_clip.CLIP, input_ids: Tensor, eos_id: int) -> Tensor:
    """Compute `model.encode_text(ids, normalize=True)` without the columns that are all padding."""
    input_ids = input_ids[:, : int((input_ids != 0).sum(1).max())]
    length = input_ids.shape[1]
    hidden = model.token_embedding(input_ids) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    ends = (input_ids == eos_id).int().argmax(1)
    hidden = model.ln_final(hidden)[torch.arange(len(input_ids)), ends] @ model.text_projection
    return normalize(hidden, dim=-1)
