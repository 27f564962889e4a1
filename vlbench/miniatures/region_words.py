"""Dense supervision of the miniature CLIP: patch features against the words of what they show.

Contrastive pretraining on captions of whole images takes millions of images until each patch says
what is in it. Region-text pretraining (RegionCLIP, GLIP) names regions instead: here each object of
a rendered scene is a region, and its words (a colour, a shape or letter, a dot) are known. The maps
from features to words are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from vlbench.data.scene_painting import LETTERS
from vlbench.data.scene_world import COLOURS, IMAGE_SIDE, SHAPES, RenderedScene, SceneObject

REGION_WORDS = {"colour": tuple(COLOURS), "shape": (*SHAPES, *LETTERS), "dot": ("plain", "dotted")}
"""Attributes of an object, and the words of each."""
NOTHING, NOT_ASKED = 0, -100  # targets of a patch without an object; of one between the two
COVERED_RADII = 0.7  # a patch shows an object whose centre is at most so many radii away
_NOTHING_WEIGHT = 0.2  # most patches are empty: without it they would outweigh the words


class RegionWords(nn.Module):
    """A linear map for each attribute, from patch features to nothing or one of its words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {name: nn.Linear(width, 1 + len(words)) for name, words in REGION_WORDS.items()}
        )

    def compute_loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, the mean over attributes.

        `features` are `[images, patches, width]`, `targets` `[images, patches, attributes]`.
        """
        features = layer_norm(features.float(), features.shape[-1:]).flatten(0, 1)
        losses = []
        for target, words in zip(targets.flatten(0, 1).T, self.maps.values(), strict=True):
            scores = words(features)
            weight = torch.ones(scores.shape[1])
            weight[NOTHING] = _NOTHING_WEIGHT
            losses.append(cross_entropy(scores, target, weight, ignore_index=NOT_ASKED))
        return torch.stack(losses).mean()


def region_targets(scenes: Sequence[RenderedScene], grid_size: int) -> Tensor:
    """Return the words of the object that each patch shows, `[scenes, patches, attributes]`."""
    return torch.stack([_scene_targets(one, grid_size) for one in scenes])


def _scene_targets(scene: RenderedScene, grid_size: int) -> Tensor:
    side = IMAGE_SIDE / grid_size
    middle = (torch.arange(grid_size) + 0.5) * side
    x, y, radius = torch.tensor([(t.x, t.y, t.radius) for t in scene.objects]).T[..., None]
    across = ((middle - x).abs() - side / 2).clamp(min=0)  # [objects, columns]
    down = ((middle - y).abs() - side / 2).clamp(min=0)  # [objects, rows]
    away = (down[:, :, None] ** 2 + across[:, None] ** 2).sqrt().flatten(1) / radius
    nearest, which = away.min(0)
    words = torch.tensor([_word_targets(thing) for thing in scene.objects])
    targets = words[which]
    targets[nearest >= COVERED_RADII] = NOT_ASKED
    targets[nearest >= 1] = NOTHING
    return targets


def _word_targets(thing: SceneObject) -> list[int]:
    told = thing.colour, thing.shape, "dotted" if thing.has_dot else "plain"
    return [
        words.index(word) + 1 if word else NOT_ASKED
        for word, words in zip(told, REGION_WORDS.values(), strict=True)
    ]
