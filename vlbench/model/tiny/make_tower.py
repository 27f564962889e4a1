"""Train the miniature tower: an open_clip CLIP, contrastively, on rendered scenes and captions."""

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

from vlbench.data.scene_text import LANGUAGES, caption
from vlbench.data.scene_world import SEEN_PAIRS, UNSEEN, Scene, scene
from vlbench.data.tokenizer import Tokenizer
from vlbench.model.tiny.encode import (
    CONTEXT,
    encode_alone,
    encode_large,
    encode_text,
    pixels,
    text_ids,
)
from vlbench.model.tiny.make_tokenizer import PIECES
from vlbench.model.tiny.pictures import CloseUp, close, single, whole

ALONE, WHOLE, RATE = 400, 1000, 1.2e-3  # steps with one object a picture, then with whole scenes
BOTH, AGAIN, LARGE = 500, 1000, 900  # steps with both image sizes, again, then mostly the larger
RATE_BOTH = 8e-4  # of these
CONFIG = {
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
        "context_length": CONTEXT,
        "vocab_size": PIECES,
        "width": 128,
        "heads": 4,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": 2,
        "pad_id": 0,
    },
}


def build(folder: Path | None = None) -> open_clip.CLIP:
    """Build the tower, with random weights or those of `folder`."""
    model = open_clip.CLIP(**CONFIG)  # type: ignore[arg-type]
    if folder is not None:
        from safetensors.torch import load_file

        state = load_file(folder / "open_clip_model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def make(
    folder: Path, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Train the tower, write it to `folder`, and give its quality."""
    torch.manual_seed(11)
    model = build()
    start = time.monotonic()
    lessons = Lessons(model, tokenizer)
    for steps, peak, lesson in (
        (ALONE + WHOLE, RATE, lessons.first),
        (BOTH, RATE_BOTH, lessons.both(100_000, turns=2)),
        (AGAIN, RATE_BOTH, lessons.both(200_000, turns=2)),
        (LARGE, RATE_BOTH, lessons.both(300_000, turns=4)),
    ):
        train(model, steps, peak, lesson, log)
        model.half().float()  # as it is written
    seconds = time.monotonic() - start
    write(model, CONFIG, folder)
    model = build(folder).eval()  # as it was written
    figures = {"retrieval_r1": retrieval(model, tokenizer), **probe(model), "seconds": seconds}
    log(f"tower {figures}")
    return figures


def write(model: open_clip.CLIP, config: dict[str, Any], folder: Path) -> None:
    """Write a model of open_clip, whose configuration is `config`, into `folder` in 16 bits."""
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
    peak: float,
    features: Callable[[int], tuple[Tensor, Tensor]],
    log: Callable[[str], None],
) -> None:
    """Minimise open_clip's contrastive loss of `features(step)`: images and their captions."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    loss_of = ClipLoss()
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = (encoded.float() for encoded in features(step))
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
                f"tower step {step}/{steps} loss {loss.item():.3f} R@1 {first.float().mean():.2f} "
                f"{time.monotonic() - start:.0f} s"
            )


@dataclass
class Lessons:
    """What the tower is shown at a step: `first`, then `both` image sizes."""

    model: open_clip.CLIP
    tokenizer: Tokenizer

    def first(self, step: int) -> tuple[Tensor, Tensor]:
        """Show single objects, later whole scenes, at 56 pixels, and close-ups."""
        if step >= ALONE:
            return self._small(step)
        scenes, captions = single(step)
        near, near_captions = close(step, 36)
        image = encode_alone(self.model, scenes), self._encode(near)
        return torch.cat(image), self._text(captions + near_captions)

    def both(self, begin: int, turns: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Show whole scenes, from number `begin` on, at 112 pixels, the last of `turns` at 56."""

        def show(step: int) -> tuple[Tensor, Tensor]:
            if step % turns == turns - 1:
                return self._small(begin + step)
            scenes, captions = whole(begin + step, bases=16)
            return encode_large(self.model, scenes), self._text(captions)

        return show

    def _small(self, step: int) -> tuple[Tensor, Tensor]:
        scenes, captions = whole(step)
        near, near_captions = close(step, 18)
        image = self._encode(scenes), self._encode(near)
        return torch.cat(image), self._text(captions + near_captions)

    def _encode(self, pictures: Sequence[Scene | CloseUp]) -> Tensor:
        return self.model.encode_image(pixels(pictures), normalize=True)

    def _text(self, captions: list[str]) -> Tensor:
        ids = text_ids(self.tokenizer, captions)
        return encode_text(self.model, ids, self.tokenizer.eos)


def cosine(step: int, steps: int, warmup: int = 60) -> float:
    """Give the share of the learning rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) + 0.005


