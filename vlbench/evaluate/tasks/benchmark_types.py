"""MMMU and CMMMU as types: records, prompts, answers, scores, subjects. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.data.image_size import bytes_image_size
from vlbench.data.sample import IMAGE_PLACEHOLDER, ChatTurn, LazyImage
from vlbench.errors import UserError

UNKNOWN_SUBJECT = "unknown"

MMMU_SUBJECTS = (
    "Accounting",
    "Agriculture",
    "Architecture_and_Engineering",
    "Art",
    "Art_Theory",
    "Basic_Medical_Science",
    "Biology",
    "Chemistry",
    "Clinical_Medicine",
    "Computer_Science",
    "Design",
    "Diagnostics_and_Laboratory_Medicine",
    "Economics",
    "Electronics",
    "Energy_and_Power",
    "Finance",
    "Geography",
    "History",
    "Literature",
    "Manage",
    "Marketing",
    "Materials",
    "Math",
    "Mechanical_Engineering",
    "Music",
    "Pharmacy",
    "Physics",
    "Psychology",
    "Public_Health",
    "Sociology",
)
"""In the order in which the benchmark's own scripts evaluate them."""

CMMMU_CATEGORIES = {
    "art_and_design": "艺术与设计",
    "business": "商业",
    "science": "科学",
    "health_and_medicine": "健康与医学",
    "humanities_and_social_sciences": "人文社会科学",
    "technology_and_engineering": "技术与工程",
}
"""Names of folders and configurations -> names in the records, in the benchmark's order."""

MMMU_CHOICE_TYPE = "multiple-choice"  # every other type of MMMU is an open question
CMMMU_CHOICE_TYPE, CMMMU_JUDGEMENT_TYPE, CMMMU_FILL_IN_TYPE = "选择", "判断", "填空"


@dataclass(frozen=True)
class RecordImage:
    """An image of a record as the bytes of its file, decoded when it is opened."""

    record_id: str
    file_name: str
    """As the benchmark gives it."""
    image_bytes: bytes = field(repr=False)
    """Empty where the data name an image without containing it."""

    @property
    def name(self) -> str:
        """Name record and file."""
        return f"record {self.record_id}: image {self.file_name}"

    @property
    def digest(self) -> str:
        """A name by its content: several records may show the same image."""
        return hashlib.sha256(self.image_bytes).hexdigest()[:16]

    def _require_bytes(self) -> bytes:
        """Return the bytes of the file, or raise a UserError where the data have none."""
        if not self.image_bytes:
            raise UserError(f"{self.name}: is named, and its file is missing in the data, or empty")
        return self.image_bytes

    def open(self) -> Image.Image:
        """Return the image in RGB, or raise a UserError that names record and file."""
        return open_image_bytes(self._require_bytes(), self.name)

    def read_size(self, exif: bool) -> tuple[int, int]:
        """Return width and height in pixels from the header."""
        return bytes_image_size(self._require_bytes(), self.name, exif)

    def open_draft(self, side: int) -> Image.Image:
        """Return the image in RGB; a JPEG may be decoded smaller, its longest edge >= `side`."""
        return open_image_bytes(self._require_bytes(), self.name, side)


@dataclass(frozen=True)
class BenchmarkRecord:
    """A question of a benchmark as its data have it."""

    id: str
    task: str
    """mmmu or cmmmu."""
    subject: str
    """MMMU: one of 30 subjects; CMMMU: the subcategory."""
    category: str
    """CMMMU: one of 6 categories; MMMU: empty."""
    type: str
    """MMMU: multiple-choice or open; CMMMU: 选择 (one or several letters), 判断, 填空."""
    question: str
    """With its image tags: MMMU `<image 1>`, CMMMU `<img="q_11011_001.png">`."""
    options: tuple[str, ...]
    """Texts of the options, tags included, the first is A; empty for other types of question."""
    answer: str | tuple[str, ...] | None
    """The right answer, all of them where several are right, None where it is withheld."""
    images: Mapping[str, RecordImage]
    """In the order of the data: MMMU by column (image_1), CMMMU by the name of the file."""

    @property
    def json_answer(self) -> str | list[str] | None:
        """The right answer as JSON holds it: several are a list."""
        return list(self.answer) if isinstance(self.answer, tuple) else self.answer


@dataclass(frozen=True)
class BenchmarkPrompt:
    """What a protocol asks a model about a record."""

    text: str
    """As the reference writes it, without image placeholders."""
    images: tuple[LazyImage, ...]
    """The images that the model gets, in this order."""

    @property
    def user_turn(self) -> ChatTurn:
        """The user's turn: the image placeholders on a line of their own, then the text."""
        placeholders = " ".join([IMAGE_PLACEHOLDER] * len(self.images))
        return ChatTurn("human", f"{placeholders}\n{self.text}" if placeholders else self.text)


class SkippedRecord(Exception):
    """A protocol does not ask about a record: the reference skips it, or fails on it."""

    @property
    def reason(self) -> str:
        """Why, in half a line."""
        return str(self)


