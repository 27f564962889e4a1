"""Questions with known answers, held out of training: of the rendered scenes, or of a user's data.

Also the two controls: the same questions with blank images, and with the images exchanged.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from vlbench.config.data_schema import DataConfig
from vlbench.config.stage_schema import StageData
from vlbench.data.data_sources import (
    LARGE_SCENES_SOURCE,
    RENDERED_SOURCES,
    open_held_out,
    open_stage_sources,
)
from vlbench.data.image_processing import blank_image
from vlbench.data.large_scene_exam import large_held_out_questions
from vlbench.data.picture_labels import Evidence
from vlbench.data.preflight import MAX_INSPECTED_SAMPLES
from vlbench.data.sample import (
    IMAGE_PLACEHOLDER,
    LazyImage,
    Sample,
    SampleSource,
    record_number,
)
from vlbench.data.scene_exam import HeldOutKind, HeldOutSceneQuestion, held_out_questions
from vlbench.data.shuffle import pick_fixed_subset
from vlbench.errors import BadSample, UserError
from vlbench.evaluate.known_pictures import KnownPictures, checksum_question

MAX_OWN_QUESTIONS = 1000  # questions asked about a user's own data
NO_IMAGE_REASON = "has no image"


@dataclass(frozen=True)
class EvalQuestion:
    """A conversation that ends with a human turn, and the answer that is right."""

    sample: Sample
    """Turns up to the question; its id is the question's id."""
    answer: str
    type: str
    """Kind of question, for example colour; "" if unknown."""
    language: str
    record_number: str = ""
    """Number of its record in the source, from 1; "" for a rendered scene."""
    picture: str = ""
    """Name of the conversation's first image: questions about it stand or fall together."""
    checksum: str = ""
    """Of its turns and the pixels of its images, which tells it from others of the same id; of
    images that are rendered their names count. "" where it is not known."""
    family: str = ""
    """Family of a question about rendered scenes, whose score is its own; "" for others."""
    evidence: tuple[Evidence, ...] = ()
    """Labels of its pictures that the answer rests on; () where they are not known."""

    @property
    def question_text(self) -> str:
        """The last line of the question, which has no image placeholders."""
        return self.sample.turns[-1].text.split("\n")[-1]


@dataclass(frozen=True)
class LeftOutRecord:
    """A record of a source that no question is asked about, and why."""

    id: str
    record: int
    """Its number in the source, from 1."""
    reason: str

    def __str__(self) -> str:
        """Name it."""
        number = f"record {self.record}"
        return f"{number if self.id == number else f'{number} ({self.id})'}: {self.reason}"


def final_questions(
    stage_data: StageData, limit: int | None
) -> tuple[str, list[EvalQuestion], list[EvalQuestion]]:
    """Return what a run is asked at its end: (about what, questions, questions on unseen pairs).

    `stage_data` are those of the last stage, and `limit` is `log.questions`.
    """
    data = stage_data.config
    if asks_rendered(data):
        new, unseen = _rendered_questions(data)
        return "new images", pick_fixed_subset(new, limit), pick_fixed_subset(unseen, limit)
    held_out = open_held_out(stage_data)
    if held_out is not None:
        questions = source_questions(held_out, limit or MAX_OWN_QUESTIONS)
        return f"held-out {held_out.name}", questions, []
    sources = [source for source, _ in open_stage_sources(stage_data)]
    questions = _mixture_questions(sources, limit or MAX_OWN_QUESTIONS)
    return "the training conversations (no data.val was given)", make_ids_unique(questions), []


