"""How well the language miniature answers about pictures that it is told in words."""

from __future__ import annotations

import math
import random

import torch
from transformers import LlamaForCausalLM

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.scene_families import (
    FAMILIES,
    family_of,
    list_picture_questions,
    make_pictures,
)
from vlbench.data.scene_text import LANGUAGES, QUESTION_TYPES, draw_question
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.text_encoding import answer_logits, compute_logits, encode_documents
from vlbench.miniatures.text_skills import TEXT_SCENE_STREAM, TextPiece
from vlbench.miniatures.told_pictures import RASTER_GRIDS, describe_in_rasters
from vlbench.miniatures.training_text import make_chat

HELD_OUT_SEED = 1_000_000  # the seed of held-out documents
_CHATS_PER_BATCH = 32


@torch.no_grad()
def measure_perplexity(
    model: LlamaForCausalLM, tokenizer: Tokenizer, document_count: int = 128
) -> float:
    """Measure the perplexity of the answers and captions of held-out conversations."""
    total, tokens = 0.0, 0
    for begin_at in range(0, document_count, 32):
        some = [
            make_chat(RASTER_GRIDS, HELD_OUT_SEED, index)
            for index in range(begin_at, begin_at + 32)
        ]
        ids, weights = encode_documents(tokenizer, some)
        _, logits, answers = answer_logits(model, ids, weights)
        losses = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
        total, tokens = total + losses.sum().item(), tokens + len(losses)
    return math.exp(total / tokens)


@torch.no_grad()
def measure_text_answers(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    chats_per_type: int = 100,
    grid: int = 8,
    with_blank: bool = True,
) -> dict[str, dict[str, float]]:
    """Measure exact match of answers about pictures told in words, and with no description.

    Pictures are told as rasters of `grid` x `grid` cells (letters: of 8 x 8), one question a chat,
    by type of question.
    """
    figures: dict[str, dict[str, float]] = {"text_answers": {}}
    for name, told in (("text_answers", True), ("blank_answers", False))[: 1 + with_blank]:
        figures[name] = {}
        for kind in (*QUESTION_TYPES, *FAMILIES[1:]):
            right = []
            documents = _single_question_chats(kind, chats_per_type, grid if told else 0)
            for begin_at in range(0, len(documents), _CHATS_PER_BATCH):
                some = documents[begin_at : begin_at + _CHATS_PER_BATCH]
                ids, weights = encode_documents(tokenizer, some)
                hits = compute_logits(model, ids[:, :-1]).argmax(-1) == ids[:, 1:, 0]
                right += (hits | (weights[:, 1:] < 1)).all(1).tolist()
            figures[name][kind] = round(sum(right) / len(right), 4)
    return figures


def _single_question_chats(question_type: str, count: int, grid: int) -> list[list[TextPiece]]:
    """Make chats of one question of a type about held-out pictures; untold where `grid` is 0."""
    documents: list[list[TextPiece]] = []
    index = 0
    family = family_of(question_type)
    while len(documents) < count:
        index += 1
        rng = random.Random(f"{question_type}/{index}")
        pictures = make_pictures(
            family, TEXT_SCENE_STREAM, HELD_OUT_SEED, index, has_dot=family == "fine"
        )
        language = rng.choice(LANGUAGES)
        asked = [q for q in list_picture_questions(pictures, language) if q.type == question_type]
        if asked:
            question = draw_question(rng, asked)
            cells = max(grid, pictures[0].grid) if grid else 0
            told = describe_in_rasters(pictures, language, cells) if grid else ""
            turns = [
                ChatTurn("human", told + question.text),
                ChatTurn("assistant", question.answer),
            ]
            documents.append(YI_VL.render_pieces(turns))
    return documents