def distinct(count: int = 96) -> list[Scene]:
    """Give new scenes whose captions all differ."""
    found: dict[str, Scene] = {}
    index = 0
    while len(found) < count:
        one = scene("retrieval", 0, index)
        found.setdefault(caption(one, "en"), one)
        index += 1
    return list(found.values())


@torch.no_grad()
def retrieval(model: open_clip.CLIP, tokenizer: Tokenizer) -> float:
    """Measure R@1 among 96 distinct captions: the worst of both ways and both languages."""
    scenes = distinct()
    image = model.encode_image(pixels(scenes), normalize=True)
    worst = 1.0
    for language in LANGUAGES:
        ids = text_ids(tokenizer, [caption(s, language) for s in scenes])
        close = image @ model.encode_text(ids, normalize=True).T
        for near in (close, close.T):
            hits = near.argmax(1) == torch.arange(len(scenes))
            worst = min(worst, hits.float().mean().item())
    return worst


@torch.no_grad()
def patch_features(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """Give the patch features before the last block, [images, patches, width]."""
    found = model.visual.forward_intermediates(
        images, indices=[len(model.visual.transformer.resblocks) - 2], stop_early=True,
        output_fmt="NLC", intermediates_only=True,
    )  # fmt: skip
    return found["image_intermediates"][0]


def probe(model: open_clip.CLIP, scenes: int = 1500) -> dict[str, float]:
    """Measure how well a linear map reads colour and shape of the object at each patch.

    `probe_unseen_shape` asks the map, which never met one, for the shape in an unseen pair.
    """
    x, pairs = _objects(model, [scene("probe", 0, index) for index in range(scenes)])
    unseen = [scene("probe", 0, index, unseen=True) for index in range(scenes // 3)]
    x_unseen, pairs_unseen = _objects(model, unseen)
    new = [at for at, (colour, shape) in enumerate(pairs_unseen) if UNSEEN[colour] == shape]
    cut = len(x) * 2 // 3
    figures = {}
    for at, name in enumerate(("colour", "shape")):
        values = sorted({pair[at] for pair in SEEN_PAIRS})
        y = torch.tensor([values.index(pair[at]) for pair in pairs])
        target = torch.nn.functional.one_hot(y[:cut], len(values)).double()
        ridge = 1e-2 * cut * torch.eye(x.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(x[:cut].T @ x[:cut] + ridge, x[:cut].T @ target)
        figures[f"probe_{name}"] = _share((x[cut:] @ weights).argmax(1) == y[cut:])
        y_new = torch.tensor([values.index(pairs_unseen[one][at]) for one in new])
        figures[f"probe_unseen_{name}"] = _share((x_unseen[new] @ weights).argmax(1) == y_new)
    return figures


def _objects(
    model: open_clip.CLIP, scenes: Sequence[Scene]
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Give the features at the objects' centres, [objects, width + 1], and their pairs."""
    features, pairs = [], []
    for begin in range(0, len(scenes), 100):
        some = scenes[begin : begin + 100]
        for one, patches in zip(some, patch_features(model, pixels(some)), strict=True):
            for thing in one.things:
                features.append(patches[int(thing.y // 28) * 4 + int(thing.x // 28)])
                pairs.append(thing.pair)
    x = torch.nn.functional.layer_norm(torch.stack(features), (features[0].shape[-1],))
    return torch.cat([x, torch.ones(len(x), 1)], 1).double(), pairs


def _share(hits: Tensor) -> float:
    return round(hits.double().mean().item(), 4)
