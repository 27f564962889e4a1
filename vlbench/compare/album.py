"""The pictures of a page: thumbnails of what was asked about, each once, and heat for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlbench import recipe as recipes
from vlbench.compare.runs import Finished
from vlbench.data.images import ImageTransform
from vlbench.data.sample import PLACEHOLDER, Picture
from vlbench.evaluate.questions import Question
from vlbench.evaluate.results import questions_of
from vlbench.html import uri
from vlbench.mistakes import Mistake

SIDE = 160  # pixels, the longest side of a thumbnail
SHOWN = 3  # pictures of a question, at most
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the colour of the margins (Radford et al. 2021)
HOT = (213, 94, 0)  # Okabe and Ito's vermilion
VEIL = 0.85  # opacity of the hottest patch


class Thumbnail(NamedTuple):
    """A small picture inside of the page."""

    key: str
    """Its id in the page."""
    uri: str
    width: int
    height: int


class Album:
    """The questions of a comparison with their pictures, as far as they can be opened here."""

    def __init__(self, run: Finished) -> None:
        """Find the questions that `run` was asked, by its recipe."""
        self._truths = {one: truth for one, (_, truth) in run.texts.items()}
        self._found: dict[tuple[str, bool], Thumbnail] = {}
        self.problem = ""
        """Why pictures or texts are missing on the page, "" if none is."""
        self._questions: dict[str, Question] = {}
        try:
            asked = questions_of(recipes.load_file(Path(run.folder / "recipe.yaml")))[1]
        except (Mistake, OSError) as error:
            self.problem = str(error)
            return
        self._questions = {one.sample.id: one for one in asked}

    @property
    def thumbnails(self) -> list[Thumbnail]:
        """Everything that was asked for so far."""
        return list(self._found.values())

    def text(self, question: str) -> str:
        """Return the text of a question; its id, if the data are not here."""
        found = self._question(question)
        if found is None:
            return question
        return found.sample.turns[-1].text.replace(PLACEHOLDER, "").strip()

    def pictures(self, question: str) -> list[Thumbnail]:
        """Return the pictures of a question, [] if they cannot be opened."""
        found = self._question(question)
        shown = found.sample.pictures[:SHOWN] if found else ()
        thumbnails = [self._thumbnail(picture, square=False) for picture in shown]
        return [one for one in thumbnails if one]

    def square(self, question: str) -> Thumbnail | None:
        """Return the first picture of a question as the tower sees it: padded to a square."""
        found = self._question(question)
        if found is None or not found.sample.pictures:
            return None
        return self._thumbnail(found.sample.pictures[0], square=True)

    def _question(self, name: str) -> Question | None:
        found = self._questions.get(name)
        known = self._truths.get(name)
        if found is None or (known and found.answer != known):
            self.problem = self.problem or f"question {name} is not in the data as they are now"
            return None
        return found

    def _thumbnail(self, picture: Picture, square: bool) -> Thumbnail | None:
        name = (picture.name, square)
        if name not in self._found:
            try:
                image = picture.open()
            except (Mistake, OSError) as error:
                self.problem = self.problem or str(error)
                return None
            small = _square(image) if square else _small(image)
            self._found[name] = Thumbnail(f"picture-{len(self._found)}", png(small), *small.size)
        return self._found[name]


def _small(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


def _square(image: Image.Image) -> Image.Image:
    return Image.fromarray(ImageTransform(SIDE, SIDE, CLIP_MEAN, (1.0, 1.0, 1.0)).resized(image))


def heat(values: Sequence[Sequence[float]]) -> str:
    """Return a map of patches as a picture to lay over another: the more, the less is seen through.

    The largest value of the map has the full colour.
    """
    share = np.asarray(values, float)
    share = np.clip(share / max(float(share.max()), 1e-12), 0, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = HOT
    pixels[..., 3] = np.round(255 * VEIL * share)
    return png(Image.fromarray(pixels))


def png(image: Image.Image) -> str:
    """Return a picture as a data URI in PNG."""
    return uri(image, "PNG", optimize=True)
