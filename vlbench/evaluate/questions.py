"""Questions with known answers: the held-out ones of the rendered world, or a user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlbench.data.images import blank
from vlbench.data.sample import PLACEHOLDER, Picture, Sample, Source
from vlbench.data.scenes import held_out
from vlbench.mistakes import BadSample, Mistake

TEXT_ONLY = "has no picture"


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a human turn, and the answer that is right."""

    sample: Sample
    """Turns up to the question; its id is the question's id."""
    answer: str
    type: str
    """Kind of question, for example colour; "" if unknown."""
    language: str
    record: str = ""
    """Number of its record in the source, from 1; "" for a rendered scene."""

    @property
    def text(self) -> str:
        """The last line of the question: without the places of its pictures."""
        return self.sample.turns[-1].text.split("\n")[-1]


@dataclass(frozen=True)
class LeftOut:
    """A record of a source that nothing is asked about, and why."""

    id: str
    record: int
    """Its number in the source, from 1."""
    reason: str

    def __str__(self) -> str:
        """Name it."""
        number = f"record {self.record}"
        return f"{number if self.id == number else f'{number} ({self.id})'}: {self.reason}"


def scene_questions(which: str) -> list[Question]:
    """Return a held-out set of the rendered world: "new" pictures or "unseen" attribute pairs."""
    return [
        Question(_unanswered(one.sample()), one.answer, one.type, one.language)
        for one in held_out(which)
    ]


def _unanswered(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[:1])


def source_questions(source: Source, limit: int) -> list[Question]:
    """Return the questions of `look_through`; what is left out is counted, and its first is named.

    Their ids differ from each other, as those of `told_apart`.
    """
    questions, left_out = look_through(source, limit)
    if left_out:
        print(f"{source.name}: nothing is asked about {told(left_out)}")
    return told_apart(questions)


def look_through(source: Source, limit: int) -> tuple[list[Question], list[LeftOut]]:
    """Return one question per assistant turn of the first samples with an image, at most `limit`.

    What was said before stands in the conversation as it is in the data. Left out are bad samples,
    those with a picture that cannot be read, and those without one.
    """
    questions: list[Question] = []
    left_out: list[LeftOut] = []
    for index in range(len(source)):
        if len(questions) >= limit:
            break
        name, reason = "", ""
        try:
            sample = source[index]
            name = sample.id
            for picture in sample.pictures:
                picture.open()
        except BadSample as error:
            name, reason = error.sample_id, error.reason
        except Mistake as error:
            reason = str(error)
        else:
            reason = "" if sample.pictures else TEXT_ONLY
        if reason:
            left_out.append(LeftOut(name, index + 1, reason))
        else:
            questions += _turn_by_turn(sample, str(index + 1))
    return questions[:limit], left_out


def told(left_out: Sequence[LeftOut]) -> str:
    """Return how many records are left out for which kind of reason, and the first of each."""
    kinds = (
        ("bad samples", [one for one in left_out if one.reason != TEXT_ONLY]),
        ("samples without a picture", [one for one in left_out if one.reason == TEXT_ONLY]),
    )
    return "; ".join(f"{len(some)} {kind}, the first: {some[0]}" for kind, some in kinds if some)


def told_apart(questions: Sequence[Question]) -> list[Question]:
    """Return the questions with ids of their own: one that is there several times gets its record.

    An id is a label that the data give, and several records may have the same; `7/1` of the third
    record then becomes `7#3/1`.
    """
    seen = Counter(one.sample.id for one in questions)
    return [one if seen[one.sample.id] == 1 else _numbered(one) for one in questions]


def _numbered(question: Question) -> Question:
    name, _, turn = question.sample.id.rpartition("/")
    sample = replace(question.sample, id=f"{name}#{question.record}/{turn}")
    return replace(question, sample=sample)


def _turn_by_turn(sample: Sample, record: str) -> list[Question]:
    found = []
    for number, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        before = sample.turns[:number]
        shown = sum(t.text.count(PLACEHOLDER) for t in before)
        asked = replace(
            sample, id=f"{sample.id}/{number}", turns=before, pictures=sample.pictures[:shown]
        )
        found.append(Question(asked, turn.text.strip(), "", sample.language, record))
    return found


def blanked(questions: Sequence[Question], mean: tuple[float, float, float]) -> list[Question]:
    """Return the same questions with the mean colour instead of every picture."""
    return [_with(q, tuple(blank(p, mean) for p in q.sample.pictures)) for q in questions]


def shuffled(questions: Sequence[Question]) -> list[Question]:
    """Return the same questions with the pictures exchanged: each becomes the next of the set."""
    pictures = list(dict.fromkeys(p for q in questions for p in q.sample.pictures))
    other = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
    return [_with(q, tuple(other[p] for p in q.sample.pictures)) for q in questions]


def _with(question: Question, pictures: tuple[Picture, ...]) -> Question:
    return replace(question, sample=replace(question.sample, pictures=pictures))
