"""Where a trained model looks: the relevance of patches and visual tokens, and attention.

Relevance is gradient x input (Shrikumar et al. 2016, arXiv:1605.01713) of the log-probability of
the answer that the model gave: what the answer owes, to first order, to the features of a patch. A
patch gets the L2 norm of these products over the width, as in Atanasova et al. 2020
(arXiv:2009.13295), since in their sum those of both signs cancel. It asks nothing of a connector
but that it learns by gradients, so that all connectors are measured alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlbench.connector.base import zero_like_loss
from vlbench.data.packing import PackedBatch, collate
from vlbench.data.sample import ChatTurn
from vlbench.data.sample_encoding import IGNORE_INDEX, SampleEncoder
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.vlm import VLM

SIGNIFICANT_DIGITS = 5  # of every number that is written


@dataclass(frozen=True)
class AnswerRelevance:
    """What one answer owes to the first picture of its question; shares sum to 1."""

    patch_relevance: Tensor
    """`[patches]`, shares of relevance; NaN where the answer does not depend on the picture."""
    token_relevance: Tensor
    """`[visual tokens]`, the same for what the connector made of the picture."""
    connector_attention: Tensor | None
    """`[visual tokens, patches]`, what the connector says of its own attention."""


def diagnose_answers(
    vlm: VLM, answered_questions: Sequence[tuple[EvalQuestion, str]]
) -> dict[str, Any]:
    """Return what the model's answers to questions with pictures owe to the first picture of each.

    `maps` has for every question the relevance of each patch, in the rows of `grid`, None where
    the answer does not depend on the picture. `tokens` are the mean shares of the visual tokens,
    `effective` is how many are used: the exponential of the shares' entropy. `attention` has the
    mean entropy of a visual token's attention in nats, that of a token that looks everywhere, and
    for every question the mean over tokens; None for a connector that does not attend. Without any
    picture the result is empty. The model stays as it was.
    """
    found: list[tuple[EvalQuestion, str, AnswerRelevance]] = []
    vlm = in_eval_mode(vlm)
    with torch.random.fork_rng([vlm.device] if vlm.device.type == "cuda" else []):
        for question, answer in answered_questions:
            batch = _answered_batch(vlm, question, answer)
            if batch is not None:
                found.append((question, answer, measure_relevance(vlm, batch)))
    if not found:
        return {}
    tokens = [one.token_relevance for _, _, one in found if one.token_relevance.isfinite().all()]
    used = torch.stack(tokens).mean(0) if tokens else None
    return {
        "maps": [
            {
                "id": question.sample.id,
                "question": question.question_text,
                "answer": answer,
                "truth": question.answer,
                "grid": list(vlm.shapes.grid),
                "relevance": _patch_grid(one.patch_relevance, vlm.shapes.grid),
            }
            for question, answer, one in found
        ],
        "tokens": None if used is None else _round_numbers(used),
        "effective": None if used is None else _round_numbers(torch.special.entr(used).sum().exp()),
        "attention": _summarize_attention(
            [one.connector_attention for _, _, one in found], vlm.shapes.grid
        ),
    }


def measure_relevance(vlm: VLM, batch: PackedBatch) -> AnswerRelevance:
    """Return what the labels of `batch`, which is one sample with pictures, owe to the first one.

    No parameter gets a gradient.
    """
    assert batch.labels is not None
    with torch.no_grad():
        features = vlm.features(batch)
        attention = vlm.connector.patch_attention(features.clone())
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        # copies, as a connector may write into its features; zeros, as it may leave them out
        visual = vlm.connector(features.clone()) + zero_like_loss(features)
        loss = vlm.loss(vlm.hidden_states(batch, visual), batch.labels) + zero_like_loss(visual)
        slopes = torch.autograd.grad(loss, (features, visual))
    if attention is not None:
        _check_attention(vlm, attention, (*visual.shape[:2], vlm.shapes.patches))
    first = int(vlm.connector.class_token)
    return AnswerRelevance(
        patch_relevance=_relevance_shares(features[0, first:], slopes[0][0, first:]),
        token_relevance=_relevance_shares(visual[0], slopes[1][0]),
        connector_attention=None if attention is None else attention[0].double().cpu(),
    )


def _check_attention(vlm: VLM, attention: Tensor, expected_shape: tuple[int, ...]) -> None:
    if attention.shape != expected_shape:
        raise UserError(
            f"connector {type(vlm.connector).__name__}: patch_attention gives "
            f"{list(attention.shape)}; needed are {list(expected_shape)}: "
            "images, visual tokens, patches"
        )


def _answered_batch(vlm: VLM, question: EvalQuestion, answer: str) -> PackedBatch | None:
    """Return a question with the answer to it, None if there is no picture."""
    sample = question.sample
    if not sample.images:
        return None
    encoder = SampleEncoder(
        vlm.tokenizer,
        vlm.template,
        vlm.connector.tokens_per_image,
        vlm.language.config.max_position_embeddings,
    )
    answered = replace(sample, turns=(*sample.turns, ChatTurn("assistant", answer)))
    try:
        encoded = encoder.encode(answered)
    except BadSample:  # a model may say what cannot be learned, such as the text of a place
        return None
    encoded = replace(encoded, labels=_keep_last_answer(encoded.labels))
    return collate([[encoded]], vlm.transform.load_pixels).to(vlm.device)


def _keep_last_answer(labels: list[int]) -> list[int]:
    """Keep the labels of the last answer, which are one run; earlier ones are the question's."""
    end = max(t for t, label in enumerate(labels) if label != IGNORE_INDEX)
    start = max((t for t in range(end) if labels[t] == IGNORE_INDEX), default=-1) + 1
    return [IGNORE_INDEX] * start + labels[start:]


def _relevance_shares(values: Tensor, gradients: Tensor) -> Tensor:
    """Return the shares `[number]` of vectors `[number, width]`; NaN where no slope is."""
    sizes = (values.detach().double() * gradients.double()).norm(dim=-1)
    return (sizes / sizes.sum()).cpu()


def _summarize_attention(
    attention_maps: Sequence[Tensor | None], grid: tuple[int, int]
) -> dict[str, Any] | None:
    """Return what is told of attention; None where there is none, or the model is out of bounds."""
    known = [one for one in attention_maps if one is not None and one.isfinite().all()]
    if len(known) < len(attention_maps):
        return None
    return {
        "entropy": _round_numbers(torch.special.entr(torch.stack(known)).sum(-1).mean()),
        "uniform": _round_numbers(torch.tensor(grid[0] * grid[1]).double().log()),
        "maps": [_patch_grid(one.mean(0), grid) for one in known],
    }


def _patch_grid(shares: Tensor, grid: tuple[int, int]) -> Any:
    """Return `[patches]` as rows of the grid; None if a share is no number."""
    return _round_numbers(shares.unflatten(0, grid)) if shares.isfinite().all() else None


def _round_numbers(values: Tensor) -> Any:
    """Return a tensor as numbers of DIGITS significant digits, in lists as it has dimensions."""
    if values.dim():
        return [_round_numbers(one) for one in values]
    return float(f"{float(values):.{SIGNIFICANT_DIGITS}g}")
