"""Train the miniature language model: Yi's architecture, on text of the rendered world alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vlbench.data.chat_template import YI_VL
from vlbench.data.sample import ChatTurn
from vlbench.data.sample_encoding import CachedTokenizer
from vlbench.data.scene_families import (
    FAMILIES,
    family_of,
    list_picture_questions,
    make_pictures,
)
from vlbench.data.scene_text import LANGUAGES, QUESTION_TYPES, draw_question
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.attention_init import initialize_attention
from vlbench.miniatures.make_tokenizer import VOCAB_SIZE
from vlbench.miniatures.told_pictures import (
    CELL_SEPARATOR,
    OVERLAY_SEPARATOR,
    describe_in_rasters,
)
from vlbench.miniatures.training_text import (
    TEXT_SCENE_STREAM,
    TextPiece,
    make_document,
    make_drill,
    make_facts,
)

DOCUMENTS_PER_STEP = 32  # documents in an optimizer step
LATER_FACT_SHARE = 0.1  # share of the documents that are facts once the first steps are over
# share of the chats that keep the system prompt; the others save its time
SYSTEM_PROMPT_SHARE = 0.2
ADAMW_LR, MUON_LR = 2e-3, 0.02  # AdamW: embeddings, head, norms; Muon: matrices
HELD_OUT_SEED = 1_000_000  # the seed of held-out documents
MAX_OVERLAID_WORDS = 5  # words at one position, at most
_SORTED_BATCHES = 8  # batches whose documents are sorted by length together


def language_model_config() -> LlamaConfig:
    """Return Yi's architecture, narrow and shallow."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def create_language_model(
    folder: Path, tokenizer: Tokenizer, log: Callable[[str], None] = print
) -> dict[str, object]:
    """Train the language model, write it to `folder`, and return its quality."""
    torch.manual_seed(12)
    model = LlamaForCausalLM(language_model_config())
    model.set_attn_implementation("eager")  # on CPUs the fused kernel's backward is slower
    initialize_attention(model)
    start = time.monotonic()
    for lesson in CURRICULUM:
        train(model, tokenizer, lesson, log)
        model.half().float()  # as it is written
    seconds = time.monotonic() - start
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    model.float().eval()
    answers = measure_text_answers(model, tokenizer)
    figures = {"perplexity": measure_perplexity(model, tokenizer), **answers, "seconds": seconds}
    log(f"language {figures}")
    return figures


@dataclass(frozen=True)
class CurriculumStage:
    """A training phase: which documents, and how long."""

    seed: int  # of the documents
    steps: int
    peak_lr_scale: float  # share of the peak learning rates
    grids: tuple[int, ...]  # cells along a side of rasters, each as often
    fact_steps: int  # steps at the beginning with facts alone
    chat_share: float  # of the documents that are neither facts nor drills

    def make_document(self, step: int, index: int) -> list[TextPiece]:
        """Make document `index`, which is met at about `step`."""
        rng = random.Random(f"kinds/{index}")
        if step < self.fact_steps or rng.random() < LATER_FACT_SHARE:
            return make_facts(self.seed, index, self.grids)
        if rng.random() < self.chat_share:
            return _drop_system_prompt(rng, make_document(self.seed, index, self.grids))
        return make_drill(self.seed, index, self.grids)

    def lr_scale(self, step: int) -> float:
        """Return the learning-rate factor: warm-up, plateau, long decay to 0.01."""
        fallen = max(0.0, (step / self.steps - 0.3) / 0.7)
        wave = 0.505 + 0.495 * math.cos(math.pi * fallen)
        return self.peak_lr_scale * min(1.0, (step + 1) / 100) * wave

    def document_batches(self) -> Iterator[list[list[TextPiece]]]:
        """Give the documents of every step, sorted by length over `_SORTED_BATCHES` steps."""
        for first in range(0, self.steps, _SORTED_BATCHES):
            numbers = range(
                first * DOCUMENTS_PER_STEP, (first + _SORTED_BATCHES) * DOCUMENTS_PER_STEP
            )
            documents = [self.make_document(first, number) for number in numbers]
            documents.sort(key=lambda pieces: sum(len(text) for text, _ in pieces))
            batches = [
                documents[at : at + DOCUMENTS_PER_STEP]
                for at in range(0, len(documents), DOCUMENTS_PER_STEP)
            ]
            random.Random(first).shuffle(batches)
            yield from batches[: self.steps - first]


def _drop_system_prompt(rng: random.Random, pieces: list[TextPiece]) -> list[TextPiece]:
    if rng.random() < SYSTEM_PROMPT_SHARE:
        return pieces
    return [(text.replace(YI_VL.system, ""), learn) for text, learn in pieces]


