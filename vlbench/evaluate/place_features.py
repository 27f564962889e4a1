"""What a model computes of pictures, at the places that a picture passes on its way to an answer.

`encoder` is what the vision encoder gives, `connector` the visual tokens: those that replace image
positions, or those that are injected, such as Flamingo's latents.

`language` is what the language model makes of them. At image positions these are the hidden states
before the middle decoder layer: text looks pictures up in the middle layers (Neo et al. 2024,
arXiv:2410.07149), and nothing ever reads the last states there. Where an image position holds no
visual token, and the text looks at injected ones from its own positions, it is the last state of
the position from which the answer is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlbench.compat.transformers_internals import decoder_layer_input
from vlbench.connector.levels import Levels, concat_channels, map_levels
from vlbench.core_sharing import share_cores
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import Sample
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.data.token_grid import TokenGrid
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.process_settings import avoid_cudnn_attention

SAMPLES_PER_BATCH = 64


class PlaceFeatures(NamedTuple):
    """Features of the pictures of some samples, one picture after the other, on the CPU."""

    encoder: Tensor
    """`[pictures, patches, vision_width]`, all blocks that the connector reads side by side; of a
    tiled picture the patches of its views, one view after the other"""
    connector: Tensor
    """`[pictures, visual tokens, width]`, all levels side by side; likewise"""
    language: Tensor
    """`[pictures, image positions, lm_width]`, else `[samples, 1, lm_width]` of the last positions;
    see `reads_answers`."""


PLACES = PlaceFeatures._fields


def reads_answers(vlm: LoadedVLM) -> bool:
    """Tell whether the features at `language` are those of samples, with the answer in them."""
    return not vlm.connector.replaces_image_tokens


def token_grids(vlm: LoadedVLM) -> dict[str, TokenGrid | None]:
    """Return how tokens lie over a picture at each place; None: they have no places in it.

    Pictures are not cut into tiles. Where the language model has no visual tokens at its image
    positions, its text looks at those behind the connector: the grid is theirs.
    """
    connector, patches = vlm.connector, vlm.model.vision.grid
    fills = connector.replaces_image_tokens
    given = connector.token_grid if fills else connector.latent_grid
    behind = TokenGrid.over_patches(given, patches) if given else None
    return {"encoder": TokenGrid(*patches), "connector": behind, "language": behind}


def have_equal_views(vlm: LoadedVLM, samples: Sequence[Sample]) -> bool:
    """Tell whether all pictures of samples have as many views and image positions.

    In their own aspect ratios they need the same rows and columns of patches.
    """
    layout = vlm.processor.view_layout
    if layout is None:
        return True
    images = [image for sample in samples for image in layout.tile_sample(sample).images]
    if layout.settings.tiling is None:
        return len({image.grid for image in images}) <= 1
    return len({(len(image.views), layout.count_positions(image)) for image in images}) <= 1


@torch.inference_mode()
def compute_place_features(
    vlm: LoadedVLM,
    samples: Sequence[Sample],
    should_stop: Callable[[], bool] = lambda: False,
) -> PlaceFeatures | None:
    """Return the features of all pictures of samples, each of which ends with a question.

    All pictures have as many views and image positions (`have_equal_views`). None if `should_stop`
    became true before the end. The model is not changed.
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
    features = model.extract_features(batch)
    # a connector may write into its features
    visual = model.connector(*model.connector_inputs(batch, map_levels(Tensor.clone, features)))
    middle, last = _hidden_states(model, batch, visual)
    picture_count = len(batch.list_view_bounds()) - 1
    own: slice = slice(None)
    if batch.patch_grids:  # of all pictures alike; what is behind their patches is padding
        own = slice(batch.patch_grids[0][0] * batch.patch_grids[0][1])
    encoder, connector = (
        concat_channels(levels)[:, own].unflatten(0, (picture_count, -1)).flatten(1, 2)
        for levels in (features, visual)
    )
    if not model.connector.replaces_image_tokens:
        return PlaceFeatures(encoder, connector, last[:, -1:])  # prompts are padded on the left
    at_images = middle[batch.input_ids == IMAGE_TOKEN_INDEX]
    return PlaceFeatures(encoder, connector, at_images.unflatten(0, (picture_count, -1)))


def _hidden_states(model: VLM, batch: PackedBatch, visual: Levels) -> tuple[Tensor, Tensor]:
    """Return the input of the middle decoder layer, and the last hidden states."""
    layers = model.language.model.layers
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(decoder_layer_input(args, kwargs))

    hook = layers[len(layers) // 2].register_forward_pre_hook(keep_input, with_kwargs=True)
    try:
        last = model.hidden_states(batch, visual)
    finally:
        hook.remove()
    return inputs[0], last
