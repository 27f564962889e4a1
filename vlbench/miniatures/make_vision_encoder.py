"""Train the miniature CLIP of open_clip on rendered scenes: by captions, then by regions as well.

The first stages compare images of large objects with their captions. The last adds small objects,
dots and letters, and compares each patch with the words of what it shows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlbench.data.scene_lattice import EXTENT
from vlbench.data.scene_world import CROWD_EXTENT, IMAGE_SIDE
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import CONTEXT_LENGTH
from vlbench.miniatures.make_tokenizer import VOCAB_SIZE
from vlbench.miniatures.measure_vision_encoder import measure_vision_encoder
from vlbench.miniatures.region_words import RegionWords
from vlbench.miniatures.vision_losses import CaptionLosses, RegionLosses, StepLoss

# steps with one object per image, then with whole scenes
SINGLE_OBJECT_STEPS, WHOLE_SCENE_STEPS, FIRST_PEAK_LR = 400, 1000, 1.2e-3
# steps with both image sizes, again, then mostly the larger
MIXED_SIZE_STEPS, MORE_MIXED_SIZE_STEPS, MOSTLY_LARGE_STEPS = 500, 1000, 900
MIXED_SIZE_PEAK_LR = 8e-4  # peak learning rate of these steps
# steps of which three in four name regions
REGION_STEPS, REGION_PEAK_LR = 1200, 8e-4
ANYWHERE_STEPS, ANYWHERE_PEAK_LR = 800, 8e-4  # the same, where crowded scenes are anywhere
# the same, where two in three crowded scenes are as dense as those of the family crowd; twice
DENSE_STEPS, DENSE_PEAK_LR = 1200, 8e-4
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {
        "image_size": 56,
        "layers": 5,
        "width": 128,
        "head_width": 32,
        "patch_size": 14,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "width": 128,
        "heads": 4,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": 2,
        "pad_id": 0,
    },
}


def build_clip(folder: Path | None = None) -> open_clip.CLIP:
    """Build the CLIP, with random weights or those of `folder`."""
    model = open_clip.CLIP(**CLIP_CONFIG)
    if folder is not None:
        load_clip(model, folder)
    return model


def load_clip(model: open_clip.CLIP, folder: Path) -> None:
    """Load the weights that `write_clip` wrote into `folder`."""
    state = load_file(folder / "open_clip_model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})


def create_vision_encoder(
    folder: Path, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> dict[str, object]:
    """Train the CLIP, write it to `folder`, and return its quality."""
    torch.manual_seed(11)
    model = build_clip()
    start = time.monotonic()
    for modules, steps, peak_lr, compute_loss in pretraining_stages(model, tokenizer):
        train(modules, steps, peak_lr, compute_loss, log)
        model.half().float()  # as it is written
    seconds = time.monotonic() - start
    write_clip(model, CLIP_CONFIG, folder)
    model = build_clip(folder).eval()  # as it was written
    figures = {**measure_vision_encoder(model, tokenizer), "seconds": seconds}
    log(f"vision encoder {figures}")
    return figures


def pretraining_stages(
    model: open_clip.CLIP, tokenizer: Tokenizer
) -> list[tuple[nn.ModuleList, int, float, StepLoss]]:
    """List what is trained in each stage, its steps, peak learning rate and loss of a step.

    No two stages see the same scenes.
    """
    captions = CaptionLosses(model, tokenizer)
    only_clip = nn.ModuleList([model])

    def first_stage(step: int) -> Tensor:
        single = step < SINGLE_OBJECT_STEPS
        return captions.single_objects(step) if single else captions.whole_scenes(step)

    def mixed_sizes(first_step: int, small_every: int) -> StepLoss:
        return lambda step: captions.mixed_sizes(first_step, step, small_every)

    def region_stage(
        extents: Sequence[float], steps: int, peak_lr: float, first_step: int
    ) -> tuple[nn.ModuleList, int, float, StepLoss]:
        words = RegionWords(CLIP_CONFIG["vision_cfg"]["width"])
        losses = RegionLosses(model, words, captions, extents)
        modules = nn.ModuleList([model, words])
        return modules, steps, peak_lr, lambda step: losses.mixed(first_step, step)

    return [
        (only_clip, SINGLE_OBJECT_STEPS + WHOLE_SCENE_STEPS, FIRST_PEAK_LR, first_stage),
        (only_clip, MIXED_SIZE_STEPS, MIXED_SIZE_PEAK_LR, mixed_sizes(100_000, 2)),
        (only_clip, MORE_MIXED_SIZE_STEPS, MIXED_SIZE_PEAK_LR, mixed_sizes(200_000, 2)),
        (only_clip, MOSTLY_LARGE_STEPS, MIXED_SIZE_PEAK_LR, mixed_sizes(300_000, 4)),
        region_stage((IMAGE_SIDE,), REGION_STEPS, REGION_PEAK_LR, 400_000),
        region_stage((EXTENT,), ANYWHERE_STEPS, ANYWHERE_PEAK_LR, 500_000),
        *(
            region_stage((EXTENT, CROWD_EXTENT, CROWD_EXTENT), DENSE_STEPS, DENSE_PEAK_LR, first)
            for first in (600_000, 700_000)
        ),
    ]


def write_clip(model: open_clip.CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write a model of open_clip with the configuration `config` into `folder`, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    layout = {"model_cfg": config, "preprocess_cfg": preprocess}
    text = json.dumps(layout, indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")


def train(
    modules: nn.ModuleList,
    steps: int,
    peak_lr: float,
    compute_loss: StepLoss,
    log: Callable[[str], None],
) -> None:
    """Minimise `compute_loss(step)` over the parameters of `modules`, the CLIP first."""
    parameters, model = [*modules.parameters()], cast(open_clip.CLIP, modules[0])
    decayed, other = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * cosine_lr_scale(step, steps)
        loss = compute_loss(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0:
            seconds = time.monotonic() - start
            log(f"vision encoder step {step}/{steps} loss {loss.item():.3f} {seconds:.0f} s")


def cosine_lr_scale(step: int, steps: int, warmup: int = 60) -> float:
    """Give the share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 0.005
