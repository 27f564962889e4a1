"""`language.template=auto`: the tokenizer's own chat template, understood by rendering it.

Nothing is known of a template but what it writes. A conversation is rendered as it is, and with
stand-ins for its answers: what stays the same around a stand-in is the template's, what stands in
its place is the answer. What follows it up to the first special token ends it, and is learned with
it. A template that leaves out, repeats or reorders turns, or ends no answer, is refused.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlbench.command_line.arguments import TemplateName
from vlbench.data.chat_template import (
    CHAT_TEMPLATES,
    ChatTemplate,
    TextPiece,
    misplaced_turn,
)
from vlbench.data.sample import ChatTurn
from vlbench.data.template_rendering import TemplateMessage, TemplateRefusal, TemplateRenderer
from vlbench.data.tokenizer import Tokenizer
from vlbench.errors import UserError

MESSAGE_ROLES = {"system": "system", "human": "user", "assistant": "assistant"}
PROBED_ROLES = (("user", "assistant"), ("user", "assistant") * 3)
"""Conversations that every template must be able to write."""
BOS_LEFT_OUT = "{#- the tokenizer puts the begin of text before it -#}"
"""In a template that an export has written: what it does not write itself."""
PRIVATE_CHARACTERS = range(0xE000, 0xF8FF)  # of Unicode: no text means anything by them


class AnswerBorder(NamedTuple):
    """What belongs to an answer beside its text."""

    lead: str
    """Spaces between the end of the prompt and the text."""
    end: str
    """What ends the answer, the special token included."""


def bind_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of a `TemplateName` for a tokenizer."""
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name].bind_eos(tokenizer.eos_token)
    return read_own_template(tokenizer)


def read_own_template(tokenizer: Tokenizer) -> OwnTemplate:
    """Return the template that a tokenizer brings.

    Raises:
        UserError: it brings none, or one in whose texts answers cannot be found.
    """
    choices = f"say language.template=NAME, one of {', '.join(CHAT_TEMPLATES)}"
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.folder} has no chat template of its own; {choices}"
        )
    renderer = TemplateRenderer(tokenizer.chat_template, tuple(tokenizer.role_tokens.items()))
    end_marks = tuple(name for name in tokenizer.named_tokens if name.strip())
    try:
        renderer.check_form()
        header = _find_answer_header(renderer)
        ends = [
            border.end
            for roles in PROBED_ROLES
            for border in _find_borders(renderer, roles, end_marks, header)
        ]
    except TemplateRefusal as refusal:
        raise UserError(
            f"the chat template of the tokenizer of {tokenizer.folder} cannot be used: {refusal}; "
            f"{choices}"
        ) from refusal
    has_all_tokens = BOS_LEFT_OUT not in renderer.text
    return OwnTemplate(renderer, end_marks, header, ends[0].strip(), has_all_tokens=has_all_tokens)


