"""Train the miniature CLIP of open_clip, contrastively, on rendered scenes and captions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor

from vlbench.data.scene_text import LANGUAGES, scene_caption
from vlbench.data.scene_world import SEEN_PAIRS, UNSEEN_PAIRS, RenderedScene, make_scene
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import (
    CONTEXT_LENGTH,
    encode_large_images,
    encode_single_objects,
    encode_text,
    load_pixels,
    tokenize_captions,
)
from vlbench.miniatures.make_tokenizer import VOCAB_SIZE
from vlbench.miniatures.training_images import (
    CloseUpImage,
    make_close_ups,
    single_object_scenes,
    whole_scenes,
)

# steps with one object per image, then with whole scenes
SINGLE_OBJECT_STEPS, WHOLE_SCENE_STEPS, FIRST_PEAK_LR = 400, 1000, 1.2e-3
# steps with both image sizes, again, then mostly the larger
MIXED_SIZE_STEPS, MORE_MIXED_SIZE_STEPS, MOSTLY_LARGE_STEPS = 500, 1000, 900
MIXED_SIZE_PEAK_LR = 8e-4  # peak learning rate of these steps
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
        from safetensors.torch import load_file

        state = load_file(folder / "open_clip_model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def create_vision_encoder(
    folder: Path, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Train the CLIP, write it to `folder`, and return its quality."""
    torch.manual_seed(11)
    model = build_clip()
    start = time.monotonic()
    lessons = ContrastiveBatches(model, tokenizer)
    for steps, peak, lesson in (
        (SINGLE_OBJECT_STEPS + WHOLE_SCENE_STEPS, FIRST_PEAK_LR, lessons.first_stage_pairs),
        (MIXED_SIZE_STEPS, MIXED_SIZE_PEAK_LR, lessons.mixed_size_pairs(100_000, small_every=2)),
        (
            MORE_MIXED_SIZE_STEPS,
            MIXED_SIZE_PEAK_LR,
            lessons.mixed_size_pairs(200_000, small_every=2),
        ),
        (MOSTLY_LARGE_STEPS, MIXED_SIZE_PEAK_LR, lessons.mixed_size_pairs(300_000, small_every=4)),
    ):
        train(model, steps, peak, lesson, log)
        model.half().float()  # as it is written
    seconds = time.monotonic() - start
    write_clip(model, CLIP_CONFIG, folder)
    model = build_clip(folder).eval()  # as it was written
    figures = {
        "retrieval_r1": measure_retrieval(model, tokenizer),
        **linear_probe(model),
        "seconds": seconds,
    }
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
    steps: int,
    peak_lr: float,
    encode_pairs: Callable[[int], tuple[Tensor, Tensor]],
    log: Callable[[str], None],
) -> None:
    """Minimise open_clip's contrastive loss of `features(step)`: images and their captions."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    loss_of = ClipLoss()
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * cosine_lr_scale(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = (encoded.float() for encoded in encode_pairs(step))
        loss = loss_of(image, text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 100 == 0:
            first = (image @ text.T).argmax(1) == torch.arange(len(image))
            log(
                f"vision encoder step {step}/{steps} loss {loss.item():.3f} "
                f"R@1 {first.float().mean():.2f} "
                f"{time.monotonic() - start:.0f} s"
            )


@dataclass
class ContrastiveBatches:
    """The images of each step: `first` at one size, then `both` image sizes."""

    model: open_clip.CLIP
    tokenizer: Tokenizer

    def first_stage_pairs(self, step: int) -> tuple[Tensor, Tensor]:
        """Show single objects, later whole scenes, at 56 pixels, and close-ups."""
        if step >= SINGLE_OBJECT_STEPS:
            return self._small_image_pairs(step)
        scenes, captions = single_object_scenes(step)
        near, near_captions = make_close_ups(step, 36)
        image = encode_single_objects(self.model, scenes), self._encode_images(near)
        return torch.cat(image), self._encode_captions(captions + near_captions)

    def mixed_size_pairs(
        self, first_step: int, small_every: int
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Show whole scenes, from number `begin` on, at 112 pixels, the last of `turns` at 56."""

        def encode_pairs(step: int) -> tuple[Tensor, Tensor]:
            if step % small_every == small_every - 1:
                return self._small_image_pairs(first_step + step)
            scenes, captions = whole_scenes(first_step + step, base_scenes=16)
            return encode_large_images(self.model, scenes), self._encode_captions(captions)

        return encode_pairs

    def _small_image_pairs(self, step: int) -> tuple[Tensor, Tensor]:
        scenes, captions = whole_scenes(step)
        near, near_captions = make_close_ups(step, 18)
        image = self._encode_images(scenes), self._encode_images(near)
        return torch.cat(image), self._encode_captions(captions + near_captions)

    def _encode_images(self, images: Sequence[RenderedScene | CloseUpImage]) -> Tensor:
        features: Tensor = self.model.encode_image(load_pixels(images), normalize=True)
        return features

    def _encode_captions(self, captions: list[str]) -> Tensor:
        ids = tokenize_captions(self.tokenizer, captions)
        return encode_text(self.model, ids, self.tokenizer.eos_token_id)


