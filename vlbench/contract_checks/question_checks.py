"""What a connector makes of the question of an image, where it reads any."""

from __future__ import annotations

import torch
from torch import Tensor

from vlbench.connector.levels import Levels, as_levels, map_levels
from vlbench.connector.question import Question
from vlbench.contract_checks.small_model import make_double_batch, make_sample
from vlbench.contract_checks.violations import require
from vlbench.model.loaded_vlm import LoadedVLM

TOLERANCE = 1e-9  # of float64, relative and absolute: sums may run over more or fewer terms
MORE_PADDING = 3


@torch.no_grad()
def check_question(vlm: LoadedVLM) -> None:
    """Visual tokens depend on the own question alone: not on padding, not on other images."""
    if not vlm.connector.question_length:
        return
    samples = [make_sample(1, images=2, words=20), make_sample(2), make_sample(3, words=9)]
    batch = make_double_batch(vlm, [samples])
    features, question = vlm.model.connector_inputs(batch, vlm.features(batch))
    visual = vlm.connector(features, question)
    padded = vlm.connector(features, _fill_padding(question, vlm.connector.question_length))
    require(_are_close(padded, visual), "padding behind a question changes the visual tokens")
    for image in range(len(question.lengths)):
        own = slice(image, image + 1)
        cut = question.embeddings[own, : max(1, int(question.lengths[image]))]
        alone = vlm.connector(
            map_levels(lambda level, own=own: level[own], features),  # type: ignore[misc]
            Question(cut, question.lengths[own]),
        )
        beside = map_levels(lambda level, own=own: level[own], visual)  # type: ignore[misc]
        require(_are_close(alone, beside), "an image notices the questions of other images")
    swapped = Question(question.embeddings.flip(0), question.lengths.flip(0))
    unread = _are_close(vlm.connector(features, swapped), visual)
    require(not unread, "the visual tokens do not depend on the question")
    none = Question(question.embeddings, torch.zeros_like(question.lengths))
    finite = all(level.isfinite().all() for level in as_levels(vlm.connector(features, none)))
    require(finite, "NaN or infinite visual tokens for a question without a token")


def _fill_padding(question: Question, max_length: int) -> Question:
    """Return the same question with more padding, up to `max_length`, and noise in it."""
    embeddings = question.embeddings
    added = min(MORE_PADDING, max_length - embeddings.shape[1])
    more = embeddings.new_zeros(len(embeddings), added, embeddings.shape[2])
    longer = Question(torch.cat([embeddings, more], dim=1), question.lengths)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(longer.embeddings.shape, generator=generator, dtype=embeddings.dtype)
    filled: Tensor = longer.embeddings.where(longer.mask[..., None], noise)
    return Question(filled, question.lengths)


def _are_close(ours: Levels, theirs: Levels) -> bool:
    pairs = zip(as_levels(ours), as_levels(theirs), strict=True)
    return all(torch.allclose(a, b, TOLERANCE, TOLERANCE) for a, b in pairs)
