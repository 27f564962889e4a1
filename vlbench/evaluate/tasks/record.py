"""A question of a benchmark, and what a protocol makes of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlbench.data.images import open_bytes
from vlbench.data.sample import PLACEHOLDER, Picture, Turn


@dataclass(frozen=True)
class Packed:
    """A picture of a record as the bytes of its file, decoded when it is opened."""

    record: str
    """Id of its record."""
    file: str
    """Name of its file, as the benchmark gave it."""
    data: bytes = field(repr=False)
    """Empty where the data name a picture and do not have it."""

    @property
    def name(self) -> str:
        """Name record and file."""
        return f"record {self.record}: picture {self.file}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names record and file."""
        return open_bytes(self.data, self.name)

    def drafted(self, side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_bytes(self.data, self.name, side)


@dataclass(frozen=True)
class Record:
    """A question of a benchmark as its data have it."""

    id: str
    task: str
    """mmmu or cmmmu."""
    subject: str
    """MMMU: one of 30 subjects; CMMMU: the subcategory."""
    category: str
    """CMMMU: one of 6 categories; MMMU: empty, its subjects say it."""
    type: str
    """MMMU: multiple-choice or open; CMMMU: 选择 (one or several letters), 判断, 填空."""
    question: str
    """With its tags: MMMU `<image 1>`, CMMMU `<img="q_11011_001.png">`."""
    options: tuple[str, ...]
    """Texts of the options, tags included, the first is A; empty without a choice."""
    answer: str | tuple[str, ...] | None
    """The right answer, all of them where several are right, None where it is withheld."""
    pictures: Mapping[str, Packed]
    """In the order of the data: MMMU by column (image_1), CMMMU by the name of the file."""


@dataclass(frozen=True)
class Prompt:
    """What a protocol asks a model."""

    text: str
    """As the reference writes it, without the places of the pictures."""
    pictures: tuple[Picture, ...]
    """What the model is shown, in this order."""

    @property
    def turn(self) -> Turn:
        """The user's turn: the places on a line of their own, then the text."""
        places = " ".join([PLACEHOLDER] * len(self.pictures))
        return Turn("human", f"{places}\n{self.text}" if places else self.text)


class Skipped(Exception):
    """A protocol does not ask about a record: the reference leaves it out, or breaks on it."""

    @property
    def reason(self) -> str:
        """Why, in half a line."""
        return str(self)


@dataclass(frozen=True)
class Generation:
    """How a protocol lets a model answer."""

    max_new_tokens: int
    stop: str = ""
    """Text at which the answer is cut; empty for that of the model's own template."""
    differs: str = ""
    """What the reference does besides that a greedy answer is not; for the report."""


def has_option(letter: str, options: Sequence[str]) -> bool:
    """Tell whether a letter of an answer, of either case, means one of the options."""
    place = ord(letter.upper()) - ord("A") if len(letter.upper()) == 1 else -1
    return 0 <= place < len(options)
