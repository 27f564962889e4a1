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
from vlbench.compare.report.row_pairs import RowPair
from vlbench.config import recipe as recipes
from vlbench.data.image_folder import page_refusal
from vlbench.data.sample import IMAGE_PLACEHOLDER, LazyImage
from vlbench.data.square_images import open_whole
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion, final_questions
from vlbench.html_pages import image_data_uri

MAX_QUESTIONS_SHOWN = 6  # of a winner and a loser
MAX_OPPONENTS = 3  # rows that the best one is compared with
THUMBNAIL_SIZE = 160  # pixels, the longest side of a thumbnail
MAX_IMAGES_SHOWN = 3  # of a question


@dataclass(frozen=True)
class RowAnswers:
    """The answers of a row to a question, in the order of the seeds."""

    row_name: str
    grouped_answers: list[tuple[str, list[bool]]]
    """An answer and, for each of the consecutive seeds that gave it, whether it is right."""


@dataclass(frozen=True)
class QuestionDisagreement:
    """A question that one row answers right and another wrong."""

    question_id: str
    truth: str
    type_and_language: str
    """Type and language, joined by a comma."""
    answers: tuple[RowAnswers, RowAnswers]
    """Answers of the winner and of the loser."""


@dataclass(frozen=True)
class RowDisagreements:
    """Questions that `winner` answers right in most seeds and `loser` wrong in most."""

    winner: str
    loser: str
    count: int
    """Number of such questions; at most `MAX_QUESTIONS_SHOWN` are in `shown`."""
    shown: list[QuestionDisagreement]


def wins_and_losses(
    rows: Sequence[RowResult], questions: Sequence[str], tested: Sequence[RowPair] | None = None
) -> list[RowDisagreements]:
    """Return the disagreements of the best row with each of the next ones, in both directions.

    Where only some pairs are `tested`, they are those of the pairs that differ most.
    """
    opponents = [(rows[0], opponent) for opponent in rows[1 : 1 + MAX_OPPONENTS]]
    if tested is not None:
        by_name = {row.name: row for row in rows}
        largest = sorted(tested, key=lambda pair: -pair.difference.mean)[:MAX_OPPONENTS]
        opponents = [(by_name[pair.better], by_name[pair.worse]) for pair in largest]
    return [
        find_disagreements(winner, loser, questions)
        for better, worse in opponents
        for winner, loser in ((better, worse), (worse, better))
    ]


def find_disagreements(
    winner: RowResult, loser: RowResult, questions: Sequence[str]
) -> RowDisagreements:
    """Return the questions with `winner` right and `loser` wrong in most seeds, clearest first."""
    won, lost = winner.correct.mean(axis=0), loser.correct.mean(axis=0)
    indices = [index for index in range(len(questions)) if won[index] > 0.5 > lost[index]]
    indices.sort(key=lambda index: lost[index] - won[index])
    shown = [
        _make_disagreement(winner, loser, questions[index])
        for index in indices[:MAX_QUESTIONS_SHOWN]
    ]
    return RowDisagreements(winner.name, loser.name, len(indices), shown)


def _make_disagreement(
    winner: RowResult, loser: RowResult, question_id: str
) -> QuestionDisagreement:
    run = winner.runs[0]
    return QuestionDisagreement(
        question_id=question_id,
        truth=run.answers_and_truths[question_id][1],
        type_and_language=", ".join(part for part in run.types_and_languages[question_id] if part),
        answers=(_group_answers(winner, question_id), _group_answers(loser, question_id)),
    )


def _group_answers(row: RowResult, question_id: str) -> RowAnswers:
    answers = [
        (run.answers_and_truths[question_id][0], run.correct[question_id]) for run in row.runs
    ]
    groups = itertools.groupby(answers, key=lambda answer: answer[0])
    return RowAnswers(row.name, [(text, [right for _, right in group]) for text, group in groups])


class Thumbnail(NamedTuple):
    """A small image embedded in the page."""

    element_id: str
    """The id of its element in the page."""
    data_uri: str
    width: int
    height: int


class QuestionThumbnails:
    """Texts and thumbnails of questions, as far as their data can be opened on this machine."""

    def __init__(self, run: FinishedRun) -> None:
        """Load the questions that `run` was asked from the data of its recipe."""
        self._truths = {name: truth for name, (_, truth) in run.answers_and_truths.items()}
        self._thumbnails: dict[str, Thumbnail] = {}
        self._exif = False
        self.problem = ""
        """Why images or texts are missing on the page, "" if none is."""
        self._questions: dict[str, EvalQuestion] = {}
        try:
            recipe = recipes.load_recipe_file(Path(run.folder / "recipe.yaml"))
            _, questions, _ = final_questions(recipe.last_stage_data, recipe.log.questions)
        except (UserError, OSError) as error:
            self.problem = str(error)
            return
        self._questions = {question.sample.id: question for question in questions}
        self._exif = recipe.model.apply_exif

    @property
    def used_thumbnails(self) -> list[Thumbnail]:
        """All thumbnails that were requested so far."""
        return list(self._thumbnails.values())

    def question_text(self, question_id: str) -> str:
        """Return the text of a question; its id if the data cannot be opened."""
        question = self._find_question(question_id)
        if question is None:
            return question_id
        return question.sample.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()

    def question_thumbnails(self, question_id: str) -> list[Thumbnail]:
        """Return the images of a question, [] if they cannot be opened."""
        question = self._find_question(question_id)
        images = question.sample.images[:MAX_IMAGES_SHOWN] if question else ()
        thumbnails = [self._make_thumbnail(image) for image in images]
        return [thumbnail for thumbnail in thumbnails if thumbnail]

    def first_thumbnail(self, question_id: str) -> Thumbnail | None:
        """Return the first image of a question, of which the maps are; None without it."""
        question = self._find_question(question_id)
        if question is None or not question.sample.images:
            return None
        return self._make_thumbnail(question.sample.images[0])

    def _find_question(self, question_id: str) -> EvalQuestion | None:
        question = self._questions.get(question_id)
        truth = self._truths.get(question_id)
        if question is None or (truth and question.answer != truth):
            self.problem = (
                self.problem or f"question {question_id} is not in the data as they are now"
            )
            return None
        return question

    def _make_thumbnail(self, lazy_image: LazyImage) -> Thumbnail | None:
        key = lazy_image.name
        if key not in self._thumbnails:
            refusal = page_refusal(lazy_image)
            if refusal:
                self.problem = self.problem or refusal
                return None
            try:
                image = open_whole(lazy_image, self._exif)
            except (UserError, OSError) as error:
                self.problem = self.problem or str(error)
                return None
            small = _shrink_image(image)
            self._thumbnails[key] = Thumbnail(
                f"image-{len(self._thumbnails)}", png_data_uri(small), *small.size
            )
        return self._thumbnails[key]


def _shrink_image(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    return small


def png_data_uri(image: Image.Image) -> str:
    """Return an image as a PNG data URI."""
    return image_data_uri(image, "PNG", optimize=True)
