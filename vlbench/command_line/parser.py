"""Words `key=value` of a verb, read and checked by the verb's declaration; its help as a table.

A declaration is a frozen dataclass whose fields are made by `argument`: `arguments.py` has one for
each verb. Values have the declared types: `str`, `int`, `float`, `bool`, `Literal[...]`, any of
them `| None`, and `tuple[..., ...]` of a key that may be given several times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import (
    Any,
    ClassVar,
    NamedTuple,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from vlbench.errors import UserError, suggest_name
from vlbench.strict_values import RawText, convert_value, kind_label, split_union, yaml_text


class VerbDeclaration(Protocol):
    """A frozen dataclass that declares what a verb takes."""

    verb: ClassVar[str]
    """The verb's name."""
    __dataclass_fields__: ClassVar[dict[str, Any]]


DeclarationT = TypeVar("DeclarationT", bound=VerbDeclaration)


def argument(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    metavar: str = "VALUE",
    low: float | None = None,
    high: float | None = None,
    other_names: Sequence[str] = (),
    is_path: bool = False,
    is_positional: bool = False,
) -> Any:
    """Declare a key of a verb.

    Args:
        help: The meaning, for the table of `--help`.
        default: The value where the key is not given; without one the key is required.
        metavar: What stands for the value in messages and in the usage line.
        low: The least value of a number.
        high: The greatest value of a number.
        other_names: Names that people may type instead; a message then names the right one.
        is_path: Whether a leading `~` of the value is the home folder.
        is_positional: Whether the values are the words that are not `key=value`.
    """
    metadata = {
        "help": help,
        "metavar": metavar,
        "low": low,
        "high": high,
        "other_names": tuple(other_names),
        "is_path": is_path,
        "is_positional": is_positional,
    }
    return dataclasses.field(default=default, metadata=metadata)


class ArgumentSpec(NamedTuple):
    """A declared key: its name, the type of one value, and what `argument` was given."""

    field_name: str
    """Of the declaration: the key, or `try_` for a key `try`, which is no name in Python."""
    value_type: Any
    may_repeat: bool
    default: Any
    help: str
    metavar: str
    low: float | None
    high: float | None
    other_names: tuple[str, ...]
    is_path: bool
    is_positional: bool

    @property
    def name(self) -> str:
        """The key."""
        return self.field_name.rstrip("_")

    @property
    def is_required(self) -> bool:
        """Whether the key has no default."""
        return self.default is dataclasses.MISSING

    @property
    def usage(self) -> str:
        """The key as it is typed."""
        return self.metavar if self.is_positional else f"{self.name}={self.metavar}"

    def parse_value(self, text: str) -> Any:
        """Return the value that `text` stands for; a ValueError says what is allowed."""
        if self.value_type is str:
            return os.path.expanduser(text) if self.is_path else text
        value = convert_value(RawText(text), self.value_type)
        if self.low is not None and value < self.low:
            raise ValueError(f"must be at least {_number_text(self.low)}, given {text}")
        if self.high is not None and value > self.high:
            raise ValueError(f"must be at most {_number_text(self.high)}, given {text}")
        return value

    def help_row(self) -> tuple[str, str, str, str]:
        """Return name, type with its range, default and meaning."""
        label = kind_label(self.value_type)
        if self.low is not None and self.high is not None:
            label += f", {_number_text(self.low)} to {_number_text(self.high)}"
        if self.may_repeat:
            label += ", repeatable"
        if self.is_required:
            default = "(needed)"
        else:
            default = "" if self.default in (None, ()) else yaml_text(self.default)
        return self.metavar if self.is_positional else self.name, label, default, self.help


@cache
def declared_arguments(declaration: type[VerbDeclaration]) -> dict[str, ArgumentSpec]:
    """Return the keys that a declaration has, by name and in their order."""
    kinds = get_type_hints(declaration)
    specs = []
    for field in dataclasses.fields(declaration):
        kind = kinds[field.name]
        may_repeat = get_origin(kind) is tuple
        value_type = get_args(kind)[0] if may_repeat else split_union(kind)[0]
        specs.append(
            ArgumentSpec(field.name, value_type, may_repeat, field.default, **field.metadata)
        )
    return {spec.name: spec for spec in specs}


