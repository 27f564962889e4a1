"""How the miniature tower's pretraining encodes pictures and captions, with work spared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from vlbench.data.scene_world import Scene
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.tiny.pictures import CloseUp

CONTEXT = 40  # tokens of a caption with its start and end
_MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
_STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def pixels(scenes: Sequence[Scene | CloseUp], side: int = 56) -> Tensor:
    """Open and normalise scenes, [scenes, 3, side, side]."""
    size = (side, side)
    rows = [np.asarray(s.open().resize(size, Image.Resampling.BICUBIC)) for s in scenes]
    images = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
    return (images - _MEAN) / _STD


def text_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Write captions as the text tower reads them, [texts, CONTEXT]: start, ids, end, padding."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [tokenizer.bos, *tokenizer.encode(text)[: CONTEXT - 2], tokenizer.eos]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def encode_alone(model: open_clip.CLIP, scenes: Sequence[Scene]) -> Tensor:
    """Encode scenes of one object, [scenes, width], without the patches of the empty quarters.

    That makes a step three times cheaper, and shapes need many steps.
    """
    visual = model.visual
    hidden = visual.conv1(pixels(scenes)).flatten(2).transpose(1, 2)
    hidden = hidden + visual.positional_embedding[1:]
    cells = torch.tensor([one.things[0].cell for one in scenes])
    corner = cells // 2 * 8 + cells % 2 * 2  # the quarter's first patch of 4 x 4
    kept = corner[:, None] + torch.tensor([0, 1, 4, 5])
    return _finish(visual, hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2])))


def encode_large(model: open_clip.CLIP, scenes: Sequence[Scene]) -> Tensor:
    """Encode scenes at 112 pixels, [scenes, width]; position embeddings are resized as `fit` does.

    A large tower gets over a doubled resolution in millions of pictures; this one has minutes.
    """
    visual = model.visual
    hidden = visual.conv1(pixels(scenes, 112)).flatten(2).transpose(1, 2)
    grid = visual.positional_embedding[1:].float().T.reshape(1, -1, 4, 4)
    grid = interpolate(grid, size=(8, 8), mode="bicubic", antialias=True, align_corners=False)
    return _finish(visual, hidden + grid.flatten(2).transpose(1, 2))


def _finish(visual: open_clip.transformer.VisionTransformer, patches: Tensor) -> Tensor:
    """Do with patches `[images, patches, width]` what follows in open_clip."""
    start = visual.class_embedding + visual.positional_embedding[:1]
    hidden = torch.cat([start.expand(len(patches), 1, -1), patches], 1)
    hidden = visual.ln_post(visual.transformer(visual.ln_pre(hidden)))[:, 1:].mean(1)
    return normalize(hidden @ visual.proj, dim=-1)


def encode_text(model: open_clip.CLIP, ids: Tensor, eos_id: int) -> Tensor:
    """Do as `model.encode_text(ids, normalize=True)`, sparing the columns of mere padding."""
    ids = ids[:, : int((ids != 0).sum(1).max())]
    length = ids.shape[1]
    hidden = model.token_embedding(ids) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    ends = (ids == eos_id).int().argmax(1)
    hidden = model.ln_final(hidden)[torch.arange(len(ids)), ends] @ model.text_projection
    return normalize(hidden, dim=-1)
