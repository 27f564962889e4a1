"""The small language of mappings: texts with `{path}` or `{path:form}`, filled from a record.

A path is keys with dots between them; it goes through lists, to the values of all their entries.
Nothing of a record or of a mapping is executed. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from string import Formatter
from typing import Any

from vlbench.errors import BadSample, UserError, describe_json_type, suggest_name

TEXT_FORMS = {
    "majority": "the most frequent text of a list, of equal ones the first",
    "folder": "of a path or URL, the name of the folder that its last part is in",
    "suffix": "of a path or URL, what ends the name of a file, as .jpg",
}
"""What `form` may be, beside a number of digits as 012, to which a whole number is filled up."""
DIGITS_FORM = re.compile(r"0[1-9]\d?")
PATH_PATTERN = re.compile(r"[^\s.{}\[\]!:]+(\.[^\s.{}\[\]!:]+)*")


@dataclass(frozen=True)
class Placeholder:
    """A place in a text for a value of the record."""

    path: str
    form: str = ""


@dataclass(frozen=True)
class TextTemplate:
    """A text with places for values."""

    parts: tuple[str | Placeholder, ...]

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the text with the values of a record; BadSample (without a name) for a wrong one.

        `values` are the record's keys and the names that the mapping declares.
        """
        return "".join(
            part if isinstance(part, str) else format_value(find_value(values, part.path), part)
            for part in self.parts
        )

    @property
    def paths(self) -> list[str]:
        """The paths of its places."""
        return [part.path for part in self.parts if isinstance(part, Placeholder)]


def parse_template(text: str) -> TextTemplate:
    """Return a text of a mapping with its places; a ValueError says what is wrong."""
    parts: list[str | Placeholder] = []
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(
            f"has unequal braces in '{text}' ({error}); write {{{{ and }}}} for braces"
        ) from None
    for literal, path, form, conversion in pieces:
        parts += [literal] if literal else []
        if path is None:
            continue
        if conversion or not PATH_PATTERN.fullmatch(path):
            place = f"{path}!{conversion}" if conversion else path
            raise ValueError(f"has '{{{place}}}'; expected {{KEY}} or {{KEY.KEY}}, no more")
        if form and form not in TEXT_FORMS and not DIGITS_FORM.fullmatch(form):
            raise ValueError(
                f"has '{{{path}:{form}}}'; behind the colon may be {', '.join(TEXT_FORMS)} or "
                f"digits as 012.{suggest_name(form, TEXT_FORMS)}"
            )
        parts.append(Placeholder(path, form or ""))
    return TextTemplate(tuple(parts))


def find_value(values: Mapping[str, Any], path: str) -> Any:
    """Return what stands at a path, a list where it goes through one; BadSample names the key."""
    found: Any = values
    keys = path.split(".")
    for number, key in enumerate(keys):
        found = _step_into(found, key, ".".join(keys[:number]))
    return found


def _step_into(value: Any, key: str, place: str) -> Any:
    if isinstance(value, list):
        return [_step_into(entry, key, place) for entry in value]
    where = f"{place!r} " if place else ""
    if not isinstance(value, Mapping):
        raise BadSample(
            "", f"{where}is {describe_json_type(value)}; expected a mapping with {key!r}"
        )
    if key not in value:
        names = [str(name) for name in value]
        keys = ", ".join(map(repr, names[:12])) or "none"
        raise BadSample(
            "", f"{where}has no {key!r}; its keys are {keys}.{suggest_name(key, names)}"
        )
    return value[key]


def format_value(value: Any, place: Placeholder) -> str:
    """Return a value as text, in the form that its place asks for; BadSample where it has none."""
    if place.form == "majority":
        return _most_frequent(value, place.path)
    text = plain_text(value)
    if text is None:
        hint = f"; write {{{place.path}:majority}} for the most frequent, or name it in turns"
        hint = hint if isinstance(value, list) else ""
        kind = describe_json_type(value)
        raise BadSample("", f"{place.path!r} is {kind}; expected a text or a number{hint}")
    if place.form in ("folder", "suffix"):
        path = PurePosixPath(text.partition("?")[0])
        return path.parent.name if place.form == "folder" else path.suffix
    if place.form:
        if not text.isdecimal():
            raise BadSample(
                "",
                f"{place.path!r} is {describe_json_type(value)}; expected a whole "
                f"number of at most {int(place.form)} digits",
            )
        return text.zfill(int(place.form))
    return text


def plain_text(value: Any) -> str | None:
    """Return a text or a finite number as text, None for anything else; 3.0 is 3."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _most_frequent(value: Any, path: str) -> str:
    texts = [plain_text(entry) for entry in value] if isinstance(value, list) else []
    known = [text for text in texts if text is not None]
    if not known or len(known) != len(texts):
        kind = describe_json_type(value)
        raise BadSample("", f"{path!r} is {kind}; expected a list of texts")
    return Counter(known).most_common(1)[0][0]


class LinePattern:
    """A pattern of lines: `{image}#{number}<tab>{caption}`, each name a text up to what follows."""

    def __init__(self, text: str) -> None:
        """Read the pattern; a ValueError says what is wrong."""
        self.text = text
        template = parse_template(text)
        names = template.paths
        if not names or len(set(names)) < len(names) or any("." in name for name in names):
            raise ValueError(f"is '{text}'; expected {{NAME}} once or more, each name once")
        self.names = names
        last = len(template.parts) - 1
        self._pattern = re.compile(
            "".join(self._piece(part, is_last=n == last) for n, part in enumerate(template.parts)),
            re.DOTALL,
        )

    @staticmethod
    def _piece(part: str | Placeholder, is_last: bool) -> str:
        if isinstance(part, str):
            return re.escape(part)
        return "(.+)" if is_last else "(.+?)"

    def read_line(self, line: str) -> dict[str, str]:
        """Return the names of a line with their texts; a UserError where it does not fit."""
        match = self._pattern.fullmatch(line)
        if match is None:
            raise UserError(f"the line is {describe_json_type(line)}; expected {self.text!r}")
        return dict(zip(self.names, match.groups(), strict=True))


def walk_together(values: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the entries of several lists of a record, side by side; BadSample for a wrong list."""
    lists = []
    for name in names:
        found = find_value(values, name)
        if not isinstance(found, list):
            raise BadSample("", f"{name!r} is {describe_json_type(found)}; expected a list")
        lists.append(found)
    if len(set(map(len, lists))) > 1:
        counts = ", ".join(f"{name!r} {len(one)}" for name, one in zip(names, lists, strict=True))
        raise BadSample("", f"has lists of different lengths: {counts}")
    for entries in zip(*lists, strict=True):
        yield dict(zip(names, entries, strict=True))
