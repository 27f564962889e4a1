"""Questions with known answers: the held-out ones of the rendered world, or a user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlbench.data.image_processing import blank_image
from vlbench.data.sample import IMAGE_PLACEHOLDER, LazyImage, Sample, SampleSource
from vlbench.data.scene_dataset import held_out_questions
from vlbench.errors import BadSample, UserError

NO_IMAGE_REASON = "has no picture"


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

    @property
    def question_text(self) -> str:
        """The last line of the question: without the places of its pictures."""
        return self.sample.turns[-1].text.split("\n")[-1]


@dataclass(frozen=True)
class LeftOutRecord:
    """A record of a source that nothing is asked about, and why."""

    id: str
    record: int
    """Its number in the source, from 1."""
    reason: str

    def __str__(self) -> str:
        """Name it."""
        number = f"record {self.record}"
        return f"{number if self.id == number else f'{number} ({self.id})'}: {self.reason}"


def scene_questions(subset: str) -> list[EvalQuestion]:
    """Return a held-out set of the rendered world: "new" pictures or "unseen" attribute pairs."""
    return [
        EvalQuestion(_drop_answers(one.to_sample()), one.answer, one.type, one.language)
        for one in held_out_questions(subset)
    ]


def _drop_answers(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[:1])


def source_questions(source: SampleSource, limit: int) -> list[EvalQuestion]:
    """Return the questions of `look_through`; what is left out is counted, and its first is named.

    Their ids differ from each other, as those of `told_apart`.
    """
    questions, left_out = collect_questions(source, limit)
    if left_out:
        print(f"{source.name}: nothing is asked about {describe_left_out(left_out)}")
    return make_ids_unique(questions)


def collect_questions(
    source: SampleSource, limit: int
) -> tuple[list[EvalQuestion], list[LeftOutRecord]]:
    """Return one question per assistant turn of the first samples with an image, at most `limit`.

    What was said before stands in the conversation as it is in the data. Left out are bad samples,
    those with a picture that cannot be read, and those without one.
    """
    questions: list[EvalQuestion] = []
    left_out: list[LeftOutRecord] = []
    for index in range(len(source)):
        if len(questions) >= limit:
            break
        name, reason = "", ""
        try:
            sample = source[index]
            name = sample.id
            for picture in sample.images:
                picture.open()
        except BadSample as error:
            name, reason = error.sample_id, error.reason
        except UserError as error:
            reason = str(error)
        else:
            reason = "" if sample.images else NO_IMAGE_REASON
        if reason:
            left_out.append(LeftOutRecord(name, index + 1, reason))
        else:
            questions += _questions_by_turn(sample, str(index + 1))
    return questions[:limit], left_out


def describe_left_out(left_out_records: Sequence[LeftOutRecord]) -> str:
    """Return how many records are left out for which kind of reason, and the first of each."""
    kinds = (
        ("bad samples", [one for one in left_out_records if one.reason != NO_IMAGE_REASON]),
        (
            "samples without a picture",
            [one for one in left_out_records if one.reason == NO_IMAGE_REASON],
        ),
    )
    return "; ".join(f"{len(some)} {kind}, the first: {some[0]}" for kind, some in kinds if some)


def make_ids_unique(questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
    """Return the questions with ids of their own: one that is there several times gets its record.

    An id is a label that the data give, and several records may have the same; `7/1` of the third
    record then becomes `7#3/1`.
    """
    seen = Counter(one.sample.id for one in questions)
    return [one if seen[one.sample.id] == 1 else _add_record_to_id(one) for one in questions]


def _add_record_to_id(question: EvalQuestion) -> EvalQuestion:
    name, _, turn = question.sample.id.rpartition("/")
    sample = replace(question.sample, id=f"{name}#{question.record_number}/{turn}")
    return replace(question, sample=sample)


def _questions_by_turn(sample: Sample, record_number: str) -> list[EvalQuestion]:
    found = []
    for number, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        before = sample.turns[:number]
        shown = sum(t.text.count(IMAGE_PLACEHOLDER) for t in before)
        asked = replace(
            sample, id=f"{sample.id}/{number}", turns=before, images=sample.images[:shown]
        )
        found.append(EvalQuestion(asked, turn.text.strip(), "", sample.language, record_number))
    return found


def blank_images(
    questions: Sequence[EvalQuestion], mean_colour: tuple[float, float, float]
) -> list[EvalQuestion]:
    """Return the same questions with the mean colour instead of every picture."""
    return [
        _with_images(q, tuple(blank_image(p, mean_colour) for p in q.sample.images))
        for q in questions
    ]


def shuffle_images(questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
    """Return the same questions with the pictures exchanged: each becomes the next of the set."""
    pictures = list(dict.fromkeys(p for q in questions for p in q.sample.images))
    other = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    return [_with_images(q, tuple(other[p] for p in q.sample.images)) for q in questions]


def _with_images(question: EvalQuestion, images: tuple[LazyImage, ...]) -> EvalQuestion:
    return replace(question, sample=replace(question.sample, images=images))
