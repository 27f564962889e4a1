"""The curriculum of the language miniature: answers to all kinds of questions, then conversations.

Each document asks about one skill (`text_skills`). How often a skill comes follows how often its
answers are still wrong: easy ones are soon rare.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from vlbench.data.sample_encoding import CachedTokenizer
from vlbench.data.scene_text import LANGUAGES
from vlbench.miniatures.text_encoding import answer_logits, encode_documents
from vlbench.miniatures.text_skills import (
    ANSWERS_PER_DOCUMENT,
    Skill,
    TextPiece,
    make_skill_document,
)
from vlbench.miniatures.training_text import make_chat

DOCUMENTS_PER_STEP = 80  # documents in an optimizer step
ADAMW_LR, MUON_LR = 2e-3, 0.02  # peaks; AdamW: embeddings, head, norms; Muon: matrices
MUON_WEIGHT_DECAY = 0.1  # as in Moonlight (arXiv:2502.16982): later lessons are learned more easily
MASTERY = 0.95  # share of right answers at which a lesson ends
NEW_SHARE = 0.5  # of the documents of a step, for the skills of the lesson
LEAST_WEIGHT = 0.03  # of a skill without mistakes, when known ones are repeated
LAST_LR_SCALE = 0.01  # at the end of a decay
_DOCUMENTS_PER_BATCH = 16  # that are computed at once
_ANSWERS_OF_MEAN = 400  # answers that the running share of right ones looks back on


@dataclass(frozen=True)
class Lesson:
    """New skills, or with none all that are known, and how long they are taught."""

    skills: tuple[Skill, ...]
    max_steps: int
    grids: tuple[int, ...] = (4,)  # cells along a side of rasters, each as often
    lr_scale: float = 1.0  # share of the peak learning rates
    chat_share: float = 0.0  # of the documents
    warm_up_steps: int = 0
    decay_share: float = 0.0  # of the steps, at the end, over which the learning rate falls

    def lr_factor(self, step: int) -> float:
        """Return the learning rate at a step, relative to its peak."""
        warm = min(1.0, (step + 1) / self.warm_up_steps) if self.warm_up_steps else 1.0
        decay_steps = self.decay_share * self.max_steps
        fallen = max(0.0, step - self.max_steps + decay_steps) / decay_steps if decay_steps else 0.0
        wave = LAST_LR_SCALE + (1 - LAST_LR_SCALE) * (0.5 + 0.5 * math.cos(math.pi * fallen))
        return self.lr_scale * warm * wave


CAPTIONS = tuple(Skill("caption", language) for language in LANGUAGES)
ANSWERS = tuple(
    Skill(name, language)
    for language in LANGUAGES
    for name in ANSWERS_PER_DOCUMENT
    if name not in ("caption", "several")
)
SEVERAL = tuple(Skill("several", language) for language in LANGUAGES)
CURRICULUM = (
    Lesson(ANSWERS, 1600, warm_up_steps=50),
    Lesson(CAPTIONS, 100),
    Lesson((), 550, grids=(4, 8), chat_share=0.4, decay_share=0.7),
    Lesson(SEVERAL, 200, lr_scale=0.5),
    Lesson((), 160, grids=(4, 8), chat_share=0.4, lr_scale=0.5, decay_share=0.8),
    Lesson((), 200, lr_scale=0.6),
    Lesson((), 160, grids=(4, 8), chat_share=0.4, lr_scale=0.6, decay_share=0.9),
)
"""Small rasters first: they are read in a quarter of the time. All answers are learned at once and
from the beginning: after some hundred steps of other skills, new ones take many times longer.
Counting is the exception, which the third lesson leaves at 0.84: most pictures have one object of a
kind, and "One." is right more often than not. It is learned from pictures that have several."""


@dataclass
class SkillScores:
    """The running share of right answers of each skill that is known."""

    shares: dict[Skill, float] = field(default_factory=dict)

    def update(self, skill: Skill, right: int, asked: int) -> None:
        """Take the answers of a step into account."""
        weight = min(0.5, asked / _ANSWERS_OF_MEAN)
        self.shares[skill] += weight * (right / asked - self.shares[skill])

    def repeat_weight(self, skill: Skill) -> float:
        """Return how often a skill is repeated, relative to others."""
        return 1 - self.shares[skill] + LEAST_WEIGHT


def teach_lesson(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: CachedTokenizer,
    lesson: Lesson,
    number: int,
    scores: SkillScores,
    log: Callable[[str], None],
) -> None:
    """Train on a lesson until its skills are mastered, at most `max_steps`.

    Args:
        model: Trained in place.
        optimizers: Those of `build_optimizers`; they go on from lesson to lesson.
        tokenizer: Of the documents.
        lesson: What is taught.
        number: Of the lesson; with the step it determines the documents.
        scores: Of the skills known so far; those of the lesson are added.
        log: Takes lines of progress.
    """
    known, start = list(scores.shares), time.monotonic()
    scores.shares.update(dict.fromkeys(lesson.skills, 0.0))
    for step in range(lesson.max_steps):
        rng = random.Random(f"lesson/{number}/{step}")
        skills = [
            _draw_skill(rng, place, lesson, known, scores) for place in range(DOCUMENTS_PER_STEP)
        ]
        documents = [
            _make_document(skill, lesson, number, step * DOCUMENTS_PER_STEP + place)
            for place, skill in enumerate(skills)
        ]
        _set_learning_rates(optimizers, lesson.lr_factor(step))
        loss, answered = _train_step(model, tokenizer, optimizers, documents)
        for skill, answers in zip(skills, answered, strict=True):
            if skill and answers:
                scores.update(skill, sum(answers), len(answers))
        is_mastered = lesson.skills and all(scores.shares[s] >= MASTERY for s in lesson.skills)
        if step % 50 == 49 or is_mastered or step == lesson.max_steps - 1:
            told = " ".join(f"{s.name}.{s.language} {v:.2f}" for s, v in scores.shares.items())
            taken = time.monotonic() - start
            log(f"lesson {number} step {step + 1} loss {loss:.3f} {taken:.0f} s {told}")
        if is_mastered:
            return


def _draw_skill(
    rng: random.Random, place: int, lesson: Lesson, known: Sequence[Skill], scores: SkillScores
) -> Skill | None:
    """Draw what document `place` of a step is about; None is a conversation."""
    if rng.random() < lesson.chat_share:
        return None
    is_new = lesson.skills and (not known or place < NEW_SHARE * DOCUMENTS_PER_STEP)
    pool = lesson.skills if is_new else known
    return rng.choices(pool, [scores.repeat_weight(skill) for skill in pool])[0]


def _make_document(skill: Skill | None, lesson: Lesson, number: int, index: int) -> list[TextPiece]:
    if skill is None:
        return make_chat(lesson.grids, number, index)
    return make_skill_document(skill, lesson.grids, number, index)


def _train_step(
    model: LlamaForCausalLM,
    tokenizer: CachedTokenizer,
    optimizers: Sequence[torch.optim.Optimizer],
    documents: Sequence[Sequence[TextPiece]],
) -> tuple[float, list[list[bool]]]:
    """Return the loss, and for each document which of its answers were right to the last token."""
    order = sorted(range(len(documents)), key=lambda at: sum(len(t) for t, _ in documents[at]))
    answered: list[list[bool]] = [[] for _ in documents]
    loss_sum, token_count = 0.0, 0
    model.zero_grad()
    for first in range(0, len(order), _DOCUMENTS_PER_BATCH):  # of about the same length
        chosen = order[first : first + _DOCUMENTS_PER_BATCH]
        ids, weights = encode_documents(tokenizer, [documents[at] for at in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            is_answer, logits, answers = answer_logits(model, ids, weights)
            loss = torch.nn.functional.cross_entropy(logits, answers, reduction="sum")
        loss.backward()
        loss_sum, token_count = loss_sum + loss.item(), token_count + len(answers)
        right = _right_answers(is_answer, logits.argmax(-1) == answers)
        for at, runs in zip(chosen, right, strict=True):
            answered[at] = runs
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad /= token_count
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss_sum / token_count, answered


def _set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set learning rates relative to their peaks."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def _right_answers(is_answer: Tensor, is_right: Tensor) -> list[list[bool]]:
    """Group tokens into answers, which are unbroken runs of them; is every token right?"""
    right = torch.zeros_like(is_answer)
    right[is_answer] = is_right
    found: list[list[bool]] = []
    for supervised, hits in zip(is_answer.tolist(), right.tolist(), strict=True):
        runs: list[bool] = []
        before = False
        for is_token, hit in zip(supervised, hits, strict=True):
            if is_token and before:
                runs[-1] = runs[-1] and hit
            elif is_token:
                runs.append(hit)
            before = is_token
        found.append(runs)
    return found


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the layers' matrices and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=MUON_WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
