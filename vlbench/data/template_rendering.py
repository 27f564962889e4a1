"""A tokenizer's Jinja chat template: read from its files, rendered in transformers' sandbox.

What it writes follows from the conversation alone, today and when a run is resumed: the date is
always the same, and thinking is off, since answers of image data have none.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlbench.compat.transformers_internals import compile_chat_template, template_marks
from vlbench.errors import UserError, one_line
from vlbench.text_files import read_json, read_text

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""Today, for templates that ask: the date that Llama 3's own falls back on."""
MAX_TEMPLATE_LENGTH = 100_000  # characters; those of models with tools have up to 20,000
MAX_RANGE = 1_000  # numbers that a template counts through at a time
MAX_LOOP_DEPTH = 4  # loops in loops: messages, calls of tools, arguments

TemplateMessage = dict[str, str]
"""A turn as templates see it: role (system, user, assistant) and content."""
PartsMessage = Mapping[str, str | list[dict[str, str]]]
"""A turn whose content may be a list of parts, as a processor's template sees it."""


class TemplateRefusal(UserError):
    """What a chat template raises, or why it cannot be used, for a conversation."""


@dataclass(frozen=True)
class TemplateRenderer:
    """A Jinja template with the special tokens of its tokenizer."""

    text: str
    token_texts: tuple[tuple[str, str], ...]
    """`bos_token` and the like with their texts."""

    def render(
        self,
        messages: Sequence[PartsMessage],
        is_prompt: bool = False,
        thinking: bool = False,
    ) -> str:
        """Return the text of a conversation; a prompt's ends where the answer would begin.

        Raises:
            TemplateRefusal: says what the template raised.
        """
        variables = self._variables(messages, is_prompt, thinking)
        try:
            return str(compile_chat_template(self.text).render(**variables))
        except Exception as error:  # of the template: whatever its author raises or left out
            raise TemplateRefusal(f"it says: {one_line(error, max_lines=1)}") from error

    def find_marks(
        self, messages: Sequence[TemplateMessage], is_prompt: bool
    ) -> list[tuple[int, int]]:
        """Return the spans of `{% generation %}` marks in a text that `render` has returned."""
        return template_marks(
            compile_chat_template(self.text), self._variables(messages, is_prompt, False)
        )

    def _variables(
        self, messages: Sequence[PartsMessage], is_prompt: bool, thinking: bool
    ) -> dict[str, Any]:
        return {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": is_prompt,
            "enable_thinking": thinking,
            "strftime_now": TEMPLATE_DATE.strftime,
            "range": _short_range,
            **dict(self.token_texts),
        }

    def check_form(self) -> None:
        """Refuse a template that is too long, or could count without end, before it is run."""
        if len(self.text) > MAX_TEMPLATE_LENGTH:
            raise TemplateRefusal(f"it has {len(self.text):,} characters")
        try:
            tree = compile_chat_template("").environment.parse(self.text)
        except Exception as error:  # a mistake in its syntax
            raise TemplateRefusal(f"it is no Jinja: {one_line(error, max_lines=1)}") from error
        if _loop_depth(tree) > MAX_LOOP_DEPTH:
            raise TemplateRefusal(f"it has loops in loops, more than {MAX_LOOP_DEPTH} deep")
        if any(_has_operator(tree, name) for name in ("Pow", "Mul")):
            raise TemplateRefusal("it multiplies, which texts of conversations do not need")


def _short_range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise ValueError(f"counts through {len(numbers):,} numbers; at most {MAX_RANGE:,} do")
    return numbers


def _loop_depth(node: Any) -> int:
    deepest = max((_loop_depth(child) for child in node.iter_child_nodes()), default=0)
    return deepest + (type(node).__name__ == "For")


def _has_operator(node: Any, name: str) -> bool:
    return type(node).__name__ == name or any(
        _has_operator(child, name) for child in node.iter_child_nodes()
    )


def read_template_text(folder: Path) -> str:
    """Return the Jinja template of a folder's tokenizer, "" where it has none.

    It is `chat_template.jinja`, or a key of `tokenizer_config.json`: a text, or a list of which
    `default` is the one without tools.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return read_text(file)
    file = folder / "tokenizer_config.json"
    return default_template(read_json(file).get("chat_template")) if file.is_file() else ""


def default_template(said: object) -> str:
    """Return the Jinja template that a key `chat_template` holds, "" for none.

    Of several, in a list of mappings with `name` and `template` or a mapping by name, it is
    `default`, the one without tools.
    """
    if isinstance(said, list):
        said = {one.get("name"): one.get("template") for one in said if isinstance(one, dict)}
    if isinstance(said, dict):
        said = said.get("default")
    return said if isinstance(said, str) else ""
