"""Where the information for an answer goes: probes of three places between picture and answer.

Linear probes of exact labels are fitted on training pictures at each place of `place_features`, and
read the pictures of the held-out questions. A place has the information for an answer where its
probes read all of the question's evidence right (`data.picture_labels`). Control probes, fitted in
the same way on labels that were exchanged between the training pictures, show what chance reads.
`kind_probes` has the probes of one kind of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from vlbench.config.stage_schema import StageData
from vlbench.data.data_sources import open_stage_mixture
from vlbench.data.picture_labels import LabelledPicture
from vlbench.data.sample import Sample
from vlbench.evaluate.askable_questions import split_askable
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.kind_probes import MIN_TRAINING_PICTURES, KindReadings, probe_kind
from vlbench.evaluate.neighbour_overlap import NEIGHBOUR_COUNT
from vlbench.evaluate.place_features import (
    PLACES,
    compute_place_features,
    have_equal_views,
    reads_answers,
    token_grids,
)
from vlbench.model.loaded_vlm import LoadedVLM

TRAINING_PICTURES = 500  # that probes of a kind are fitted on
PICTURES_WITH_REGIONS = 300  # the same where one probe reads each of a picture's many regions
PICTURES_WITHOUT_PLACES = 1000  # and where regions are read from all tokens, which have no places
SEARCHED_SAMPLES = 10_000  # in which they are looked for
MIN_QUESTIONS = 100  # with fewer, the wrong answers are too few to say where information goes
MAX_FEATURE_BYTES = 1 << 30  # of one place
UNKNOWN_EVIDENCE = "what the answer rests on is not known"


class PicturesKind(NamedTuple):
    """Pictures of a kind, one or several in a sample: they share probes."""

    name: str
    is_album: bool


def probe_information(
    stage_data: StageData,
    vlm: LoadedVLM,
    questions: Sequence[EvalQuestion],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Return which place has the information for which question.

    `stage_data` are of the last stage, on whose samples probes are fitted. The model can be asked
    all `questions` (`split_askable`).

    Its `questions` have for each place, in the order of `places`, 1 where its probes read the
    evidence right, and the same for control probes; 1 as `unsure` where the connector's tokens have
    no places, and probes like theirs do not read it from the encoder either. `not_probed` has the
    ids of further questions by the reason. By family, `labels` have the share of held-out pictures
    in which each label is read right at a place, `control_labels` that of the control probes, and
    `training_pictures` what they are fitted on. `neighbours` is the overlap of neighbourhoods
    before and behind the connector. Where nothing can be probed, `left_out` says why; {} if
    `should_stop` became true before the end. The model is not changed.
    """
    asked: dict[PicturesKind, list[EvalQuestion]] = {}
    not_probed: dict[str, list[str]] = {}
    for one in questions:
        kind = pictures_kind(one.sample) if one.evidence else None
        if kind:
            asked.setdefault(kind, []).append(one)
        else:
            not_probed.setdefault(UNKNOWN_EVIDENCE, []).append(one.sample.id)
    count = sum(map(len, asked.values()))
    if count < MIN_QUESTIONS:
        return {"left_out": f"{count} questions are about rendered scenes, {MIN_QUESTIONS} needed"}
    names = {image.name for some in asked.values() for one in some for image in one.sample.images}
    wanted = {kind: _wanted_pictures(vlm, some[0]) for kind, some in asked.items()}
    fitted_on = training_questions(stage_data, names, wanted)
    readings: list[KindReadings] = []
    for kind, some in asked.items():
        encodable, _ = split_askable(vlm.processor, fitted_on[kind])
        found = _probe_features(vlm, encodable, some, should_stop)
        if found is None:
            return {}
        if isinstance(found, str):
            not_probed.setdefault(found, []).extend(one.sample.id for one in some)
        else:
            readings.append(found)
    if not readings:
        return {"left_out": "; ".join(not_probed)}
    return {**_join_kinds(readings), "reads_answers": reads_answers(vlm), "not_probed": not_probed}


def _probe_features(
    vlm: LoadedVLM,
    fitted_on: Sequence[EvalQuestion],
    asked: Sequence[EvalQuestion],
    should_stop: Callable[[], bool],
) -> KindReadings | str | None:
    """Probe the features of pictures of a kind; a text says why not, None that it was stopped."""
    reason = _why_not(vlm, fitted_on, asked)
    if reason:
        return reason
    training, held_out = (
        compute_place_features(vlm, [one.sample for one in some], should_stop)
        for some in (fitted_on, asked)
    )
    if training is None or held_out is None:
        return None
    if not all(one.isfinite().all() for one in (*training, *held_out)):
        return "the features are not finite"
    return probe_kind(
        (fitted_on, training), (asked, held_out), token_grids(vlm), reads_answers(vlm)
    )


