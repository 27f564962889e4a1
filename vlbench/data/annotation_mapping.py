"""Mappings of annotation files: what a few lines of YAML say of the layout of a data set.

They declare, and hold no code: see docs/reference/data_formats.md. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, field_validator

from vlbench.config.key_types import RecipeSection, key
from vlbench.data.mapping_texts import LinePattern, TextTemplate, parse_template
from vlbench.key_errors import check_file_keys
from vlbench.text_files import read_yaml

OWN_NAMES = ("split", "key", "box")
"""Names in texts that are no keys of the record, beside those of `join`."""


def _as_texts(value: Any) -> Any:
    """Return numbers, as YAML has them, as texts."""
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple(str(one) if type(one) is int else one for one in listed)


def _check_inside(value: str | None) -> str | None:
    """Refuse a file that is not below the folder."""
    if value is not None:
        parse_template(value)
        if PurePath(value).is_absolute() or ".." in PurePath(value).parts:
            raise ValueError(f"must be a file below the folder, given '{value}'")
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]
FileText = Annotated[str, AfterValidator(_check_inside)]


class FileRecords(RecipeSection):
    """Where records stand: in JSON below `at`, or a line each."""

    at: str | None = key(
        "keys down to the list of records, with dots; with * at the end down to a mapping, whose "
        "values are the records and whose keys are {key}; null: the file is a list, or JSON lines",
        None,
    )
    lines: str | None = key("pattern of a line, where the file is no JSON", None)

    def find_conflicts(self) -> Iterator[str]:
        """Yield that the file cannot be JSON and lines."""
        if self.lines is not None and self.at is not None:
            yield "takes at (JSON) or lines, not both"

    @field_validator("lines")
    @classmethod
    def _check_lines(cls, value: str | None) -> str | None:
        if value is not None:
            LinePattern(value)
        return value


class JoinedRecords(FileRecords):
    """Records of another list, one of which belongs to each record."""

    file: FileText | None = key("the file; null: that of the records", None)
    by: str = key("key of them by which they are found")
    of: str = key("path in the record to the same value")


class BoxText(RecipeSection):
    """A box as text, {box}: [x1, y1, x2, y2] as shares of the picture, in two decimals."""

    xywh: tuple[str, ...] | None = key("paths to left, top, width, height, or to a list", None)
    xyxy: tuple[str, ...] | None = key("paths to left, top, right, bottom, or to a list", None)
    size: tuple[str, str] = key("paths to the width and height of the picture in pixels")
    frame: Literal["square", "image"] = key(
        "shares of the picture padded to a square, as LLaVA's, or of the picture", "square"
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong with the paths to a box."""
        if (self.xywh is None) == (self.xyxy is None):
            yield "takes xywh or xyxy"
        if len(self.corners) not in (1, 4):
            yield f"has {len(self.corners)} paths to a box; expected four, or one"

    @property
    def corners(self) -> tuple[str, ...]:
        """The paths to the numbers of the box, or to their list."""
        return self.xywh or self.xyxy or ()


class AnnotationMapping(FileRecords):
    """How the samples of a data set are made of its annotation files."""

    records: FileText = key("file with the records, below the folder; {split} is the split's text")
    splits: dict[str, Texts] | None = key(
        "splits by name, each with the text or texts that {split} is; the first is the default",
        None,
    )
    where: dict[str, Texts] | None = key(
        "records are read whose key has this text, or one of these", None
    )
    join: dict[str, JoinedRecords] | None = key(
        "by a name for texts: another list, one of whose records belongs to each record", None
    )
    each: tuple[str, ...] = key("list, or lists side by side: an entry is a sample", ())
    turns: tuple[str, ...] = key("list, or lists side by side: an entry is a question", ())
    max_turns: int | None = key(
        "of longer lists so many entries are read, evenly spread", None, ge=1
    )
    id: str | None = key("text: the sample's id", None)
    image: str | None = key("text: the picture's file, below data.images or the folder", None)
    question: str | None = key("text: what is asked; null: the picture alone is shown", None)
    instruction: str | None = key("line behind the first question", None)
    answer: str = key("text: what is answered")
    box: BoxText | None = key("a box as text, {box}", None)
    get: str | None = key("where the files are from, for messages", None)

    @field_validator("id", "image", "question", "instruction", "answer")
    @classmethod
    def _check_text(cls, value: str | None) -> str | None:
        if value is not None:
            parse_template(value)
        return value

    @field_validator("splits", "where", "join")
    @classmethod
    def _check_not_empty(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not value:
            raise ValueError("is an empty mapping; leave it out")
        return value

    def find_conflicts(self) -> Iterator[str]:
        """Yield what is wrong between texts and the names that they use."""
        yield from super().find_conflicts()
        used = {path for text in self.texts.values() for path in text.paths}
        if "box" in used and self.box is None:
            yield "has {box} in a text, but no box: that says where it is"
        if self.each and self.turns:
            yield "takes each or turns, not both"
        for name in (*self.each, *self.turns, *(self.join or {})):
            if "." in name or name in OWN_NAMES:
                yield f"has '{name}' in each, turns or join; expected a plain name"
        if self._uses_split(*self._split_places, *self._wanted_texts) and not self.splits:
            yield "has {split}, but no splits: that says what it is"
        several = [name for name, texts in (self.splits or {}).items() if len(texts) != 1]
        if several and self._uses_split(*self._split_places):
            yield (
                f"has {{split}} in a text, and split '{several[0]}' has "
                f"{len((self.splits or {})[several[0]])} texts; expected one"
            )

    @staticmethod
    def _uses_split(*texts: str) -> bool:
        return any("{split}" in text for text in texts)

    @property
    def _split_places(self) -> list[str]:
        """The texts that may hold the split's only text."""
        files = [joined.file or "" for joined in (self.join or {}).values()]
        filled = (self.id, self.image, self.question, self.instruction, self.answer)
        return [self.records, *files, *filter(None, filled)]

    @property
    def _wanted_texts(self) -> list[str]:
        return [text for texts in (self.where or {}).values() for text in texts]

    @property
    def texts(self) -> dict[str, TextTemplate]:
        """The texts that are filled from a record, parsed, by their keys."""
        texts = {
            "id": self.id,
            "image": self.image,
            "question": self.question,
            "instruction": self.instruction,
            "answer": self.answer,
        }
        return {name: parse_template(text) for name, text in texts.items() if text is not None}

    def digest(self) -> str:
        """Return a short hash of what it says."""
        said = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def read_mapping(file: Path) -> AnnotationMapping:
    """Return the mapping in a file; a UserError with a line for each mistake."""
    return check_file_keys(AnnotationMapping, read_yaml(file), file, "the mapping", "keys are")
