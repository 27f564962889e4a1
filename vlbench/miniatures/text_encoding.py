"""Documents as ids and embeddings: words over one another stand at one position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from vlbench.data.sample_encoding import CachedTokenizer
from vlbench.data.tokenizer import Tokenizer
from vlbench.miniatures.text_skills import TextPiece
from vlbench.miniatures.told_pictures import CELL_SEPARATOR, OVERLAY_SEPARATOR

MAX_OVERLAID_WORDS = 5  # words at one position, at most


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


def answer_logits(
    model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the tokens of answers are, their logits, and the tokens.

    They are `[documents, length - 1]` booleans, `[tokens, vocabulary]` and `[tokens]`.
    """
    embedded = embed_words(model, input_ids[:, :-1])
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    is_answer = weights[:, 1:] == 1
    return is_answer, model.lm_head(hidden[is_answer]).float(), input_ids[:, 1:, 0][is_answer]
