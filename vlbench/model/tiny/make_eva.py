"""Teach the EVA miniature: it learns to find what the miniature tower sees, patch by patch.

That is how EVA-01 and EVA-02 come to be: a plain ViT regresses the features of a CLIP tower. Here
no patch is hidden, and both image sizes are shown, because there are minutes and not weeks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, mse_loss

from vlbench.model.tiny import make_tower
from vlbench.model.tiny.encode import pixels
from vlbench.model.tiny.eva import NAME
from vlbench.model.tiny.pictures import single, whole
from vlbench.model.vision import Tower

LESSONS = ((56, 500, 2e-3), (112, 1100, 1.5e-3), (56, 300, 5e-4))
"""Pixels, steps and peak rate. A size has position embeddings, and so an optimizer, of its own."""
PICTURES = 48  # of a step
LAYER = -2  # whose features recipes use
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 56,
        "timm_model_name": NAME,
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    },
    # open_clip wants a text tower; this one is a stub, as no caption was read
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


def make(folder: Path, teacher: Path, log: Callable[[str], None] = print) -> dict[str, float]:
    """Teach the miniature by the tower in `teacher`, write it to `folder`, and give its quality."""
    torch.manual_seed(12)
    model = open_clip.CLIP(**CONFIG)  # type: ignore[arg-type]
    student, tower = _tower(model), _tower(make_tower.build(teacher))
    start = time.monotonic()
    tower.requires_grad_(False)
    errors = {}
    for number, (side, steps, rate) in enumerate(LESSONS):
        student.resize(side)
        tower.resize(side)
        errors[f"feature_error_{side}"] = lesson(student, tower, number, steps, rate, log)
    make_tower.write(model, CONFIG, folder)
    return {**errors, "seconds": time.monotonic() - start}


def lesson(
    student: Tower, tower: Tower, number: int, steps: int, rate: float, log: Callable[[str], None]
) -> float:
    """Let `student` regress the features of `tower`; return the last error per feature."""
    optimizer = torch.optim.AdamW(student.used(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    start, average = time.monotonic(), 1.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * make_tower.cosine(step, steps)
        place = 500_000 + 10_000 * number + step
        scenes, _ = single(place) if step % 4 == 0 else whole(place, bases=PICTURES // 4)
        images = pixels(scenes[:PICTURES], student.image_size)
        with torch.no_grad():
            target = _normal(tower(images))
        loss = mse_loss(_normal(student(images)), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.used(), 1.0)
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 0:
            log(f"eva {number} {step}/{steps} error {average:.3f} {time.monotonic() - start:.0f} s")
    return round(average, 4)


def _tower(model: open_clip.CLIP) -> Tower:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return Tower(model.visual, LAYER, False, {"mean": mean, "std": std})


def _normal(features: Tensor) -> Tensor:
    return layer_norm(features, features.shape[-1:])