@dataclass(frozen=True)
class OwnTemplate(ChatTemplate):
    """A tokenizer's own template."""

    renderer: TemplateRenderer
    end_marks: tuple[str, ...]
    """Tokens with a name, any of which may end an answer."""
    header: str | None
    """What a prompt needs behind what the template writes; None: it is cut from a conversation."""
    stop: str
    name: TemplateName = "auto"
    stops_late: bool = False
    has_all_tokens: bool = True

    def render_pieces(self, turns: Sequence[ChatTurn]) -> list[TextPiece]:
        """Return (text, supervised) pieces; see `ChatTemplate.render_pieces`.

        Raises:
            UserError: when the template refuses the conversation, or writes other texts than its
                turns.
        """
        messages = _to_messages(turns)
        roles = tuple(message["role"] for message in messages)
        try:
            borders = _find_borders(self.renderer, roles, self.end_marks, self.header)
            whole = _render(self.renderer, messages, self.header)
            spans = self._find_answers(messages, whole, borders)
            _check_questions(messages, whole)
        except TemplateRefusal as refusal:
            raise UserError(f"the tokenizer's chat template: {refusal}") from refusal
        pieces: list[TextPiece] = []
        position = 0
        for begin, end in spans:
            pieces += [(whole[position:begin], False), (whole[begin:end], True)]
            position = end
        rest = whole[position:]
        return [*pieces, (rest, False)] if rest else pieces

    def _find_answers(
        self, messages: list[TemplateMessage], whole: str, borders: Sequence[AnswerBorder]
    ) -> list[tuple[int, int]]:
        """Return where answers begin and end in `whole`, the text of `messages`."""
        stand_ins = _make_stand_ins(messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        masked = [
            {**message, "content": stand_ins[n]} if n in answers else message
            for n, message in enumerate(messages)
        ]
        fixed = _split_at(
            _render(self.renderer, masked, self.header), [stand_ins[n] for n in answers]
        )
        texts = [messages[n]["content"] for n in answers]
        if whole != "".join(itertools.chain(*zip(fixed, [*texts, ""], strict=True))):
            marks = self.renderer.find_marks(messages, messages[-1]["role"] == "user")
            spans_of_marks = marks if len(marks) == len(answers) else [None] * len(answers)
            return [
                self._find_rewritten_answer(messages, whole, *answer)
                for answer in zip(answers, borders, spans_of_marks, strict=True)
            ]
        spans, position = [], 0
        for before, text, border in zip(fixed, texts, borders, strict=False):
            position += len(before)
            spans.append((position - len(border.lead), position + len(text) + len(border.end)))
            position += len(text)
        return spans

    def _find_rewritten_answer(
        self,
        messages: list[TemplateMessage],
        whole: str,
        number: int,
        border: AnswerBorder,
        mark: tuple[int, int] | None,
    ) -> tuple[int, int]:
        """Return where the answer of message `number` lies that the template writes otherwise.

        As Qwen3's does with thinking. The template's `mark` says it, else the difference to the
        conversation with a stand-in for this one answer, from where the model would begin to think.
        """
        begin_of_thinking = self.renderer.render(messages[:number], is_prompt=True, thinking=True)
        earliest = len(begin_of_thinking) if whole.startswith(begin_of_thinking) else 0
        if mark is not None:
            begin, end = mark
            end = begin + len(whole[begin:end].rstrip())
            if not whole[begin:end].endswith(border.end) and whole.startswith(border.end, end):
                end += len(border.end)
            return max(begin, earliest), end
        stand_in = _make_stand_ins(messages)[number]
        masked = [*messages]
        masked[number] = {**messages[number], "content": stand_in}
        other = _render(self.renderer, masked, self.header)
        begin = _common_length(whole, other)
        end = len(whole) - _common_length(whole[begin:][::-1], other[begin:][::-1])
        begin = earliest if 0 < earliest <= begin else begin
        if begin >= end or not whole.startswith(border.end, end):
            raise TemplateRefusal(
                f"the answer of turn {number + 1} cannot be found in what it writes"
            )
        return begin, end + len(border.end)


@functools.lru_cache(maxsize=256)
def _find_borders(
    renderer: TemplateRenderer,
    roles: tuple[str, ...],
    end_marks: tuple[str, ...],
    header: str | None,
) -> tuple[AnswerBorder, ...]:
    """Return the borders of the answers of any conversation with `roles`.

    Raises:
        TemplateRefusal: a turn is missing, repeated or elsewhere, or an answer has no end.
    """
    stand_ins = _make_stand_ins([{}] * len(roles))
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, stand_ins, strict=True)
    ]
    whole = _render(renderer, messages, header)
    first = int(roles[0] == "system")  # its text may stand anywhere, as in Mistral's last question
    _split_at(whole, stand_ins[:first])
    _split_at(whole, stand_ins[first:], first)
    borders = []
    for number, (role, text) in enumerate(zip(roles, stand_ins, strict=True)):
        if role != "assistant":
            continue
        begin, end = whole.index(text), whole.index(text) + len(text)
        prompt = renderer.render(messages[:number], is_prompt=True)
        lead = whole[len(prompt) : begin] if whole.startswith(prompt) else ""
        ended = renderer.render(messages[: number + 1])
        end_text = _find_end(ended.partition(text)[2], end_marks)
        if not end_text.strip():
            raise TemplateRefusal("it writes nothing behind an answer by which it could end")
        if not whole.startswith(end_text, end):
            raise TemplateRefusal(
                f"it ends the answer of turn {number + 1} otherwise when others follow"
            )
        borders.append(AnswerBorder("" if lead.strip() else lead, end_text))
    return tuple(borders)