def _mixture_questions(sources: Sequence[SampleSource], limit: int) -> list[EvalQuestion]:
    """Return at most `limit` questions about several sources; print what is left out.

    Each has an equal share, and what it cannot take goes to the others. Questions stand source by
    source, and the number of a record has that of its source before it.
    """
    most_records = MAX_INSPECTED_SAMPLES if len(sources) > 1 else None  # others have images
    pictures = KnownPictures()
    readers = [QuestionReader(source, pictures, most_records) for source in sources]
    shares = [0] * len(readers)
    unread = list(range(len(readers)))  # sources that may have more questions
    while unread and (rest := limit - sum(shares)):
        share, more = divmod(rest, len(unread))
        for place, number in enumerate(unread[:rest]):
            wanted = shares[number] + share + (place < more)
            shares[number] = len(readers[number].read_until(wanted))
        unread = [number for number in unread if not readers[number].is_at_end(shares[number])]
    questions = []
    for number, (reader, count) in enumerate(zip(readers, shares, strict=True)):
        _print_left_out(reader.source, reader.left_out)
        prefix = f"{number + 1}." if len(sources) > 1 else ""
        questions += [
            replace(question, record_number=f"{prefix}{question.record_number}")
            for question in make_ids_unique(reader.questions[:count])
        ]
    return questions


def asks_rendered(data: DataConfig) -> bool:
    """Tell whether the questions at the end are those about rendered scenes."""
    return data.train in RENDERED_SOURCES and not data.mix and not data.val


def _rendered_questions(data: DataConfig) -> tuple[list[EvalQuestion], list[EvalQuestion]]:
    """Return the questions about new rendered scenes, and about unseen pairs of attributes."""
    if data.train == LARGE_SCENES_SOURCE:
        return _without_answers(large_held_out_questions(data.scene_side)), []
    return scene_questions("new"), scene_questions("unseen")


def scene_questions(subset: HeldOutKind) -> list[EvalQuestion]:
    """Return a held-out set of rendered scenes: "new" images or "unseen" pairs of attributes."""
    return _without_answers(held_out_questions(subset))


def _without_answers(held_out: Iterable[HeldOutSceneQuestion]) -> list[EvalQuestion]:
    """Return held-out questions about rendered scenes, to be asked."""
    return [
        EvalQuestion(
            sample,
            scene.answer,
            scene.type,
            scene.language,
            picture=scene.images[0].name,
            checksum=checksum_question(sample, [image.name for image in scene.images]),
            family=scene.family,
            evidence=scene.evidence,
        )
        for scene in held_out
        for sample in [_drop_answers(scene.to_sample())]
    ]


def _drop_answers(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[:1])


def source_questions(source: SampleSource, limit: int) -> list[EvalQuestion]:
    """Return the questions of `collect_questions` with unique ids; print what is left out."""
    questions, left_out = collect_questions(source, limit)
    _print_left_out(source, left_out)
    return make_ids_unique(questions)


def _print_left_out(source: SampleSource, left_out: Sequence[LeftOutRecord]) -> None:
    if left_out:
        print(f"{source.name}: nothing is asked about {describe_left_out(left_out)}")


def collect_questions(
    source: SampleSource, limit: int
) -> tuple[list[EvalQuestion], list[LeftOutRecord]]:
    """Return the first questions of a source, at most `limit`; see `QuestionReader`."""
    reader = QuestionReader(source, KnownPictures())
    return reader.read_until(limit), reader.left_out


class QuestionReader:
    """Reads a source for questions: one per assistant turn of each sample with an image.

    Earlier turns stay in the conversation as they are in the data. Left out are bad samples, those
    with an image that cannot be read, and those without an image. Copies of a picture become one
    image, so that questions about it are known as such.
    """

    def __init__(
        self, source: SampleSource, pictures: KnownPictures, most_records: int | None = None
    ) -> None:
        """Begin at the first record; if `most_records` is given, only that many are read."""
        self.source = source
        self.questions: list[EvalQuestion] = []
        """All that were read: a record may have more than were wanted."""
        self.left_out: list[LeftOutRecord] = []
        self._pictures = pictures
        self._unread = range(len(source))[:most_records]

    def read_until(self, count: int) -> list[EvalQuestion]:
        """Read on until there are `count` questions; return them, fewer at the end."""
        while len(self.questions) < count and self._unread:
            index, self._unread = self._unread[0], self._unread[1:]
            self._read_record(index)
        return self.questions[:count]

    def is_at_end(self, count: int) -> bool:
        """Tell whether there are no more questions than these `count`."""
        return not self._unread and len(self.questions) <= count

    def _read_record(self, index: int) -> None:
        sample_id, reason = "", ""
        number = record_number(self.source, index)
        try:
            sample = self.source[index]
            sample_id = sample.id
            images = tuple(map(self._pictures.unite, sample.images))
        except BadSample as error:
            sample_id, reason = error.sample_id, error.reason
        except UserError as error:
            reason = str(error)
        else:
            reason = "" if images else NO_IMAGE_REASON
        if reason:
            self.left_out.append(LeftOutRecord(sample_id, number, reason))
        else:
            self.questions += _questions_by_turn(
                replace(sample, images=images), str(number), self._pictures
            )