@dataclass(frozen=True)
class GenerationLimits:
    """How a protocol lets a model answer."""

    max_new_tokens: int
    stop: str = ""
    """Text at which the answer is cut; empty for the stop text of the model's own template."""
    reference_difference: str = ""
    """How the reference generates, where that is more than a greedy answer; for the report."""


@dataclass(frozen=True)
class AnsweredItem:
    """One answered question; `options` are in the order of their letters, `answer` is the truth.

    `answer` is a list where several are right. `response`, and an option, may be no text: some
    scorers accept that, as the benchmarks' own code does, and the others raise a UserError.
    """

    id: str | int
    type: str
    options: Sequence[str | None]
    answer: Any
    response: Any
    subject: str = ""


@dataclass(frozen=True)
class ScoredItem:
    """An item, the answer that was parsed from its response, and whether that is right.

    `prediction` is a letter or word, a list of texts and numbers, or None where nothing could be
    parsed; `fallback` says that it was drawn at random because nothing could be parsed.
    """

    item: AnsweredItem
    prediction: Any
    correct: bool
    fallback: bool


def option_letters(options: Sequence[object]) -> str:
    """Return the letters of the options: A, B, C ..."""
    return string.ascii_uppercase[: len(options)]


def has_option(letter: str, options: Sequence[str]) -> bool:
    """Return whether a letter of an answer, of either case, stands for one of the options."""
    index = ord(letter.upper()) - ord("A") if len(letter.upper()) == 1 else -1
    return 0 <= index < len(options)


def require_text(item: AnsweredItem, value: object, value_name: str) -> str:
    """Return `value` if it is text; else raise a UserError, as the reference code fails there."""
    if not isinstance(value, str):
        given = json.dumps(value, ensure_ascii=False, default=str)
        raise UserError(f"{item.id}: {value_name} is {given:.60}; it must be text")
    return value


@dataclass(frozen=True)
class SubjectDomains:
    """The subjects of each domain, and how the benchmark's code averages over them.

    `pools_accuracies`: it averages accuracies weighted by numbers of questions, rather than
    dividing sums of right answers; that can differ in the last digit of a float, and so in the last
    digit that is printed.
    """

    domains: Mapping[str, tuple[str, ...]]
    pools_accuracies: bool

    def domain_of(self, subject: str) -> str:
        """Return the domain of a subject, or of a domain itself; "unknown" for any other name."""
        for domain, subjects in self.domains.items():
            if subject == domain or subject in subjects:
                return domain
        return UNKNOWN_SUBJECT


# MMMU's `data_utils.py`; Psychology is in the humanities (Yi's own copy has it in science).
MMMU_DOMAINS = SubjectDomains(
    {
        "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
        "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
        "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
        "Health and Medicine": (
            "Basic_Medical_Science",
            "Clinical_Medicine",
            "Diagnostics_and_Laboratory_Medicine",
            "Pharmacy",
            "Public_Health",
        ),
        "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
        "Tech and Engineering": (
            "Agriculture",
            "Architecture_and_Engineering",
            "Computer_Science",
            "Electronics",
            "Energy_and_Power",
            "Materials",
            "Mechanical_Engineering",
        ),
    },
    pools_accuracies=True,
)

# The categories of CMMMU's files, and lmms-eval's map of their subcategories.
CMMMU_DOMAINS = SubjectDomains(
    {
        "艺术与设计": ("艺术", "艺术理论", "设计", "音乐"),
        "商业": ("会计", "经济", "金融", "管理", "营销"),
        "科学": ("生物", "化学", "地理", "数学", "物理"),
        "健康与医学": ("基础医学", "临床医学", "诊断学与实验室医学", "制药", "公共卫生"),
        "人文社会科学": ("历史", "文献学", "社会学", "心理学"),
        "技术与工程": (
            *("农业", "建筑学", "计算机科学", "电子学"),
            *("能源和电力", "材料", "机械工程"),
        ),
    },
    pools_accuracies=False,
)

SUBJECT_DOMAINS = {"mmmu": MMMU_DOMAINS, "cmmmu": CMMMU_DOMAINS}


def subject_or_category(task: str, subject: str, category: str) -> str:
    """Return the subject of a record where the benchmark's code knows it, else its category."""
    return subject if SUBJECT_DOMAINS[task].domain_of(subject) != UNKNOWN_SUBJECT else category


def subject_of_id(record_id: str) -> str:
    """Return the part of an id between the first and the last underscore, in MMMU its subject."""
    return "_".join(record_id.split("_")[1:-1])


def known_subject_of_id(task: str, record_id: str) -> str:
    """Return the subject that an id names (validation_Art_Theory_3: Art_Theory), or "unknown"."""
    subject = subject_of_id(record_id)
    known = SUBJECT_DOMAINS[task].domain_of(subject) != UNKNOWN_SUBJECT
    return subject if known else UNKNOWN_SUBJECT