def _find_end(following: str, end_marks: Sequence[str]) -> str:
    """Return what of the text that follows an answer ends it: up to the first special token."""
    found = [(following.find(mark), -len(mark)) for mark in end_marks if mark in following]
    if not found:
        return following.rstrip()
    begin, negative_length = min(found)
    return following[: begin - negative_length]


def _find_answer_header(renderer: TemplateRenderer) -> str | None:
    """Return what a prompt needs behind what the template writes, see `OwnTemplate.header`.

    Most templates write it when they are asked for a prompt. Some ignore that, and some write what
    no answer of a conversation begins with (an open block of thinking).
    """
    question, answer = _make_stand_ins([{}, {}])
    messages = [{"role": "user", "content": question}]
    prompt = renderer.render(messages, is_prompt=True)
    whole = renderer.render([*messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt) or answer not in whole:
        return None
    between = whole[len(prompt) : whole.index(answer)]
    return between if between.strip() else ""


def _render(renderer: TemplateRenderer, messages: list[TemplateMessage], header: str | None) -> str:
    """Return the text of a conversation; after a last question it ends where the answer begins."""
    if messages[-1]["role"] != "user":
        return renderer.render(messages)
    if header is not None:
        return renderer.render(messages, is_prompt=True) + header
    stand_in = _make_stand_ins([*messages, {}])[-1]
    whole = renderer.render([*messages, {"role": "assistant", "content": stand_in}])
    return _split_at(whole, [stand_in])[0]


def _to_messages(turns: Sequence[ChatTurn]) -> list[TemplateMessage]:
    """Return turns as templates see them, answers stripped."""
    if not turns:
        raise UserError("a conversation without turns")
    messages = []
    for number, turn in enumerate(turns):
        if turn.role not in MESSAGE_ROLES or (turn.role == "system" and number):
            raise misplaced_turn(turn)
        text = turn.text.strip() if turn.role == "assistant" else turn.text
        messages.append({"role": MESSAGE_ROLES[turn.role], "content": text})
    return messages


def _make_stand_ins(messages: Sequence[TemplateMessage]) -> list[str]:
    """Return a text for each message that none of the messages has in it."""
    used = set().union(*(message.get("content", "") for message in messages))
    mark = next(chr(code) for code in PRIVATE_CHARACTERS if chr(code) not in used)
    return [f"{mark}{number}{mark}" for number in range(len(messages))]


def _split_at(whole: str, stand_ins: Sequence[str], first_turn: int = 0) -> list[str]:
    """Return the texts between stand-ins, each of which must be there once and in order."""
    parts, rest = [], whole
    for number, stand_in in enumerate(stand_ins, start=first_turn + 1):
        if whole.count(stand_in) != 1 or stand_in not in rest:
            what = "leaves out" if stand_in not in whole else "repeats or moves"
            raise TemplateRefusal(f"it {what} the text of turn {number}")
        before, _, rest = rest.partition(stand_in)
        parts.append(before)
    return [*parts, rest]


def _check_questions(messages: Sequence[TemplateMessage], whole: str) -> None:
    """Refuse a text in which a question is not as it was asked, spaces around it aside."""
    position = 0
    for number, message in enumerate(messages):
        if message["role"] == "user":
            text = message["content"].strip()
            found = whole.find(text, position)
            if found < 0:
                raise TemplateRefusal(f"it rewrites the text of turn {number + 1} ('user')")
            position = found + len(text)


def _common_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
