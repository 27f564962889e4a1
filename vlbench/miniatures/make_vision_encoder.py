"""Train the miniature CLIP of open_clip on rendered scenes, by captions and by words of regions.

Images of large objects are compared with their captions, as open_clip does it, and in turns patches
of all kinds of images, of small objects, dots and letters too, with the words of what they show.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file, save_file

from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import CONTEXT_LENGTH
from vlbench.miniatures.make_tokenizer import VOCAB_SIZE
from vlbench.miniatures.measure_vision_encoder import measure_vision_encoder
from vlbench.miniatures.region_words import RegionWords
from vlbench.miniatures.vision_losses import PretrainingLosses

PRETRAINING_STEPS, PEAK_LR = 2600, 1.2e-3
CLIP_CONFIG = {
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
    words = RegionWords(CLIP_CONFIG["vision_cfg"]["width"])
    train(model, words, PretrainingLosses(model, words, tokenizer), log)
    seconds = time.monotonic() - start
    write_clip(model, CLIP_CONFIG, folder)
    model = build_clip(folder).eval()  # as it was written
    figures = {**measure_vision_encoder(model, tokenizer), "seconds": seconds}
    log(f"vision encoder {figures}")
    return figures


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
    model: open_clip.CLIP,
    words: RegionWords,
    losses: PretrainingLosses,
    log: Callable[[str], None],
) -> None:
    """Minimise the losses over the parameters of `model` and `words`."""
    parameters = [*model.parameters(), *words.parameters()]
    decayed, other = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    start = time.monotonic()
    for step in range(PRETRAINING_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * cosine_lr_scale(step, PRETRAINING_STEPS)
        loss = losses.compute(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0:
            seconds = time.monotonic() - start
            log(f"vision encoder step {step} loss {loss.item():.3f} {seconds:.0f} s")


def cosine_lr_scale(step: int, steps: int, warmup: int = 60) -> float:
    """Give the share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 0.005
