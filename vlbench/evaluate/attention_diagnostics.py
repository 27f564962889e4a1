"""Which patches and visual tokens an answer depends on, and the connector's attention.

Relevance is gradient x input (Shrikumar et al. 2016, arXiv:1605.01713) of the log-probability of
the answer that the model gave: its dependence, to first order, on the features of a patch. A patch
gets the L2 norm of these products over the width, as in Atanasova et al. 2020 (arXiv:2009.13295),
since in their sum positive and negative ones cancel. A connector needs only gradients for it, so
that all connectors are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlbench.connector.base import zero_like_loss
from vlbench.connector.levels import as_levels, concat_channels, first_level, map_levels
from vlbench.data.packing import PackedBatch, collate
from vlbench.data.sample import ChatTurn, LazyImage, Sample
from vlbench.data.sample_encoding import IGNORE_INDEX, EncodedSample
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.view_map import find_map_box, map_image
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.processor import Processor

SIGNIFICANT_DIGITS = 5  # of every number in diagnostics.json


@dataclass(frozen=True)
class AnswerRelevance:
    """How one answer depends on one image of its question; shares sum to 1."""

    patch_relevance: Tensor
    """`[views, patches]`, shares of relevance; NaN where the answer does not depend on it."""
    token_relevance: Tensor
    """`[visual tokens]`, the same for the connector's output; of several views their sum."""
    connector_attention: Tensor | None
    """`[views, visual tokens, patches]`, as the connector's `patch_attention` returns it."""


def diagnose_answers(
    vlm: LoadedVLM, answered_questions: Sequence[tuple[EvalQuestion, str]]
) -> dict[str, Any]:
    """Return how the model's answers depend on the first image of each question.

    `maps` has for every question the relevance of each patch, as rows of `grid`, None where the
    answer does not depend on the image, and the `box` that they cover (`find_map_box`). `tokens`
    are the mean shares of the visual tokens, of a tiled image those of all its views together, and
    `effective` is how many are used: the exponential of the shares' entropy. `attention` has the
    mean entropy of a visual token's attention in nats, that of uniform attention, and for every
    question the mean over tokens; None for a connector without attention. Questions without an
    image are left out; without any question the result is empty. The model is not changed.
    """
    diagnosed: list[tuple[EvalQuestion, str, AnswerRelevance]] = []
    first_images: list[LazyImage] = []
    model = in_eval_mode(vlm.model)
    with torch.random.fork_rng([vlm.device] if vlm.device.type == "cuda" else []):
        for question, answer in answered_questions:
            encoded = encode_answered(vlm.processor, question.sample, answer)
            if encoded is not None:
                batch = collate([[encoded]], vlm.processor.transform.load_pixels)
                relevance = measure_relevance(model, batch.to(vlm.device))
                diagnosed.append((question, answer, relevance))
                first_images.append(encoded.sample.images[0])
    if not diagnosed:
        return {}
    relevances = [relevance for _, _, relevance in diagnosed]
    finite = [one.token_relevance for one in relevances if one.token_relevance.isfinite().all()]
    token_shares = torch.stack(finite).mean(0) if finite else None
    transform = vlm.processor.transform
    draw = partial(map_image, transform, grid=vlm.model.shapes.grid)
    effective = None if token_shares is None else torch.special.entr(token_shares).sum().exp()
    return {
        "maps": [
            {
                "id": question.sample.id,
                "question": question.question_text,
                "answer": answer,
                "truth": question.answer,
                "grid": list(drawn.shape),
                "box": _round_numbers(torch.tensor(find_map_box(transform, image)).double()),
                "relevance": _round_numbers(drawn) if drawn.isfinite().all() else None,
            }
            for (question, answer, relevance), image in zip(diagnosed, first_images, strict=True)
            for drawn in [draw(image, relevance.patch_relevance)]
        ],
        "tokens": None if token_shares is None else _round_numbers(token_shares),
        "effective": None if effective is None else _round_numbers(effective),
        "attention": _summarize_attention(
            [relevance.connector_attention for relevance in relevances],
            first_images,
            draw,
        ),
    }


