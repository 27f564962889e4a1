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

from vlbench.connector import zero_like_loss
from vlbench.data.batch import Batch, collate
from vlbench.data.sample import IGNORE, Turn, encode
from vlbench.evaluate.questions import Question
from vlbench.mistakes import BadSample, Mistake
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.vlm import VLM

DIGITS = 5  # of every number that is written


@dataclass(frozen=True)
class Look:
    """What one answer owes to the first picture of its question; shares sum to 1."""

    patches: Tensor
    """`[patches]`, shares of relevance; NaN where the answer does not depend on the picture."""
    tokens: Tensor
    """`[visual tokens]`, the same for what the connector made of the picture."""
    attention: Tensor | None
    """`[visual tokens, patches]`, what the connector says of its own attention."""


def diagnose(vlm: VLM, answered: Sequence[tuple[Question, str]]) -> dict[str, Any]:
    """Return what the model's answers to questions with pictures owe to the first picture of each.

    `maps` has for every question the relevance of each patch, in the rows of `grid`, None where
    the answer does not depend on the picture. `tokens` are the mean shares of the visual tokens,
    `effective` is how many are used: the exponential of the shares' entropy. `attention` has the
    mean entropy of a visual token's attention in nats, that of a token that looks everywhere, and
    for every question the mean over tokens; None for a connector that does not attend. Without any
    picture the result is empty. The model stays as it was.
    """
    found: list[tuple[Question, str, Look]] = []
    vlm = in_eval_mode(vlm)
    with torch.random.fork_rng([vlm.device] if vlm.device.type == "cuda" else []):
        for question, answer in answered:
            batch = _told(vlm, question, answer)
            if batch is not None:
                found.append((question, answer, look(vlm, batch)))
    if not found:
        return {}
    tokens = [one.tokens for _, _, one in found if one.tokens.isfinite().all()]
    used = torch.stack(tokens).mean(0) if tokens else None
    return {
        "maps": [
            {
                "id": question.sample.id,
                "question": question.text,
                "answer": answer,
                "truth": question.answer,
                "grid": list(vlm.shapes.grid),
                "relevance": _map(one.patches, vlm.shapes.grid),
            }
            for question, answer, one in found
        ],
        "tokens": None if used is None else _plain(used),
        "effective": None if used is None else _plain(torch.special.entr(used).sum().exp()),
        "attention": _attention([one.attention for _, _, one in found], vlm.shapes.grid),
    }


def look(vlm: VLM, batch: Batch) -> Look:
    """Return what the labels of `batch`, which is one sample with pictures, owe to the first one.

    No parameter gets a gradient.
    """
    assert batch.labels is not None
    with torch.no_grad():
        features = vlm.features(batch)
        attention = vlm.connector.attention(features.clone())
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        # copies, as a connector may write into its features; zeros, as it may leave them out
        visual = vlm.connector(features.clone()) + zero_like_loss(features)
        loss = vlm.loss(vlm.hidden(batch, visual), batch.labels) + zero_like_loss(visual)
        slopes = torch.autograd.grad(loss, (features, visual))
    if attention is not None:
        _check(vlm, attention, (*visual.shape[:2], vlm.shapes.patches))
    first = int(vlm.connector.class_token)
    return Look(
        patches=_shares(features[0, first:], slopes[0][0, first:]),
        tokens=_shares(visual[0], slopes[1][0]),
        attention=None if attention is None else attention[0].double().cpu(),
    )


def _check(vlm: VLM, attention: Tensor, shape: tuple[int, ...]) -> None:
    if attention.shape != shape:
        raise Mistake(
            f"connector {type(vlm.connector).__name__}: attention gives {list(attention.shape)}; "
            f"needed are {list(shape)}: images, visual tokens, patches"
        )


def _told(vlm: VLM, question: Question, answer: str) -> Batch | None:
    """Return a question with the answer to it, None if there is no picture."""
    sample = question.sample
    if not sample.pictures:
        return None
    try:
        encoded = encode(
            replace(sample, turns=(*sample.turns, Turn("assistant", answer))),
            vlm.template,
            vlm.tokenizer,
            vlm.connector.tokens_per_image,
            vlm.language.config.max_position_embeddings,
        )
    except BadSample:  # a model may say what cannot be learned, such as the text of a place
        return None
    encoded = replace(encoded, labels=_last(encoded.labels))
    return collate([[encoded]], vlm.transform.of).to(vlm.device)


def _last(labels: list[int]) -> list[int]:
    """Keep the labels of the last answer, which are one run; earlier ones are the question's."""
    end = max(t for t, label in enumerate(labels) if label != IGNORE)
    start = max((t for t in range(end) if labels[t] == IGNORE), default=-1) + 1
    return [IGNORE] * start + labels[start:]


def _shares(values: Tensor, slopes: Tensor) -> Tensor:
    """Return the shares `[number]` of vectors `[number, width]`; NaN where no slope is."""
    sizes = (values.detach().double() * slopes.double()).norm(dim=-1)
    return (sizes / sizes.sum()).cpu()


def _attention(given: Sequence[Tensor | None], grid: tuple[int, int]) -> dict[str, Any] | None:
    """Return what is told of attention; None where there is none, or the model is out of bounds."""
    known = [one for one in given if one is not None and one.isfinite().all()]
    if len(known) < len(given):
        return None
    return {
        "entropy": _plain(torch.special.entr(torch.stack(known)).sum(-1).mean()),
        "uniform": _plain(torch.tensor(grid[0] * grid[1]).double().log()),
        "maps": [_map(one.mean(0), grid) for one in known],
    }


def _map(shares: Tensor, grid: tuple[int, int]) -> Any:
    """Return `[patches]` as rows of the grid; None if a share is no number."""
    return _plain(shares.unflatten(0, grid)) if shares.isfinite().all() else None


def _plain(values: Tensor) -> Any:
    """Return a tensor as numbers of DIGITS significant digits, in lists as it has dimensions."""
    if values.dim():
        return [_plain(one) for one in values]
    return float(f"{float(values):.{DIGITS}g}")
