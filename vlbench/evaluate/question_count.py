"""How many questions a run will be asked at its end, and about how many pictures, before it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from vlbench.config.stage_schema import StageData
from vlbench.data.data_sources import open_held_out, open_stage_sources
from vlbench.data.preflight import MAX_INSPECTED_SAMPLES
from vlbench.data.sample import SampleSource
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.heldout_questions import MAX_OWN_QUESTIONS, asks_rendered, final_questions


class QuestionCount(NamedTuple):
    """Questions, and the pictures that they are about: the unit of statistics."""

    questions: int
    pictures: int


def count_final_questions(stage_data: StageData, limit: int | None) -> QuestionCount | None:
    """Return what a run is asked at its end; None where its data cannot be read here.

    `stage_data` are those of the last stage, and `limit` is `log.questions`. Images are not opened:
    those that cannot be read are counted, and so are copies of a picture under other names.
    """
    if asks_rendered(stage_data.config):
        _, questions, _ = final_questions(stage_data, limit)
        return QuestionCount(len(questions), len({one.picture for one in questions}))
    try:
        held_out = open_held_out(stage_data)
        sources = [held_out] if held_out else [one for one, _ in open_stage_sources(stage_data)]
        return _count_sources(sources, limit or MAX_OWN_QUESTIONS)
    except UserError:  # a run says what is wrong with them
        return None


def _count_sources(sources: Sequence[SampleSource], limit: int) -> QuestionCount:
    """Return the first questions of sources, at most `limit`, about an equal share of each."""
    questions, pictures = 0, set()
    for number, source in enumerate(sources):
        share, count = (limit - questions) // (len(sources) - number), 0
        for index in range(min(len(source), MAX_INSPECTED_SAMPLES)):
            if count >= share:
                break
            with contextlib.suppress(BadSample):
                sample = source[index]
                answers = sum(turn.role == "assistant" for turn in sample.turns)
                if sample.images and answers:
                    count += answers
                    pictures.add((number, sample.images[0].name))
        questions += min(count, share)
    return QuestionCount(questions, len(pictures))
