"""What the miniature CLIP minimises at a step: captions against images, words against patches."""

from __future__ import annotations

from dataclasses import dataclass

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from vlbench.data.scene_world import IMAGE_SIDE, RenderedScene
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import (
    encode_images,
    encode_patches,
    encode_text,
    tokenize_captions,
)
from vlbench.miniatures.crowded_images import crowded_scenes, letter_scenes
from vlbench.miniatures.region_words import RegionWords, region_targets
from vlbench.miniatures.training_images import CloseUpImage, make_close_ups, whole_scenes


@dataclass(frozen=True)
class RegionBatch:
    """How many scenes of each kind a step with regions shows, and how large they are."""

    crowded: int
    letters: int
    whole: int  # each with its twins
    image_size: int  # pixels

    def make_scenes(self, step: int) -> list[RenderedScene]:
        """Make the scenes of step `step`."""
        whole = whole_scenes(step, self.whole)[0]
        return crowded_scenes(step, self.crowded) + letter_scenes(step, self.letters) + whole


# The steps of a round; an image size stands for captions of whole scenes at it. At 112 pixels a
# small object covers four patches and a letter one; at 56 a small object covers one, and letters
# are too small to be read. A large encoder adapts to a doubled resolution over millions of images;
# this one has minutes, so it sees both sizes from the beginning.
PRETRAINING_ROUND: tuple[RegionBatch | int, ...] = (
    RegionBatch(24, 0, 0, 112),
    56,
    RegionBatch(12, 8, 3, 112),
    112,
    RegionBatch(32, 0, 8, 56),
    56,
)
_CAPTIONED_SCENES = {56: 28, 112: 16}  # by image size, each with its twins
_CLOSE_UPS = 18  # of a step with captions at 56 pixels


@dataclass(frozen=True)
class PretrainingLosses:
    """The losses of the steps of a round, in turns."""

    model: open_clip.CLIP
    words: RegionWords
    tokenizer: Tokenizer

    def compute(self, step: int) -> Tensor:
        """Return the loss of step `step`: captions, or words of regions."""
        batch = PRETRAINING_ROUND[step % len(PRETRAINING_ROUND)]
        if isinstance(batch, RegionBatch):
            return self._name_regions(batch, step)
        return self._compare_captions(batch, step)

    def _name_regions(self, batch: RegionBatch, step: int) -> Tensor:
        scenes = batch.make_scenes(step)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_patches(self.model, scenes, batch.image_size)
        return self.words.compute_loss(features, region_targets(scenes, batch.image_size // 14))

    def _compare_captions(self, image_size: int, step: int) -> Tensor:
        """Return open_clip's contrastive loss of images and captions; small ones with close-ups."""
        scenes, captions = whole_scenes(step, _CAPTIONED_SCENES[image_size])
        images: list[RenderedScene | CloseUpImage] = [*scenes]
        if image_size < IMAGE_SIDE:
            near, near_captions = make_close_ups(step, _CLOSE_UPS)
            images, captions = [*images, *near], captions + near_captions
        ids = tokenize_captions(self.tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16):
            seen = encode_images(self.model, images, image_size)
            told = encode_text(self.model, ids, self.tokenizer.eos_token_id)
        loss: Tensor = ClipLoss()(seen.float(), told.float(), self.model.logit_scale.exp())
        return loss
