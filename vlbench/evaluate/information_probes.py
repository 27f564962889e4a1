"""Where the information for an answer goes: probes of three places between picture and answer.

Linear probes of exact labels are fitted on training pictures at each place of `place_features`, and
read the pictures of the held-out questions. A place has the information for an answer where its
probes read all of the question's evidence right (`data.picture_labels`). Control probes, fitted in
the same way on labels that were exchanged between the training pictures, show what chance reads.

Where the language model's features belong to a whole question, the label is the right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from vlbench.config.stage_schema import StageData
from vlbench.data.data_sources import open_stage_mixture
from vlbench.data.picture_labels import LabelledPicture
from vlbench.data.sample import Sample
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.label_reading import (
    answer_rows,
    label_accuracies,
    picture_rows,
    read_labels,
)
from vlbench.evaluate.neighbour_overlap import NEIGHBOUR_COUNT, neighbour_overlap
from vlbench.evaluate.place_features import (
    PLACES,
    PlaceFeatures,
    compute_place_features,
    have_equal_views,
    reads_answers,
)
from vlbench.model.loaded_vlm import LoadedVLM

TRAINING_PICTURES = 1000  # that probes are fitted on
SEARCHED_SAMPLES = 4000  # in which they are looked for
MIN_QUESTIONS = 100  # with fewer, the wrong answers are too few to say where information goes
MAX_FEATURE_BYTES = 1 << 30  # of one place


def probe_information(
    stage_data: StageData,
    vlm: LoadedVLM,
    questions: Sequence[EvalQuestion],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Return which place has the information for which question.

    `stage_data` are of the last stage, on whose samples probes are fitted.
    `questions` have for each place, in the order of `places`, 1 where its probes read the
    evidence right, and the same for control probes; `labels` have the share of held-out
    pictures in which each label is read right, `control_labels` that of the control probes.
    `neighbours` is the overlap of neighbourhoods before and behind the connector. Where nothing
    can be probed, `left_out` says why; {} if `should_stop` became true before the end. The
    model is not changed.
    """
    asked = [one for one in questions if one.evidence]
    if len(asked) < MIN_QUESTIONS:
        return {
            "left_out": f"{len(asked)} questions are about rendered scenes, {MIN_QUESTIONS} needed"
        }
    held_out_pictures = {image.name for one in asked for image in one.sample.images}
    fitted_on = training_questions(stage_data, held_out_pictures, label_names(asked[0].sample))
    if not have_equal_views(vlm, [one.sample for one in (*fitted_on, *asked)]):
        return {"left_out": "pictures are cut into different tiles, and a probe reads the same"}
    picture_count = sum(len(one.sample.images) for one in (*fitted_on, *asked))
    if _picture_bytes(vlm, asked[0].sample) * picture_count > MAX_FEATURE_BYTES:
        limit = f"{MAX_FEATURE_BYTES / (1 << 30):g} GiB"
        return {"left_out": f"the features of {picture_count:,} pictures take more than {limit}"}
    features = [
        compute_place_features(vlm, [one.sample for one in some], should_stop)
        for some in (fitted_on, asked)
    ]
    training, held_out = features
    if training is None or held_out is None:
        return {}
    if not all(one.isfinite().all() for one in (*training, *held_out)):
        return {"left_out": "the features are not finite"}
    return {
        "training_pictures": len(training.encoder),
        "reads_answers": reads_answers(vlm),
        **_read_places(training, held_out, fitted_on, asked, reads_answers(vlm)),
        "neighbours": _compare_neighbours(held_out),
    }


def label_names(sample: Sample) -> list[tuple[str, ...]]:
    """Return the names of labels of each of its pictures, () for a picture without labels."""
    return [
        tuple(sorted(image.labels)) if isinstance(image, LabelledPicture) else ()
        for image in sample.images
    ]


def training_questions(
    stage_data: StageData, held_out_pictures: set[str], wanted_names: list[tuple[str, ...]]
) -> list[EvalQuestion]:
    """Return the first questions of the first samples that a stage trains on.

    Their pictures have the wanted labels, one by one, and none is one of the held-out pictures.
    Where few do, because the data hold several families, up to SEARCHED_SAMPLES are looked through.
    """
    mixture = open_stage_mixture(stage_data)
    samples = (mixture[position] for position in range(min(len(mixture), SEARCHED_SAMPLES)))
    found = (
        _first_question(sample)
        for sample in samples
        if label_names(sample) == wanted_names
        and not any(image.name in held_out_pictures for image in sample.images)
    )
    return list(islice(found, TRAINING_PICTURES))


def _first_question(sample: Sample) -> EvalQuestion:
    turn = next(at for at, one in enumerate(sample.turns) if one.role == "assistant")
    question = replace(sample, turns=sample.turns[:turn])
    return EvalQuestion(question, sample.turns[turn].text, "", sample.language)


def _picture_bytes(vlm: LoadedVLM, sample: Sample) -> int:
    """Return how many bytes the features of a picture take, at the place where they are most."""
    features = compute_place_features(vlm, [sample])
    assert features is not None
    return max(one[0].nbytes for one in features)


def _read_places(
    training: PlaceFeatures,
    held_out: PlaceFeatures,
    fitted_on: Sequence[EvalQuestion],
    asked: Sequence[EvalQuestion],
    language_reads_answers: bool,
) -> dict[str, Any]:
    """Fit the probes of every place, and read the held-out questions with them."""
    rows_of_place = dict.fromkeys(PLACES, (picture_rows(fitted_on), picture_rows(asked)))
    if language_reads_answers:
        rows_of_place["language"] = answer_rows(fitted_on), answer_rows(asked)
    read, control, accuracies, by_chance = [], [], {}, {}
    for place, fitted, seen in zip(PLACES, training, held_out, strict=True):
        training_rows, rows = rows_of_place[place]
        values, exchanged = read_labels(fitted, training_rows.labels, seen, rows.labels)
        read.append(rows.are_read(values))
        control.append(rows.are_read(exchanged))
        accuracies[place] = label_accuracies(values, rows.labels)
        by_chance[place] = label_accuracies(exchanged, rows.labels)
    ids = [one.sample.id for one in asked]
    return {
        "places": {place: list(one.shape[1:]) for place, one in zip(PLACES, held_out, strict=True)},
        "labels": accuracies,
        "control_labels": by_chance,
        "questions": [
            {"id": name, "read": [*map(int, real)], "control": [*map(int, chance)]}
            for name, real, chance in zip(
                ids, zip(*read, strict=True), zip(*control, strict=True), strict=True
            )
        ],
    }


def _compare_neighbours(held_out: PlaceFeatures) -> dict[str, Any]:
    """Return the overlap of neighbourhoods before and behind the connector."""
    overlap = neighbour_overlap(held_out.encoder, held_out.connector)
    return {
        "count": NEIGHBOUR_COUNT,
        "pictures": len(overlap),
        "overlap": round(float(overlap.mean()), 4),
        "standard_error": round(float(overlap.std() / len(overlap) ** 0.5), 4),
        "chance": round(NEIGHBOUR_COUNT / (len(overlap) - 1), 4),
    }
