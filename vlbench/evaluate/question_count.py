"""How many questions a run will be asked at its end, and about how many pictures, before it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from vlbench.config.stage_schema import StageData
from vlbench.data.chosen_samples import base_source
from vlbench.data.data_sources import open_held_out, open_stage_sources
from vlbench.data.preflight import MAX_INSPECTED_SAMPLES
from vlbench.data.sample import SampleSource
from vlbench.data.shards import WebDatasetShards
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.heldout_questions import MAX_OWN_QUESTIONS, asks_rendered, final_questions


class QuestionCount(NamedTuple):
    """Questions, and the pictures that they are about: the unit of statistics."""

    questions: int
    pictures: int


def count_final_questions(stage_data: StageData, limit: int | None) -> QuestionCount | None:
    """Return what a run is asked at its end; None where its data cannot be read here.

    `stage_data` are those of the last stage, and `limit` is `log.questions`. Images are not opened:
    those that cannot be read are counted, and so are copies of a picture under other names. Samples
    of shards are taken to have an image and an answer each.
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
    asked: list[tuple[int, str]] = []
    for number, source in enumerate(sources):
        share = (limit - len(asked)) // (len(sources) - number)
        asked += [(number, picture) for picture in _pictures_asked(source, share)]
    return QuestionCount(len(asked), len(set(asked)))


def _pictures_asked(source: SampleSource, limit: int) -> list[str]:
    """Return the name of the picture of each of the first questions, at most `limit`."""
    if isinstance(base_source(source), WebDatasetShards):  # may have to be downloaded
        return [str(index) for index in range(min(limit, len(source)))]
    names: list[str] = []
    for index in range(min(len(source), MAX_INSPECTED_SAMPLES)):
        if len(names) >= limit:
            break
        with contextlib.suppress(BadSample):
            sample = source[index]
            answers = sum(turn.role == "assistant" for turn in sample.turns)
            names += [sample.images[0].name] * answers if sample.images else []
    return names[:limit]
