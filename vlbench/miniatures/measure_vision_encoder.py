"""Measure the vision miniatures: retrieval by captions, and linear probes of patch features.

A probe is a linear map, fitted on the features of some scenes and asked about others: what it
cannot tell, a connector can hardly learn from the encoder as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm

from vlbench.data.scene_lattice import make_lattice_scene
from vlbench.data.scene_letters import make_letter_scene
from vlbench.data.scene_text import LANGUAGES, scene_caption
from vlbench.data.scene_world import (
    CROWD_EXTENT,
    IMAGE_SIDE,
    UNSEEN_PAIRS,
    RenderedScene,
    SceneObject,
    make_scene,
)
from vlbench.data.token_grid import TokenGrid
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import encode_patches, load_pixels, tokenize_captions

PatchEncoder = Callable[[Sequence[RenderedScene], int], Tensor]
"""Encode scenes at an image size (pixels) into features `[scenes, patches, width]`."""
_PATCH_SIDE = 14  # pixels
_PROBE_SCENES = {"gist": 900, "crowd": 450, "fine": 900, "glyphs": 1200}  # of each, by default


def measure_vision_encoder(model: open_clip.CLIP, tokenizer: Tokenizer) -> dict[str, object]:
    """Measure everything that the manifest records of the miniature CLIP."""
    return {
        "retrieval_r1": measure_retrieval(model, tokenizer),
        "probes": probe_families(partial(encode_patches, model)),
    }


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


def probe_families(encode: PatchEncoder, share: float = 1.0) -> dict[str, dict[str, float]]:
    """Probe the attributes of objects in each family at the image size of the chat stage.

    The gist and crowd pictures are probed at 56 pixels as well. `share` is that of the scenes
    of the full measurement. Each figure is of `probe_attributes`.
    """
    gist, crowd, fine, glyphs = (
        [make(index) for index in range(round(_PROBE_SCENES[name] * share))]
        for name, make in _SCENES_TO_PROBE.items()
    )
    unseen = [make_scene("probe", 0, i, has_unseen_pair=True) for i in range(len(gist) // 3)]
    figures = {f"gist_{side}": probe_attributes(encode, gist, side, unseen) for side in (56, 112)}
    figures |= {f"crowd_{side}": probe_attributes(encode, crowd, side) for side in (56, 112)}
    figures["fine_112"] = probe_attributes(encode, fine, 112)
    figures["glyphs_112"] = probe_attributes(encode, glyphs, 112)
    return figures


_SCENES_TO_PROBE: dict[str, Callable[[int], RenderedScene]] = {
    "gist": lambda index: make_scene("probe", 0, index),
    "crowd": lambda index: make_lattice_scene("probe", 0, index, extent=CROWD_EXTENT),
    "fine": lambda index: make_lattice_scene("probe", 1, index, has_dot=True),
    "glyphs": lambda index: make_letter_scene("probe", 0, index),
}
_ATTRIBUTES: dict[str, Callable[[SceneObject], object]] = {
    "colour": lambda thing: thing.colour,
    "shape": lambda thing: thing.shape,
    "dot": lambda thing: thing.has_dot,
}


def probe_attributes(
    encode: PatchEncoder,
    scenes: Sequence[RenderedScene],
    image_size: int,
    unseen: Sequence[RenderedScene] = (),
) -> dict[str, float]:
    """Return the accuracy of a linear probe of each attribute, at the patch of an object's centre.

    The probe is fitted on two thirds of the scenes and asked about the others. `unseen_colour` and
    `unseen_shape` ask it, which never met one, about the objects of unseen pairs in `unseen`. For
    the dot, of which most objects have none, the accuracy is that of finding the object of a
    picture that has it.
    """
    cut = len(scenes) * 2 // 3
    x, things = centre_features(encode, scenes[:cut], image_size)
    x_new, things_new = centre_features(encode, scenes[cut:], image_size)
    if unseen:
        x_unseen, all_unseen = centre_features(encode, unseen, image_size)
        kept = [at for at, t in enumerate(all_unseen) if UNSEEN_PAIRS[t.colour] == t.shape]
        x_unseen, things_unseen = x_unseen[kept], [all_unseen[at] for at in kept]
    figures = {}
    for name, value_of in _ATTRIBUTES.items():
        values = sorted({value_of(thing) for thing in things}, key=str)
        if len(values) < 2:
            continue
        weights = fit_probe(x, _as_classes(things, value_of, values), len(values))
        scores = x_new @ weights
        if name == "dot":
            figures[name] = _dotted_object_share(scores[:, 1] - scores[:, 0], scenes[cut:])
            continue
        figures[name] = _hit_rate(scores, _as_classes(things_new, value_of, values))
        if unseen:
            target = _as_classes(things_unseen, value_of, values)
            figures[f"unseen_{name}"] = _hit_rate(x_unseen @ weights, target)
    return figures


@torch.no_grad()
def centre_features(
    encode: PatchEncoder, scenes: Sequence[RenderedScene], image_size: int
) -> tuple[Tensor, list[SceneObject]]:
    """Return layer-normed features at the objects' centres, `[objects, width + 1]`, and these.

    The last column is one, for the bias of a linear map.
    """
    side, features = image_size // _PATCH_SIDE, []
    grid = TokenGrid(side, side)
    for begin in range(0, len(scenes), 100):
        some = scenes[begin : begin + 100]
        for scene, patches in zip(some, encode(some, image_size), strict=True):
            for thing in scene.objects:
                patch, _ = grid.locate(thing.x / IMAGE_SIDE, thing.y / IMAGE_SIDE)
                features.append(patches[patch])
    x = layer_norm(torch.stack(features), (features[0].shape[-1],))
    things = [thing for scene in scenes for thing in scene.objects]
    return torch.cat([x, torch.ones(len(x), 1)], 1), things


def fit_probe(x: Tensor, target: Tensor, classes: int) -> Tensor:
    """Fit a softmax regression by L-BFGS, with a slight penalty; return `[width, classes]`."""
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=150, line_search_fn="strong_wolfe")

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weights, target) + 1e-5 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(compute_loss)
    return weights.detach()


def _as_classes(
    things: Sequence[SceneObject],
    value_of: Callable[[SceneObject], object],
    values: Sequence[object],
) -> Tensor:
    return torch.tensor([values.index(value_of(thing)) for thing in things])


def _dotted_object_share(scores: Tensor, scenes: Sequence[RenderedScene]) -> float:
    """Return the share of scenes in which the highest score is that of the object with the dot."""
    by_scene = scores.split([len(scene.objects) for scene in scenes])
    found = [
        scene.objects[int(of_scene.argmax())].has_dot
        for scene, of_scene in zip(scenes, by_scene, strict=True)
    ]
    return round(sum(found) / len(found), 4)


def _hit_rate(scores: Tensor, target: Tensor) -> float:
    return round((scores.argmax(1) == target).double().mean().item(), 4)