def measure_relevance(vlm: VLM, batch: PackedBatch, image: int = 0) -> AnswerRelevance:
    """Return how the labels of a batch of one sample with images depend on one of the images.

    `image` is its index. No parameter gets a gradient.
    """
    assert batch.labels is not None
    with torch.no_grad():
        features = vlm.extract_features(batch)
        inputs = vlm.connector_inputs(batch, map_levels(Tensor.clone, features))
        attention = vlm.connector.patch_attention(*inputs)
    with torch.enable_grad():
        features = map_levels(lambda level: level.detach().requires_grad_(), features)
        # clone, as a connector may write into its features; zero loss, as it may not use them all
        zero = zero_like_loss(features)
        inputs = vlm.connector_inputs(batch, map_levels(Tensor.clone, features))
        visual = map_levels(lambda level: level + zero, vlm.connector(*inputs))
        hidden = vlm.hidden_states(batch, visual)
        loss = vlm.language_loss(hidden, batch.labels) + zero_like_loss(visual)
        feature_levels, visual_levels = as_levels(features), as_levels(visual)
        grads = torch.autograd.grad(loss, (*feature_levels, *visual_levels))
    feature_grads, visual_grads = grads[: len(feature_levels)], grads[len(feature_levels) :]
    if attention is not None:
        shape = (*first_level(visual).shape[:2], vlm.shapes.patches)
        _check_attention(vlm, attention, shape)
    first_patch = int(vlm.connector.class_token)  # after the class token
    bounds = batch.list_view_bounds()
    views = slice(bounds[image], bounds[image + 1])
    token_relevance = _relevance_shares(
        concat_channels(visual_levels)[views], concat_channels(visual_grads)[views]
    )
    return AnswerRelevance(
        patch_relevance=_relevance_shares(
            concat_channels(feature_levels)[views, first_patch:],
            concat_channels(feature_grads)[views, first_patch:],
        ),
        token_relevance=token_relevance.sum(0),
        connector_attention=None if attention is None else attention[views].cpu().double(),
    )


def _check_attention(vlm: VLM, attention: Tensor, expected_shape: tuple[int, ...]) -> None:
    if attention.shape != expected_shape:
        raise UserError(
            f"connector {type(vlm.connector).__name__}: patch_attention gives "
            f"{list(attention.shape)}; needed are {list(expected_shape)}: "
            "images, visual tokens, patches"
        )


def encode_answered(processor: Processor, sample: Sample, answer: str) -> EncodedSample | None:
    """Return a conversation and its answer, which alone has labels; None without an image.

    None too for an answer that is no valid text, such as an image placeholder. Its images are as
    they are laid out: of a tiled model `TiledImage`s.
    """
    if not sample.images:
        return None
    encoder = replace(processor.sample_encoder(), max_length=processor.max_positions)
    answered = replace(sample, turns=(*sample.turns, ChatTurn("assistant", answer)))
    try:
        encoded = encoder.encode(answered)
    except BadSample:
        return None
    return replace(encoded, labels=_keep_last_answer(encoded.labels))


def _keep_last_answer(labels: list[int]) -> list[int]:
    """Ignore all labels but those of the last answer, which are contiguous."""
    last = max(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
    start = max((t for t in range(last) if labels[t] == IGNORE_INDEX), default=-1) + 1
    return [IGNORE_INDEX] * start + labels[start:]


def _relevance_shares(values: Tensor, gradients: Tensor) -> Tensor:
    """Return the shares `[...]` of vectors `[..., width]`; NaN where all gradients are 0."""
    values, gradients = values.detach().cpu(), gradients.cpu()  # mps has no float64
    norms = (values.double() * gradients.double()).norm(dim=-1)
    shares: Tensor = norms / norms.sum()
    return shares


def _summarize_attention(
    attention_maps: Sequence[Tensor | None],
    images: Sequence[LazyImage],
    draw: Callable[[LazyImage, Tensor], Tensor],
) -> dict[str, Any] | None:
    """Return the `attention` of `diagnose_answers`; None if any map is missing or not finite.

    `draw` makes a map over an image, of which `images` has that of each map.
    """
    finite = [one for one in attention_maps if one is not None and one.isfinite().all()]
    if len(finite) < len(attention_maps):
        return None
    tokens = torch.cat([attention.flatten(0, 1) for attention in finite])
    return {
        "entropy": _round_numbers(torch.special.entr(tokens).sum(-1).mean()),
        "uniform": _round_numbers(torch.tensor(tokens.shape[-1]).double().log()),
        "maps": [
            _round_numbers(draw(image, attention.mean(1) / len(attention)))
            for image, attention in zip(images, finite, strict=True)
        ],
    }


def _round_numbers(values: Tensor) -> Any:
    """Return a tensor as nested lists of numbers of SIGNIFICANT_DIGITS digits."""
    if values.dim():
        return [_round_numbers(value) for value in values]
    return float(f"{float(values):.{SIGNIFICANT_DIGITS}g}")
