"""What the miniature CLIP minimises at a step: captions against images, words against patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from vlbench.data.scene_world import IMAGE_SIDE, RenderedScene
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.batch_encoding import (
    encode_large_images,
    encode_patches,
    encode_single_objects,
    encode_text,
    load_pixels,
    tokenize_captions,
)
from vlbench.miniatures.crowded_images import crowded_scenes, letter_scenes
from vlbench.miniatures.region_words import RegionWords, region_targets
from vlbench.miniatures.training_images import (
    CloseUpImage,
    make_close_ups,
    single_object_scenes,
    whole_scenes,
)

StepLoss = Callable[[int], Tensor]


@dataclass(frozen=True)
class RegionBatch:
    """How many scenes of each kind a step with regions shows, and how large they are."""

    crowded: int
    letters: int
    whole: int  # each with its twins
    image_size: int  # pixels

    def make_scenes(
        self, step: int, extents: Sequence[float] = (IMAGE_SIDE,)
    ) -> list[RenderedScene]:
        """Make the scenes of step `step`; `extents` are of the crowded ones, in turns.

        Of several, an image of fewer pixels than scenes are painted with has the largest alone.
        """
        whole = whole_scenes(step, self.whole)[0]
        seen = extents if self.image_size >= IMAGE_SIDE else (max(extents),)
        crowded = crowded_scenes(step, self.crowded, seen)
        return crowded + letter_scenes(step, self.letters) + whole


# The steps of a round. At 112 pixels a small object covers four patches and a letter one; at 56 a
# small object covers one, and letters are too small to be read.
REGION_ROUND = (
    RegionBatch(40, 0, 0, 112),
    RegionBatch(20, 10, 4, 112),
    RegionBatch(40, 0, 10, 56),
)


@dataclass(frozen=True)
class CaptionLosses:
    """The contrastive loss of open_clip, between images and their captions."""

    model: open_clip.CLIP
    tokenizer: Tokenizer

    def single_objects(self, step: int) -> Tensor:
        """Show one object per image, at 56 pixels, and close-ups."""
        scenes, captions = single_object_scenes(step)
        near, near_captions = make_close_ups(step, 36)
        with torch.autocast("cpu", torch.bfloat16):
            images = encode_single_objects(self.model, scenes), self._encode_images(near)
            return self._compare(torch.cat(images), captions + near_captions)

    def whole_scenes(self, step: int) -> Tensor:
        """Show whole scenes at 56 pixels, and close-ups."""
        scenes, captions = whole_scenes(step)
        near, near_captions = make_close_ups(step, 18)
        with torch.autocast("cpu", torch.bfloat16):
            images = self._encode_images(scenes), self._encode_images(near)
            return self._compare(torch.cat(images), captions + near_captions)

    def mixed_sizes(self, first_step: int, step: int, small_every: int) -> Tensor:
        """Show whole scenes from `first_step` on at 112 pixels, in one of so many steps at 56."""
        if step % small_every == small_every - 1:
            return self.whole_scenes(first_step + step)
        scenes, captions = whole_scenes(first_step + step, base_scenes=16)
        with torch.autocast("cpu", torch.bfloat16):
            return self._compare(encode_large_images(self.model, scenes), captions)

    def _encode_images(self, images: Sequence[RenderedScene | CloseUpImage]) -> Tensor:
        features: Tensor = self.model.encode_image(load_pixels(images), normalize=True)
        return features

    def _compare(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        ids = tokenize_captions(self.tokenizer, captions)
        texts = encode_text(self.model, ids, self.tokenizer.eos_token_id)
        with torch.autocast("cpu", enabled=False):
            loss: Tensor = ClipLoss()(images.float(), texts.float(), self.model.logit_scale.exp())
        return loss


@dataclass(frozen=True)
class RegionLosses:
    """The loss between patches and the words of what they show, in turns with captions."""

    model: open_clip.CLIP
    words: RegionWords
    captions: CaptionLosses
    extents: Sequence[float] = (IMAGE_SIDE,)  # of crowded scenes, see `RegionBatch.make_scenes`

    def mixed(self, first_step: int, step: int) -> Tensor:
        """Name the regions of a round of batches from `first_step` on, then compare captions."""
        turn = step % (len(REGION_ROUND) + 1)
        if turn == len(REGION_ROUND):
            return self.captions.mixed_sizes(first_step, step, small_every=3)
        batch = REGION_ROUND[turn]
        scenes = batch.make_scenes(first_step + step, self.extents)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode_patches(self.model, scenes, batch.image_size)
        targets = region_targets(scenes, batch.image_size // 14)
        return self.words.compute_loss(features, targets)
