"""The pictures of a page: thumbnails of what was asked about, each once, and heat for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlbench.compare.report.finished_runs import FinishedRun
from vlbench.config import recipe as recipes
from vlbench.data.image_processing import ImageTransform
from vlbench.data.sample import IMAGE_PLACEHOLDER, LazyImage
from vlbench.errors import UserError
from vlbench.evaluate.heldout_questions import EvalQuestion
from vlbench.evaluate.run_results import final_questions
from vlbench.html_pages import image_data_uri

THUMBNAIL_SIZE = 160  # pixels, the longest side of a thumbnail
MAX_IMAGES_SHOWN = 3  # pictures of a question, at most
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the colour of the margins (Radford et al. 2021)
HEATMAP_COLOR = (213, 94, 0)  # Okabe and Ito's vermilion
HEATMAP_OPACITY = 0.85  # opacity of the hottest patch


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


def heatmap_uri(patch_values: Sequence[Sequence[float]]) -> str:
    """Return a map of patches as a picture to lay over another: the more, the less is seen through.

    The largest value of the map has the full colour.
    """
    share = np.asarray(patch_values, float)
    share = np.clip(share / max(float(share.max()), 1e-12), 0, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = HEATMAP_COLOR
    pixels[..., 3] = np.round(255 * HEATMAP_OPACITY * share)
    return png_data_uri(Image.fromarray(pixels))


def png_data_uri(image: Image.Image) -> str:
    """Return a picture as a data URI in PNG."""
    return image_data_uri(image, "PNG", optimize=True)
