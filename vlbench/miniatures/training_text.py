"""Conversations about pictures told in words: what follows the skills of `text_skills`.

A description of one or several pictures (`told_pictures`) stands where images would; captions and
questions in Yi's chat template follow. No unseen pair occurs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.scene_dataset import CAPTION_PROMPTS
from vlbench.data.scene_families import (
    DOT_SHARE,
    FAMILY_WEIGHTS,
    draw_family,
    list_picture_questions,
    make_pictures,
    picture_caption,
)
from vlbench.data.scene_text import LANGUAGES, pick_questions
from vlbench.miniatures.text_skills import TEXT_SCENE_STREAM, TextPiece
from vlbench.miniatures.told_pictures import describe_pictures

SYSTEM_PROMPT_SHARE = 0.2  # of the chats; the others save its time
CAPTION_SHARE = 0.2  # of the conversations about one picture: they begin with its caption
BLIND_CHAT_SHARE = 0.03  # chats without a description
_QUESTIONS_PER_CHAT = 8


def make_chat(grids: Sequence[int], seed: int, index: int) -> list[TextPiece]:
    """Make conversation `index` in Yi's template; rasters have one of `grids` cells a side."""
    rng = random.Random(f"chat/{seed}/{index}")
    family, has_dot = draw_family(rng, FAMILY_WEIGHTS), rng.random() < DOT_SHARE
    pictures = make_pictures(family, TEXT_SCENE_STREAM, seed, index, has_dot)
    language = rng.choice(LANGUAGES)
    turns: list[ChatTurn] = []
    if len(pictures) == 1 and rng.random() < CAPTION_SHARE:
        turns += _question_turns(CAPTION_PROMPTS[language], picture_caption(pictures[0], language))
    candidates = list_picture_questions(pictures, language)
    for asked in pick_questions(rng, candidates, _QUESTIONS_PER_CHAT):
        turns += _question_turns(asked.text, asked.answer)
    if rng.random() >= BLIND_CHAT_SHARE:
        told = describe_pictures(rng, pictures, language, grids)
        turns[0] = ChatTurn("human", told + turns[0].text)
    pieces = YI_VL.render_pieces(turns)
    if rng.random() < SYSTEM_PROMPT_SHARE:
        return pieces
    return [(text.replace(YI_VL.system, ""), learn) for text, learn in pieces]


def _question_turns(question: str, answer: str) -> list[ChatTurn]:
    return [ChatTurn("human", question), ChatTurn("assistant", answer)]
