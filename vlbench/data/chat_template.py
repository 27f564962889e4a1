"""Chat templates: turns become the text that the language model reads. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from vlbench.command_line.arguments import TemplateName
from vlbench.data.sample import ChatTurn
from vlbench.errors import UserError, suggest_name

EOS_MARK = "{eos}"  # in the texts of a template: the tokenizer's end-of-text token

TextPiece = tuple[str, bool]
"""A text, and whether it is supervised."""


class ChatTemplate(ABC):
    """How the turns of a conversation become text, and which of it is supervised."""

    name: TemplateName
    stop: str
    """Generation ends when this text appears."""
    stops_late: bool = False
    """Whether a stop text is ignored while it is the only token of an answer."""
    has_all_tokens: bool = False
    """Whether its texts have all special tokens, so that a tokenizer puts none before them."""

    @abstractmethod
    def render_pieces(self, turns: Sequence[ChatTurn]) -> list[TextPiece]:
        """Return (text, supervised) pieces; their texts concatenate to the whole conversation.

        Answers and their ends are the supervised pieces; everything between two of them is one
        piece. After a last human turn the text ends where the answer would begin.
        """

    def render_prompt(self, turns: Sequence[ChatTurn]) -> str:
        """Return the text that ends where the model's answer begins.

        Raises a UserError unless the last turn is the human's.
        """
        if not turns or turns[-1].role != "human":
            last = f"of {turns[-1].role!r}" if turns else "missing"
            raise UserError(f"a prompt ends with a turn of 'human', but the last turn is {last}")
        return "".join(text for text, _ in self.render_pieces(turns))

    def bind_eos(self, eos_token: str) -> ChatTemplate:
        """Return the template for a tokenizer whose end-of-text token is `eos_token`."""
        return self


@dataclass(frozen=True)
class FixedTemplate(ChatTemplate):
    """The texts around the turns of a conversation.

    A conversation is `before_system`, the system prompt, `after_system`, and for every exchange
    `before_human`, the question, `before_answer`, `answer_start`, the answer (stripped) and
    `answer_end`. `answer_start` + answer + `answer_end` is supervised; where another turn or more
    text follows, `after_answer` comes next. EOS_MARK stands for the tokenizer's end-of-text token.
    """

    name: TemplateName
    system: str
    """The system prompt, unless a conversation brings its own as its first turn."""
    after_system: str
    before_human: str
    before_answer: str
    answer_start: str
    answer_end: str
    stop: str
    """Generation ends when this text appears."""
    before_system: str = ""
    """Where it is not empty, a conversation without a system prompt has no system block."""
    after_answer: str = ""
    stops_late: bool = False
    """Whether a stop text is ignored while it is the only token of an answer."""

    def bind_eos(self, eos_token: str) -> FixedTemplate:
        """Return the template for a tokenizer whose end-of-text token is `eos_token`."""
        return replace(
            self,
            answer_end=self.answer_end.replace(EOS_MARK, eos_token),
            stop=self.stop.replace(EOS_MARK, eos_token),
        )

    def render_pieces(self, turns: Sequence[ChatTurn]) -> list[TextPiece]:
        """Return (text, supervised) pieces; see `ChatTemplate.render_pieces`."""
        pieces: list[TextPiece] = []
        system_prompt, dialogue = self.system, list(turns)
        if dialogue and dialogue[0].role == "system":
            system_prompt, dialogue = dialogue[0].text, dialogue[1:]
        context = self.before_system + system_prompt + self.after_system
        if self.before_system and not system_prompt:
            context = ""
        for turn in dialogue:
            if turn.role == "human":
                context += self.before_human + turn.text + self.before_answer
            elif turn.role == "assistant":
                answer = self.answer_start + turn.text.strip() + self.answer_end
                pieces += [(context, False), (answer, True)]
                context = self.after_answer
            else:
                raise misplaced_turn(turn)
        ends_with_answer = dialogue and dialogue[-1].role == "assistant"
        return pieces if ends_with_answer else [*pieces, (context, False)]


YI_VL = FixedTemplate(
    name="yi_vl",
    system=(
        "This is a chat between an inquisitive human and an AI assistant. Assume the role of the "
        "AI assistant. Read all the images carefully, and respond to the human's questions with "
        "informative, helpful, detailed and polite answers. "
        "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
        "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
    ),
    after_system="\n\n###",
    before_human=" Human: ",
    before_answer="\n### Assistant:",
    answer_start=" ",
    answer_end="\n###",
    stop="###",
    stops_late=True,
)

# The chat_template of Yi-6B-Chat and Yi-1.5-Chat: no system prompt unless a conversation has one.
CHATML = FixedTemplate(
    name="chatml",
    system="",
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    before_human="<|im_start|>user\n",
    before_answer="<|im_end|>\n<|im_start|>assistant\n",
    answer_start="",
    answer_end="<|im_end|>",
    after_answer="\n",
    stop="<|im_end|>",
)

# LLaVA's conversation "llava_v1", the prompt of LLaVA-1.5 in its scripts (arXiv:2310.03744).
LLAVA_V1 = FixedTemplate(
    name="llava_v1",
    system=(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    after_system=" ",
    before_human="USER: ",
    before_answer=" ASSISTANT:",
    answer_start=" ",
    answer_end=EOS_MARK,
    stop=EOS_MARK,
)

CHAT_TEMPLATES: dict[str, FixedTemplate] = {
    template.name: template for template in (YI_VL, CHATML, LLAVA_V1)
}
"""The templates of vlbench by name; `auto`, the tokenizer's own, is made by `own_template`."""


def check_template_name(name: str | None, key: str = "template") -> str | None:
    """Return a `TemplateName`, or None for None; a UserError calls it `key`."""
    names = get_args(TemplateName)
    if name is not None and name not in names:
        known = ", ".join(names)
        raise UserError(f"{key} is '{name}'; known are {known}.{suggest_name(str(name), names)}")
    return name


def misplaced_turn(turn: ChatTurn) -> UserError:
    """Return the error for a turn of a role that may not stand where it is."""
    return UserError(
        f"a turn of {turn.role!r} inside a conversation; only the first turn may be 'system', the "
        "others are 'human' or 'assistant'"
    )
