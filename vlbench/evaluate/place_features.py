"""What a model computes of pictures, at the places that a picture passes on its way to an answer.

`encoder` is what the vision encoder gives, `connector` the visual tokens: those that replace image
positions, or those that are injected, such as Flamingo's latents. `language` is what the language
model makes of them, its last hidden states: at the image positions, where the text can look them
up; or, where an image position holds no visual token and the text looks at injected ones instead,
at the position from which the answer is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlbench.core_sharing import share_cores
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import Sample
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.process_settings import avoid_cudnn_attention

SAMPLES_PER_BATCH = 64


class PlaceFeatures(NamedTuple):
    """Features of the pictures of some samples, one picture after the other, on the CPU."""

    encoder: Tensor
    """`[pictures, patches, vision_width]`"""
    connector: Tensor
    """`[pictures, visual tokens, width]`"""
    language: Tensor
    """`[pictures, visual tokens, lm_width]` at the image positions, else `[samples, 1, lm_width]`
    of the last positions; see `reads_answers`."""


PLACES = PlaceFeatures._fields


def reads_answers(vlm: LoadedVLM) -> bool:
    """Tell whether the features at `language` are those of samples, with the answer in them."""
    return not vlm.connector.replaces_image_tokens


@torch.inference_mode()
def compute_place_features(
    vlm: LoadedVLM,
    samples: Sequence[Sample],
    should_stop: Callable[[], bool] = lambda: False,
) -> PlaceFeatures | None:
    """Return the features of all pictures of samples, each of which ends with a question.

    None if `should_stop` became true before the end. The model is not changed.
    """
    model = in_eval_mode(vlm.model)
    parts: list[PlaceFeatures] = []
    with share_cores(vlm.device), avoid_cudnn_attention(vlm.device.type):
        for start in range(0, len(samples), SAMPLES_PER_BATCH):
            if should_stop():
                return None
            batch = vlm.processor.collate_prompts(samples[start : start + SAMPLES_PER_BATCH])
            features = _batch_features(model, batch.to(vlm.device))
            parts.append(PlaceFeatures(*(one.float().cpu() for one in features)))
    return PlaceFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _batch_features(model: VLM, batch: PackedBatch) -> PlaceFeatures:
    encoder = model.extract_features(batch)
    connector = model.connector(encoder.clone())  # a connector may write into its features
    hidden = model.hidden_states(batch, connector)
    if not model.connector.replaces_image_tokens:
        return PlaceFeatures(encoder, connector, hidden[:, -1:])  # prompts are padded on the left
    at_images = hidden[batch.input_ids == IMAGE_TOKEN_INDEX]
    return PlaceFeatures(encoder, connector, at_images.unflatten(0, connector.shape[:2]))