CURRICULUM = (
    CurriculumStage(0, 900, 1.0, grids=(4,), fact_steps=250, chat_share=0.25),
    CurriculumStage(1, 1300, 0.9, grids=(4, 4, 8), fact_steps=0, chat_share=0.15),
)
"""Small rasters first: they are read in a quarter of the time."""


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    stage: CurriculumStage,
    log: Callable[[str], None],
) -> None:
    """Minimise the weighted cross entropy of a phase's documents."""
    optimizers = _build_optimizers(model)
    memo = CachedTokenizer(tokenizer)
    start = time.monotonic()
    for step, documents in enumerate(stage.document_batches()):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * stage.lr_scale(step)
        ids, weights = encode_documents(memo, documents)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _answer_losses(model, ids, weights).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 0:
            log(
                f"language step {step}/{stage.steps} loss {loss.item():.3f} "
                f"{time.monotonic() - start:.0f} s"
            )


def _build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al., 2024) for the layers' matrices and AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def encode_documents(
    tokenizer: Tokenizer | CachedTokenizer, documents: Sequence[Sequence[TextPiece]]
) -> tuple[Tensor, Tensor]:
    """Return documents as ids and loss weights, padded.

    Ids are `[documents, longest, MAX_OVERLAID_WORDS]`, -1 where a position has fewer words; weights
    are `[documents, longest]`, 1 for tokens of answers and 0 for what is given.
    """
    rows = []
    for pieces in documents:
        ids, weights = list[list[int]](), list[float]()
        for text, learn in pieces:
            for part in text.split(CELL_SEPARATOR):
                if OVERLAY_SEPARATOR in part:
                    ids.append(
                        [
                            id_
                            for word in part.split(OVERLAY_SEPARATOR)
                            for id_ in tokenizer.encode(word)
                        ]
                    )
                    weights.append(0.0)
                else:
                    ids += [[id_] for id_ in tokenizer.encode(part)]
                    weights += [float(learn)] * (len(ids) - len(weights))
        rows.append((ids, weights))
    longest = max(len(ids) for ids, _ in rows)
    ids_out = torch.full((len(rows), longest, MAX_OVERLAID_WORDS), -1)
    weights_out = torch.zeros(len(rows), longest)
    for row, (ids, weights) in enumerate(rows):
        filled = [[*at, *[-1] * (MAX_OVERLAID_WORDS - len(at))] for at in ids]
        ids_out[row, : len(ids)] = torch.tensor(filled)
        weights_out[row, : len(ids)] = torch.tensor(weights)
    return ids_out, weights_out


def embed_words(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Return embeddings `[rows, length, width]` of ids `[rows, length, MAX_OVERLAID_WORDS]`.

    Embeddings of words at one position are added and scaled to standard deviation 1, as the
    LayerNorm at the end of a connector scales visual tokens.
    """
    there = (input_ids >= 0)[..., None]
    words = model.model.embed_tokens(input_ids.clamp(min=0)) * there
    added = words.sum(2)
    several = there.sum(2) > 1
    even = added * added.pow(2).mean(-1, keepdim=True).clamp(min=1e-6).rsqrt()
    return torch.where(several, even, added)


def compute_logits(model: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Return logits `[rows, length, vocabulary]` for ids `[rows, length, MAX_OVERLAID_WORDS]`."""
    embedded = embed_words(model, input_ids)
    logits: Tensor = model(inputs_embeds=embedded, use_cache=False).logits
    return logits.float()


def _answer_losses(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Return the cross entropy of every token of an answer, `[tokens]`."""
    embedded = embed_words(model, input_ids[:, :-1])
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    is_answer = weights[:, 1:] == 1
    logits = model.lm_head(hidden[is_answer]).float()
    return torch.nn.functional.cross_entropy(
        logits, input_ids[:, 1:, 0][is_answer], reduction="none"
    )


@torch.no_grad()
def measure_perplexity(
    model: LlamaForCausalLM, tokenizer: Tokenizer, document_count: int = 128
) -> float:
    """Measure the perplexity of the answers and captions of held-out documents."""
    total, tokens = 0.0, 0
    for begin_at in range(0, document_count, 32):
        some = [make_document(HELD_OUT_SEED, index) for index in range(begin_at, begin_at + 32)]
        ids, weights = encode_documents(tokenizer, some)
        losses = _answer_losses(model, ids, weights)
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
            for begin_at in range(0, len(documents), DOCUMENTS_PER_STEP):
                some = documents[begin_at : begin_at + DOCUMENTS_PER_STEP]
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
