"""A question of a benchmark, and what a protocol makes of it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage


@dataclass(frozen=True)
class RecordImage:
    """A picture of a record as the bytes of its file, decoded when it is opened."""

    record_id: str
    """Id of its record."""
    file_name: str
    """Name of its file, as the benchmark gave it."""
    image_bytes: bytes = field(repr=False)
    """Empty where the data name a picture and do not have it."""

    @property
    def name(self) -> str:
        """Name record and file."""
        return f"record {self.record_id}: picture {self.file_name}"

    def open(self) -> Image.Image:
        """Return it in RGB, or raise a Mistake that names record and file."""
        return open_image_bytes(self.image_bytes, self.name)

    def open_draft(self, side: int) -> Image.Image:
        """Return it in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_image_bytes(self.image_bytes, self.name, side)


@dataclass(frozen=True)
class BenchmarkRecord:
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
    images: Mapping[str, RecordImage]
    """In the order of the data: MMMU by column (image_1), CMMMU by the name of the file."""


@dataclass(frozen=True)
class BenchmarkPrompt:
    """What a protocol asks a model."""

    text: str
    """As the reference writes it, without the places of the pictures."""
    images: tuple[LazyImage, ...]
    """What the model is shown, in this order."""

    @property
    def user_turn(self) -> ChatTurn:
        """The user's turn: the places on a line of their own, then the text."""
        places = " ".join([IMAGE_PLACEHOLDER] * len(self.images))
        return ChatTurn("human", f"{places}\n{self.text}" if places else self.text)


class SkippedRecord(Exception):
    """A protocol does not ask about a record: the reference leaves it out, or breaks on it."""

    @property
    def reason(self) -> str:
        """Why, in half a line."""
        return str(self)


@dataclass(frozen=True)
class GenerationLimits:
    """How a protocol lets a model answer."""

    max_new_tokens: int
    stop: str = ""
    """Text at which the answer is cut; empty for that of the model's own template."""
    reference_difference: str = ""
    """What the reference does besides that a greedy answer is not; for the report."""


def has_option(letter: str, options: Sequence[str]) -> bool:
    """Tell whether a letter of an answer, of either case, means one of the options."""
    place = ord(letter.upper()) - ord("A") if len(letter.upper()) == 1 else -1
    return 0 <= place < len(options)
