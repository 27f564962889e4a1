"""The question examples of a page: those on which rows disagree, their texts and thumbnails."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.finished_runs import FinishedRun
from vlbench.config import recipe as recipes
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample_encoding import IMAGE_PLACEHOLDER, LazyImage
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.run_results import final_questions
from vlbench.html_pages import image_data_uri

MAX_QUESTIONS_SHOWN = 6  # questions, each way
MAX_OPPONENTS = 3  # rows that the best one is set against
THUMBNAIL_SIZE = 160  # pixels, the longest side of a thumbnail
MAX_IMAGES_SHOWN = 3  # pictures of a question, at most
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the colour of the margins (Radford et al. 2021)


@dataclass(frozen=True)
class RowAnswers:
    """What a row answered to a question, in the order of the seeds."""

    row_name: str
    grouped_answers: list[tuple[str, list[bool]]]
    """An answer and, for each of the seeds in a row that gave it, whether it was right."""


@dataclass(frozen=True)
class QuestionDisagreement:
    """A question on which two rows part."""

    question_id: str
    truth: str
    type_and_language: str
    """Its type and language."""
    answers: tuple[RowAnswers, RowAnswers]
    """Of the row that is right, and of the other."""


@dataclass(frozen=True)
class RowDisagreements:
    """Questions that `winner` gets right in most seeds and `loser` wrong in most."""

    winner: str
    loser: str
    count: int
    """How many there are in all."""
    shown: list[QuestionDisagreement]


def wins_and_losses(rows: Sequence[RowResult], questions: Sequence[str]) -> list[RowDisagreements]:
    """Return the cases of the best row against each of the next ones, both ways."""
    best = rows[0]
    return [
        one
        for other in rows[1 : 1 + MAX_OPPONENTS]
        for one in (
            find_disagreements(best, other, questions),
            find_disagreements(other, best, questions),
        )
    ]


def find_disagreements(
    winner: RowResult, loser: RowResult, questions: Sequence[str]
) -> RowDisagreements:
    """Return where `winner` is right and `loser` wrong in most seeds, the clearest first."""
    won, lost = winner.correct.mean(axis=0), loser.correct.mean(axis=0)
    parted = [index for index in range(len(questions)) if won[index] > 0.5 > lost[index]]
    parted.sort(key=lambda index: lost[index] - won[index])
    shown = [
        _make_disagreement(winner, loser, questions[index])
        for index in parted[:MAX_QUESTIONS_SHOWN]
    ]
    return RowDisagreements(winner.name, loser.name, len(parted), shown)


def _make_disagreement(
    winner: RowResult, loser: RowResult, question_id: str
) -> QuestionDisagreement:
    first = winner.runs[0]
    return QuestionDisagreement(
        question_id=question_id,
        truth=first.answers_and_truths[question_id][1],
        type_and_language=", ".join(
            part for part in first.types_and_languages[question_id] if part
        ),
        answers=(_group_answers(winner, question_id), _group_answers(loser, question_id)),
    )


def _group_answers(row: RowResult, question_id: str) -> RowAnswers:
    each = [(run.answers_and_truths[question_id][0], run.correct[question_id]) for run in row.runs]
    alike = itertools.groupby(each, key=lambda one: one[0])
    return RowAnswers(row.name, [(text, [right for _, right in ones]) for text, ones in alike])


class Thumbnail(NamedTuple):
    """A small picture inside of the page."""

    element_id: str
    """Its id in the page."""
    data_uri: str
    width: int
    height: int


class QuestionThumbnails:
    """The questions of a comparison with their pictures, as far as they can be opened here."""

    def __init__(self, run: FinishedRun) -> None:
        """Find the questions that `run` was asked, by its recipe."""
        self._truths = {one: truth for one, (_, truth) in run.answers_and_truths.items()}
        self._thumbnails: dict[tuple[str, bool], Thumbnail] = {}
        self.problem = ""
        """Why pictures or texts are missing on the page, "" if none is."""
        self._questions: dict[str, EvalQuestion] = {}
        try:
            asked = final_questions(recipes.load_recipe_file(Path(run.folder / "recipe.yaml")))[1]
        except (UserError, OSError) as error:
            self.problem = str(error)
            return
        self._questions = {one.sample.id: one for one in asked}

    @property
    def used_thumbnails(self) -> list[Thumbnail]:
        """Everything that was asked for so far."""
        return list(self._thumbnails.values())

    def question_text(self, question_id: str) -> str:
        """Return the text of a question; its id, if the data are not here."""
        found = self._find_question(question_id)
        if found is None:
            return question_id
        return found.sample.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()

    def question_thumbnails(self, question_id: str) -> list[Thumbnail]:
        """Return the pictures of a question, [] if they cannot be opened."""
        found = self._find_question(question_id)
        shown = found.sample.images[:MAX_IMAGES_SHOWN] if found else ()
        thumbnails = [self._make_thumbnail(picture, square=False) for picture in shown]
        return [one for one in thumbnails if one]

    def square_thumbnail(self, question_id: str) -> Thumbnail | None:
        """Return the first picture of a question as the tower sees it: padded to a square."""
        found = self._find_question(question_id)
        if found is None or not found.sample.images:
            return None
        return self._make_thumbnail(found.sample.images[0], square=True)

    def _find_question(self, question_id: str) -> EvalQuestion | None:
        found = self._questions.get(question_id)
        known = self._truths.get(question_id)
        if found is None or (known and found.answer != known):
            self.problem = (
                self.problem or f"question {question_id} is not in the data as they are now"
            )
            return None
        return found

    def _make_thumbnail(self, lazy_image: LazyImage, square: bool) -> Thumbnail | None:
        name = (lazy_image.name, square)
        if name not in self._thumbnails:
            try:
                image = lazy_image.open()
            except (UserError, OSError) as error:
                self.problem = self.problem or str(error)
                return None
            small = _pad_to_square(image) if square else _shrink_image(image)
            self._thumbnails[name] = Thumbnail(
                f"picture-{len(self._thumbnails)}", png_data_uri(small), *small.size
            )
        return self._thumbnails[name]


def _shrink_image(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return small


def _pad_to_square(image: Image.Image) -> Image.Image:
    return Image.fromarray(
        ImageTransform(THUMBNAIL_SIZE, THUMBNAIL_SIZE, CLIP_MEAN, (1.0, 1.0, 1.0)).resize_and_crop(
            image
        )
    )


def png_data_uri(image: Image.Image) -> str:
    """Return a picture as a data URI in PNG."""
    return image_data_uri(image, "PNG", optimize=True)
