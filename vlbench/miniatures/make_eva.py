"""Pretrain the EVA miniature: it regresses the patch features of the miniature CLIP encoder.

This is the pretraining of EVA-01 and EVA-02, a plain ViT that regresses the features of a CLIP
encoder, except that no patch is masked and that both image sizes are used: it takes minutes.
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

from vlbench.miniatures import make_vision_encoder
from vlbench.miniatures.batch_encoding import load_pixels
from vlbench.miniatures.measure_vision_encoder import PatchEncoder, probe_families
from vlbench.miniatures.vision_losses import RegionBatch
from vlbench.model.miniature_eva import EVA_MODEL_NAME
from vlbench.model.vision_encoder import VisionEncoder

DISTILLATION_STAGES = ((56, 500, 2e-3), (112, 1100, 1.5e-3), (56, 300, 5e-4))
"""Image size, steps, peak learning rate; each size has its own position embeddings, optimizer."""
# the scenes of a step by image size, 48 of them
SCENES_PER_STEP = {56: RegionBatch(16, 0, 8, 56), 112: RegionBatch(16, 8, 6, 112)}
FEATURE_LAYER = -2  # the block whose features recipes use
EVA_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 56,
        "timm_model_name": EVA_MODEL_NAME,
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    },
    # open_clip requires a text encoder; this one is a stub, as no caption is used
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}


def create_eva_encoder(
    folder: Path, teacher_folder: Path, log: Callable[[str], None] = print
) -> dict[str, object]:
    """Pretrain on the encoder in `teacher_folder`, write to `folder`, and return its quality."""
    torch.manual_seed(12)
    model = open_clip.CLIP(**EVA_CONFIG)
    student, start, errors = _wrap_encoder(model), time.monotonic(), {}
    for number, (side, steps, rate) in enumerate(DISTILLATION_STAGES):
        # a teacher of its own: resizing position embeddings up and down again would change them
        teacher = _wrap_encoder(make_vision_encoder.build_clip(teacher_folder))
        teacher.requires_grad_(False)
        student.set_image_size(side)
        teacher.set_image_size(side)
        errors[f"feature_error_{side}"] = distill_features(
            student, teacher, number, steps, rate, log
        )
    make_vision_encoder.write_clip(model, EVA_CONFIG, folder)
    seconds = time.monotonic() - start
    return {**errors, "probes": probe_families(_written_encoder(folder)), "seconds": seconds}


def _written_encoder(folder: Path) -> PatchEncoder:
    """Return the encoder of `folder` at both image sizes."""
    encoders = {}
    for image_size, *_ in DISTILLATION_STAGES:
        model = open_clip.CLIP(**EVA_CONFIG)
        make_vision_encoder.load_clip(model, folder)
        encoders[image_size] = _wrap_encoder(model.eval())
        encoders[image_size].set_image_size(image_size)
    return lambda scenes, size: encoders[size](load_pixels(scenes, size))


def distill_features(
    student: VisionEncoder,
    teacher: VisionEncoder,
    stage_index: int,
    steps: int,
    peak_lr: float,
    log: Callable[[str], None],
) -> float:
    """Train `student` to regress the features of `teacher`; return the last error per feature."""
    optimizer = torch.optim.AdamW(
        student.used_parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    start, average = time.monotonic(), 1.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * make_vision_encoder.cosine_lr_scale(step, steps)
        place = 500_000 + 10_000 * stage_index + step
        scenes = SCENES_PER_STEP[student.image_size].make_scenes(place)
        images = load_pixels(scenes, student.image_size)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = _normalize_features(teacher(images))
            loss = mse_loss(_normalize_features(student(images)), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.used_parameters(), 1.0)
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 0:
            log(
                f"eva {stage_index} {step}/{steps} error {average:.3f} "
                f"{time.monotonic() - start:.0f} s"
            )
    return round(average, 4)


def _wrap_encoder(model: open_clip.CLIP) -> VisionEncoder:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return VisionEncoder(model.visual, FEATURE_LAYER, False, {"mean": mean, "std": std})


def _normalize_features(features: Tensor) -> Tensor:
    return layer_norm(features.float(), features.shape[-1:])