def describe_left_out(left_out_records: Sequence[LeftOutRecord]) -> str:
    """Return how many records are left out for which kind of reason, and the first of each."""
    bad = [record for record in left_out_records if record.reason != NO_IMAGE_REASON]
    without_image = [record for record in left_out_records if record.reason == NO_IMAGE_REASON]
    kinds = (("bad samples", bad), ("samples without an image", without_image))
    return "; ".join(
        f"{len(records)} {kind}, the first: {records[0]}" for kind, records in kinds if records
    )


def make_ids_unique(questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
    """Return the questions with unique ids: one that occurs several times gets its record number.

    Several records of a user's data may have the same id; `7/1` of the third record then becomes
    `7#3/1`, or `7#3#2/1` where another record is named `7#3`.
    """
    counts = Counter(question.sample.id for question in questions)
    taken = {name for name, count in counts.items() if count == 1}
    unique = []
    for question in questions:
        if counts[question.sample.id] > 1:
            question = _with_new_id(question, taken)
            taken.add(question.sample.id)
        unique.append(question)
    return unique


def _with_new_id(question: EvalQuestion, taken: Collection[str]) -> EvalQuestion:
    """Return a question with the number of its record in its id, which is not one of `taken`."""
    name, _, turn = question.sample.id.rpartition("/")
    numbered = f"{name}#{question.record_number}"
    ends = itertools.chain([""], (f"#{number}" for number in itertools.count(2)))
    new_id = next(one for end in ends if (one := f"{numbered}{end}/{turn}") not in taken)
    return replace(question, sample=replace(question.sample, id=new_id))


def _questions_by_turn(
    sample: Sample, record_number: str, pictures: KnownPictures
) -> list[EvalQuestion]:
    """Return a question for each assistant turn, with the turns and images before it."""
    questions = []
    picture = sample.images[0].name if sample.images else ""
    for index, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        earlier = sample.turns[:index]
        image_count = sum(one.text.count(IMAGE_PLACEHOLDER) for one in earlier)
        conversation = replace(
            sample, id=f"{sample.id}/{index}", turns=earlier, images=sample.images[:image_count]
        )
        answer = turn.text.strip()
        checksum = checksum_question(conversation, map(pictures.digest, conversation.images))
        questions.append(
            EvalQuestion(
                conversation, answer, "", sample.language, record_number, picture, checksum
            )
        )
    return questions


def blank_images(
    questions: Sequence[EvalQuestion], mean_colour: tuple[float, float, float]
) -> list[EvalQuestion]:
    """Return the same questions with every image replaced by one of the mean colour."""
    return [
        _with_images(
            question, tuple(blank_image(image, mean_colour) for image in question.sample.images)
        )
        for question in questions
    ]


def shuffle_images(questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
    """Return the same questions with the images exchanged: each becomes the next of the set.

    [] where all are about one image, which cannot be exchanged for another.
    """
    images = list(dict.fromkeys(image for one in questions for image in one.sample.images))
    if len(images) < 2:
        return []
    next_image = dict(zip(images, images[1:] + images[:1], strict=True))
    return [
        _with_images(question, tuple(next_image[image] for image in question.sample.images))
        for question in questions
    ]


def _with_images(question: EvalQuestion, images: tuple[LazyImage, ...]) -> EvalQuestion:
    return replace(question, sample=replace(question.sample, images=images))