def parse_arguments(
    declaration: type[DeclarationT],
    words: Sequence[str],
    hints: Mapping[str, str] | None = None,
) -> DeclarationT:
    """Return the arguments of a verb; a UserError has a line for every mistake.

    Args:
        declaration: What the verb takes.
        words: The words behind the verb.
        hints: For keys that the verb does not have, the sentence that helps.
    """
    specs = declared_arguments(declaration)
    texts, others = _sort_words(specs, words)
    names = ", ".join(spec.metavar if spec.is_positional else spec.name for spec in specs.values())
    mistakes = []
    for word in others:
        key, equals, _ = word.partition("=")
        problem = f"has no key '{key}'" if equals else f"takes no word '{word}'"
        hint = f" {hints[key]}." if hints and key in hints else _suggest_key(specs, key)
        if not (hint or equals):
            hint = _suggest_needed_key(specs, texts, word)
        mistakes.append(f"{declaration.verb} {problem}; its keys are {names}.{hint}")
    return _build_arguments(declaration, texts, mistakes)


def split_arguments(
    declaration: type[DeclarationT], words: Sequence[str], recipe_keys: Collection[str]
) -> tuple[DeclarationT, list[str]]:
    """Return the arguments of a verb, and the words that belong to a recipe, as they were typed.

    `recipe_keys` are the top-level keys of recipes: a word with another key that is close to one of
    the verb's is a mistake here; all others are left to the check of the recipe.
    """
    specs = declared_arguments(declaration)
    texts, others = _sort_words(specs, words)
    recipe_words, mistakes = [], []
    for word in others:
        key = word.partition("=")[0]
        nearest = _suggest_key(specs, key)
        if nearest and key.partition(".")[0] not in recipe_keys:
            mistakes.append(f"'{word}' is no key of {declaration.verb} or of a recipe.{nearest}")
        else:
            recipe_words.append(word)
    return _build_arguments(declaration, texts, mistakes), recipe_words


def _sort_words(
    specs: Mapping[str, ArgumentSpec], words: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the texts that each key was given, and the words that belong to no key."""
    positional = next((spec for spec in specs.values() if spec.is_positional), None)
    texts: dict[str, list[str]] = defaultdict(list)
    others = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in specs and specs[key] is not positional:
            texts[key].append(value)
        elif positional and not (equals and _suggest_key(specs, key)):
            texts[positional.name].append(word)
        else:
            others.append(word)
    return texts, others


def _suggest_key(specs: Mapping[str, ArgumentSpec], key: str) -> str:
    """Return " Did you mean 'x'?" for the key that is meant, "" where none is likely."""
    for spec in specs.values():
        if key in spec.other_names:
            return f" Did you mean '{spec.name}'?"
    return suggest_name(key, [name for name, spec in specs.items() if not spec.is_positional])


def _suggest_needed_key(
    specs: Mapping[str, ArgumentSpec], texts: Mapping[str, Sequence[str]], word: str
) -> str:
    """Return a sentence with `word` as the value of a key that is needed and not given, or ""."""
    for name, spec in specs.items():
        if spec.is_required and name not in texts:
            with contextlib.suppress(ValueError):  # another key's value
                spec.parse_value(word)
                return f" Did you mean {shlex.quote(f'{name}={word}')}?"
    return ""


def _build_arguments(
    declaration: type[DeclarationT], texts: Mapping[str, Sequence[str]], mistakes: list[str]
) -> DeclarationT:
    """Return the arguments of the texts; a UserError has `mistakes` and those in the texts."""
    specs = declared_arguments(declaration)
    values: dict[str, Any] = {}
    for name, given in texts.items():
        try:
            values[name] = _read_values(specs[name], given)
        except ValueError as error:
            mistakes = [*mistakes, f"{name} {error}"]
    if not mistakes:
        missing = [spec for name, spec in specs.items() if spec.is_required and name not in values]
        mistakes = [f"{declaration.verb} needs {spec.usage}: {spec.help}" for spec in missing]
    if mistakes:
        raise UserError(*mistakes)
    return declaration(**{specs[name].field_name: value for name, value in values.items()})


def _read_values(spec: ArgumentSpec, texts: Sequence[str]) -> Any:
    """Return the value of a key that was given with `texts`; a ValueError says what is wrong."""
    if "" in texts:
        way = "" if spec.is_required else ", or leave it out"
        raise ValueError(f"has no value; write {spec.usage}{way}")
    values = [spec.parse_value(text) for text in texts]
    if spec.may_repeat:
        return tuple(values)
    if len(values) > 1:
        raise ValueError(f"is given twice, as '{texts[0]}' and '{texts[1]}'")
    return values[0]


def _number_text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
