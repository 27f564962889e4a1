"""Questions with known answers: the held-out ones of the rendered world, or a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlbench.data.images import blank
from vlbench.data.sample import PLACEHOLDER, Picture, Sample, Source
from vlbench.data.scenes import held_out
from vlbench.mistakes import Mistake


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a human turn, and the answer that is right."""

    sample: Sample
    """Turns up to the question; its id is the question's id."""
    answer: str
    type: str
    """Kind of question, for example colour; "" if unknown."""
    language: str

    @property
    def text(self) -> str:
        """The last line of the question: without the places of its pictures."""
        return self.sample.turns[-1].text.split("\n")[-1]


def scene_questions(which: str) -> list[Question]:
    """Return a held-out set of the rendered world: "new" pictures or "unseen" attribute pairs."""
    return [
        Question(_unanswered(one.sample()), one.answer, one.type, one.language)
        for one in held_out(which)
    ]


def _unanswered(sample: Sample) -> Sample:
    return replace(sample, turns=sample.turns[:1])


def source_questions(source: Source, limit: int) -> list[Question]:
    """Return one question per assistant turn of the first samples with an image, at most `limit`.

    What was said before stands in the conversation as it is in the data. Bad samples are left out,
    and so are those with a picture that cannot be read; the first of these is named.
    """
    questions: list[Question] = []
    bad: list[Mistake] = []
    for index in range(len(source)):
        if len(questions) >= limit:
            break
        try:
            sample = source[index]
            for picture in sample.pictures:
                picture.open()
        except Mistake as error:
            bad.append(error)
            continue
        questions += _turn_by_turn(sample) if sample.pictures else []
    if bad:
        print(f"{source.name}: nothing is asked about {len(bad)} bad samples, the first: {bad[0]}")
    return questions[:limit]


def _turn_by_turn(sample: Sample) -> list[Question]:
    found = []
    for number, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        before = sample.turns[:number]
        shown = sum(t.text.count(PLACEHOLDER) for t in before)
        asked = replace(
            sample, id=f"{sample.id}/{number}", turns=before, pictures=sample.pictures[:shown]
        )
        found.append(Question(asked, turn.text.strip(), "", sample.language))
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