def cosine_lr_scale(step: int, steps: int, warmup: int = 60) -> float:
    """Give the share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 0.005


def distinct_scenes(count: int = 96) -> list[RenderedScene]:
    """Give new scenes whose captions all differ."""
    found: dict[str, RenderedScene] = {}
    index = 0
    while len(found) < count:
        one = make_scene("retrieval", 0, index)
        found.setdefault(scene_caption(one, "en"), one)
        index += 1
    return list(found.values())


@torch.no_grad()
def measure_retrieval(model: open_clip.CLIP, tokenizer: Tokenizer) -> float:
    """Measure R@1 among 96 distinct captions: the lowest of both directions and languages."""
    scenes = distinct_scenes()
    image = model.encode_image(load_pixels(scenes), normalize=True)
    worst = 1.0
    for language in LANGUAGES:
        ids = tokenize_captions(tokenizer, [scene_caption(s, language) for s in scenes])
        close = image @ model.encode_text(ids, normalize=True).T
        for near in (close, close.T):
            hits = near.argmax(1) == torch.arange(len(scenes))
            worst = min(worst, hits.float().mean().item())
    return worst


@torch.no_grad()
def patch_features(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """Return the patch features before the last block, `[images, patches, width]`."""
    outputs: dict[str, list[Tensor]] = model.visual.forward_intermediates(
        images, indices=[len(model.visual.transformer.resblocks) - 2], stop_early=True,
        output_fmt="NLC", intermediates_only=True,
    )  # fmt: skip
    return outputs["image_intermediates"][0]


def linear_probe(model: open_clip.CLIP, scene_count: int = 1500) -> dict[str, float]:
    """Measure a linear probe of colour and shape of the object at each patch.

    `probe_unseen_shape` asks the map, which never met one, for the shape in an unseen pair.
    """
    x, pairs = _object_features(
        model, [make_scene("probe", 0, index) for index in range(scene_count)]
    )
    unseen = [
        make_scene("probe", 0, index, has_unseen_pair=True) for index in range(scene_count // 3)
    ]
    x_unseen, pairs_unseen = _object_features(model, unseen)
    new = [at for at, (colour, shape) in enumerate(pairs_unseen) if UNSEEN_PAIRS[colour] == shape]
    cut = len(x) * 2 // 3
    figures = {}
    for at, name in enumerate(("colour", "shape")):
        values = sorted({pair[at] for pair in SEEN_PAIRS})
        y = torch.tensor([values.index(pair[at]) for pair in pairs])
        target = torch.nn.functional.one_hot(y[:cut], len(values)).double()
        ridge = 1e-2 * cut * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(x[:cut].T @ x[:cut] + ridge, x[:cut].T @ target)
        figures[f"probe_{name}"] = _hit_rate((x[cut:] @ weights).argmax(1) == y[cut:])
        y_new = torch.tensor([values.index(pairs_unseen[one][at]) for one in new])
        figures[f"probe_unseen_{name}"] = _hit_rate((x_unseen[new] @ weights).argmax(1) == y_new)
    return figures


def _object_features(
    model: open_clip.CLIP, scenes: Sequence[RenderedScene]
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return features at the objects' centres, `[objects, width + 1]`, and their pairs."""
    features, pairs = [], []
    for begin in range(0, len(scenes), 100):
        some = scenes[begin : begin + 100]
        for one, patches in zip(some, patch_features(model, load_pixels(some)), strict=True):
            for thing in one.objects:
                features.append(patches[int(thing.y // 28) * 4 + int(thing.x // 28)])
                pairs.append(thing.colour_shape)
    x = torch.nn.functional.layer_norm(torch.stack(features), (features[0].shape[-1],))
    return torch.cat([x, torch.ones(len(x), 1)], 1).double(), pairs


def _hit_rate(hits: Tensor) -> float:
    return round(hits.double().mean().item(), 4)
