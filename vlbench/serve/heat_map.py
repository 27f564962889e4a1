"""Where an answer looks: the relevance of each patch of a picture, and where the patches lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlbench.core_sharing import share_cores
from vlbench.data.packing import collate
from vlbench.errors import UserError
from vlbench.evaluate.attention_diagnostics import encode_answered, measure_relevance
from vlbench.evaluate.view_map import find_map_box, map_image
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.processor import ChatMessage, sample_from_messages


class HeatMap(NamedTuple):
    """How an answer depends on the patches of a picture."""

    rows: list[list[float]] | None
    """Shares of relevance, the rows of the grid of patches; None where it does not depend on it."""
    box: tuple[float, float, float, float]
    """Where the grid lies over the picture, see `find_map_box`; its tiles have one grid."""


def compute_heat_map(
    vlm: LoadedVLM, messages: list[ChatMessage], answer: str, image: int
) -> HeatMap:
    """Return how `answer` to a conversation depends on its picture number `image`, from 0.

    It takes a forward and a backward pass; the model is not changed, and other threads may use it.
    Raises a UserError where there is no such picture, or the answer is no text for the model.
    """
    sample = sample_from_messages(messages)
    if not 0 <= image < len(sample.images):
        count = f"{len(sample.images)} picture{'' if len(sample.images) == 1 else 's'}"
        raise UserError(f"image={image}: the conversation has {count}, counted from 0")
    processor = vlm.processor
    encoded = encode_answered(processor, sample, answer)
    if encoded is None:
        raise UserError("this answer cannot be given to the model as its own")
    batch = collate([[encoded]], processor.transform.load_pixels)
    devices = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices), share_cores(vlm.device):
        relevance = measure_relevance(in_eval_mode(vlm.model), batch.to(vlm.device), image)
    shown, grid = encoded.sample.images[image], vlm.model.shapes.grid
    drawn = map_image(processor.transform, shown, relevance.patch_relevance, grid)
    rows = drawn.tolist() if drawn.isfinite().all() else None
    return HeatMap(rows, find_map_box(processor.transform, shown))