def pictures_kind(sample: Sample) -> PicturesKind | None:
    """Return the kind of a sample's pictures; None where they have no labels, or are of several."""
    kinds = {one.kind if isinstance(one, LabelledPicture) else "" for one in sample.images}
    if len(kinds) != 1 or "" in kinds:
        return None
    return PicturesKind(kinds.pop(), len(sample.images) > 1)


def _wanted_pictures(vlm: LoadedVLM, question: EvalQuestion) -> int:
    """Return how many training pictures probes of the question's kind are fitted on."""
    if not all(image.regions for image in _labelled(question.sample)):
        return TRAINING_PICTURES
    return PICTURES_WITH_REGIONS if all(token_grids(vlm).values()) else PICTURES_WITHOUT_PLACES


def training_questions(
    stage_data: StageData, held_out_pictures: set[str], wanted: dict[PicturesKind, int]
) -> dict[PicturesKind, list[EvalQuestion]]:
    """Return the first questions of the first samples that a stage trains on, of each kind.

    They have as many pictures as `wanted` says, none of which is one of the held-out pictures.
    Samples that answer nothing are passed over. Up to SEARCHED_SAMPLES are looked through.
    """
    mixture = open_stage_mixture(stage_data)
    found: dict[PicturesKind, list[EvalQuestion]] = {kind: [] for kind in wanted}
    left = dict(wanted)
    for position in range(min(len(mixture), SEARCHED_SAMPLES)):
        if max(left.values()) <= 0:
            break
        sample = mixture[position]
        kind = pictures_kind(sample)
        if kind is None or left.get(kind, 0) <= 0:
            continue
        if any(image.name in held_out_pictures for image in sample.images):
            continue
        question = _first_question(sample)
        if question is not None:
            found[kind].append(question)
            left[kind] -= len(sample.images)
    return found


def _first_question(sample: Sample) -> EvalQuestion | None:
    roles = [turn.role for turn in sample.turns]
    if "assistant" not in roles:
        return None
    turn = roles.index("assistant")
    question = replace(sample, turns=sample.turns[:turn])
    return EvalQuestion(question, sample.turns[turn].text, "", sample.language)


def _why_not(
    vlm: LoadedVLM, fitted_on: Sequence[EvalQuestion], asked: Sequence[EvalQuestion]
) -> str:
    """Return why pictures of a kind cannot be probed, "" if they can."""
    picture_count = sum(len(one.sample.images) for one in fitted_on)
    if picture_count < MIN_TRAINING_PICTURES:
        return (
            f"the training has {picture_count} pictures of the kind, {MIN_TRAINING_PICTURES} needed"
        )
    both = [one.sample for one in (*fitted_on, *asked)]
    if not have_equal_views(vlm, both):
        return "pictures are cut into different tiles, and a probe reads the same"
    if vlm.processor.view_layout and any(image.regions for image in _labelled(both[-1])):
        return "pictures are cut into tiles, and small things are looked up in whole ones"
    picture_count = sum(len(one.images) for one in both)
    if _picture_bytes(vlm, asked[0].sample) * picture_count > MAX_FEATURE_BYTES:
        limit = f"{MAX_FEATURE_BYTES / (1 << 30):g} GiB"
        return f"the features of {picture_count:,} pictures take more than {limit}"
    return ""


def _labelled(sample: Sample) -> Iterator[LabelledPicture]:
    return (image for image in sample.images if isinstance(image, LabelledPicture))


def _picture_bytes(vlm: LoadedVLM, sample: Sample) -> int:
    """Return how many bytes the features of a picture take, at the place where they are most."""
    features = compute_place_features(vlm, [sample])
    assert features is not None
    return max(one[0].nbytes for one in features)


def _join_kinds(readings: Sequence[KindReadings]) -> dict[str, Any]:
    """Return what was read of all kinds together."""
    overlaps = [one.neighbour_overlap for one in readings if one.neighbour_overlap is not None]
    overlap = torch.cat(overlaps)
    chance = sum(NEIGHBOUR_COUNT / (len(one) - 1) * len(one) for one in overlaps) / len(overlap)
    return {
        "training_pictures": {one.families: one.training_pictures for one in readings},
        "places": dict(zip(PLACES, readings[0].shapes, strict=True)),
        "labels": {one.families: one.accuracies for one in readings},
        "control_labels": {one.families: one.control_accuracies for one in readings},
        "questions": [entry for one in readings for entry in one.questions],
        "neighbours": {
            "count": NEIGHBOUR_COUNT,
            "pictures": len(overlap),
            "overlap": round(float(overlap.mean()), 4),
            "standard_error": round(float(overlap.std() / len(overlap) ** 0.5), 4),
            "chance": round(chance, 4),
        },
    }
