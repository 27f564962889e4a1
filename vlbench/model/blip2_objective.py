"""BLIP-2's first stage: pictures and captions contrasted (ITC), matched (ITM) and told (ITG).

Li et al. 2023 (arXiv:2301.12597), as LAVIS does it: three losses of equal weight through one BERT,
whose queries look at the picture. Only what each of them may see differs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, normalize

from vlbench.data.packing import ContrastPool
from vlbench.model.caption_tokens import CaptionTokenizer

LABEL_SMOOTHING = 0.1  # of labels, in ITC and ITG
INITIAL_TEMPERATURE = 0.07  # of ITC at the start; it is learned
EXCLUDED_SIMILARITY = -10000.0  # likeness of a pair that must not be drawn as a negative


def pair_similarity(image_embeddings: Tensor, caption_embeddings: Tensor) -> Tensor:
    """Return `[images, captions]`: the dot product of a caption with the query it is nearest to.

    `images` is `[images, queries, width]`, `captions` `[captions, width]`.
    """
    return torch.einsum("iqw,cw->icq", image_embeddings, caption_embeddings).amax(dim=-1)


def draw_negatives(similarity: Tensor, local_indices: Tensor | int, seeds: Sequence[str]) -> Tensor:
    """Return for each of some pairs another one as its negative, the likelier the liker.

    `likeness` is `[pairs, all pairs]`, `own` says where among all these pairs are (a number: there
    is the first, and the others follow), and each has a seed of its own. The draw follows from the
    seed and the order of all pairs. Nothing is drawn where there is no other pair.
    """
    if similarity.shape[1] < 2:
        return torch.zeros(0, dtype=torch.long, device=similarity.device)
    places = (
        range(local_indices, local_indices + len(seeds))
        if isinstance(local_indices, int)
        else local_indices.tolist()
    )
    drawn = []
    for row, place, seed in zip(_to_float32(similarity).cpu(), places, seeds, strict=True):
        one = row.clone()
        one[place] = EXCLUDED_SIMILARITY
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        drawn.append(int(torch.multinomial(one.softmax(-1), 1, generator=generator)))
    return torch.tensor(drawn, dtype=torch.long, device=similarity.device)


class Blip2Objective(nn.Module):
    """BERT's text side (its embeddings and prediction head) and the heads of the three losses."""

    embeddings: Any
    caption_tokenizer: CaptionTokenizer
    decoder_start_token_id: int

    def __init__(
        self, embeddings: nn.Module, itc_width: int, caption_tokenizer: CaptionTokenizer
    ) -> None:
        """`embeddings` has one id more than `tokens`, the last, with which telling begins."""
        super().__init__()
        self.embeddings = embeddings
        words: Any = embeddings.word_embeddings
        width = words.embedding_dim
        self.caption_tokenizer, self.decoder_start_token_id = (
            caption_tokenizer,
            words.num_embeddings - 1,
        )
        self.vision_proj, self.text_proj = nn.Linear(width, itc_width), nn.Linear(width, itc_width)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # as BERT begins

    def contrast_embeddings(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        encoder_hidden_states: Tensor,
        captions: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Return what pairs are compared by, and their captions: `image`, `caption`, `ids`, `mask`.

        `seen` is what the queries attend to. Of each pair `image` has a vector for every query,
        `[pairs, queries, itc_width]`, `caption` one, `[pairs, itc_width]`, all of length 1.
        """
        ids, mask = captions
        read = queries.expand(len(encoder_hidden_states), -1, -1)
        read = bert(read, encoder_hidden_states=encoder_hidden_states).last_hidden_state
        words = bert(self.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
        image = normalize(self.vision_proj(read), dim=-1)
        caption = normalize(self.text_proj(words[:, 0]), dim=-1)
        return {"image": image, "caption": caption, "ids": ids, "mask": mask}

    def forward(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        project_features: Callable[[Tensor], Tensor],
        features: Tensor,
        captions: tuple[Tensor, Tensor],
        seeds: Sequence[str],
        pool: ContrastPool | None = None,
    ) -> dict[str, Tensor]:
        """Return the summed losses `itc`, `itm` and `itg` of pictures and their captions.

        `queries` is `[1, queries, width]`, `look` makes of `features` what they attend to,
        `captions` are ids and mask `[pairs, length]`. Without `seeds` no pair is real: it runs for
        the sake of other processes. `pool` holds what `embed` gave of all pairs of the global
        batch, from which negatives come; without it, these pairs are all.
        """
        ids, mask = captions
        mine = self.contrast_embeddings(bert, queries, project_features(features), captions)
        still = {name: rows.detach() for name, rows in mine.items()}
        if pool is None:
            own = torch.arange(len(features), device=features.device)
            pool = ContrastPool(still, own, list(seeds), lambda which: features[which])
        all_pairs = pool.embeddings if len(pool.embeddings["image"]) else still
        own = pool.local_indices if seeds else ids.new_zeros(1)
        # as in the reference, a picture learns from captions that stand still, and they from it
        to_captions = pair_similarity(mine["image"], all_pairs["caption"]) / self.temp
        to_images = pair_similarity(all_pairs["image"], mine["caption"]).T / self.temp
        no_image, no_caption = self.select_negative_pairs(all_pairs, own, seeds)
        matched = self._encode_jointly(
            bert,
            queries,
            project_features(
                torch.cat([features, pool.gather_features(no_image), features[: len(no_caption)]])
            ),
            torch.cat([ids, ids[: len(no_image)], all_pairs["ids"][no_caption]]),
            _prepend_query_mask(
                queries, torch.cat([mask, mask[: len(no_image)], all_pairs["mask"][no_caption]])
            ),
        )
        told_ids = torch.cat(
            [torch.full_like(ids[:, :1], self.decoder_start_token_id), ids[:, 1:]], dim=1
        )
        sees = multimodal_causal_mask(queries.shape[1], mask)
        told = self._encode_jointly(bert, queries, project_features(features), told_ids, sees)
        return {
            "itc": self._contrastive_loss(to_captions, to_images, own),
            "itm": self._matching_loss(matched[:, : queries.shape[1]], len(ids)),
            "itg": self._generation_loss(told[:, queries.shape[1] :], ids, mask),
        }

    @torch.no_grad()
    def select_negative_pairs(
        self, pairs: dict[str, Tensor], local_indices: Tensor, seeds: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Draw for captions another picture and for pictures another caption, of all `pairs`."""
        local_indices = local_indices[: len(seeds)]
        captions = pair_similarity(pairs["image"][local_indices], pairs["caption"]) / self.temp
        images = pair_similarity(pairs["image"], pairs["caption"][local_indices]).T / self.temp
        return (
            draw_negatives(images, local_indices, [f"{seed} image" for seed in seeds]),
            draw_negatives(captions, local_indices, [f"{seed} caption" for seed in seeds]),
        )

    def _encode_jointly(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        encoder_hidden_states: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """Let queries and text read together, as `sees` allows: `[pairs, both, width]`."""
        told = self.embeddings(ids, query_embeds=queries.expand(len(ids), -1, -1))
        out = bert(
            told,
            query_length=queries.shape[1],
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        return out.last_hidden_state

    def _contrastive_loss(
        self, to_captions: Tensor, to_images: Tensor, local_indices: Tensor
    ) -> Tensor:
        """Return the loss of finding its caption to a picture and its picture to a caption."""
        both = [
            cross_entropy(
                _to_float32(one), local_indices, reduction="sum", label_smoothing=LABEL_SMOOTHING
            )
            for one in (to_captions, to_images)
        ]
        return (both[0] + both[1]) / 2

    def _matching_loss(self, query_states: Tensor, matched_count: int) -> Tensor:
        """Return the loss of telling the first `true` pairs, which belong together, from others."""
        logits = _to_float32(self.itm_head(query_states).mean(dim=1))
        labels = (
            torch.arange(len(query_states), device=query_states.device) < matched_count
        ).long()
        return cross_entropy(logits, labels, reduction="sum")

    def _generation_loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of the next token, from the text's `hidden` `[pairs, length, width]`."""
        hidden = self.norm(gelu(self.dense(hidden[:, :-1])))
        logits = linear(hidden, self.embeddings.word_embeddings.weight, self.bias)
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return cross_entropy(
            _to_float32(logits.flatten(0, 1)),
            labels.flatten(),
            reduction="sum",
            label_smoothing=LABEL_SMOOTHING,
        )


def _to_float32(logits: Tensor) -> Tensor:
    """Return logits of 16 bits in 32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _prepend_query_mask(queries: Tensor, caption_mask: Tensor) -> Tensor:
    """Put ones for the queries before the mask of the text, `[pairs, queries + length]`."""
    return torch.cat(
        [caption_mask.new_ones(len(caption_mask), queries.shape[1]), caption_mask], dim=1
    )


def multimodal_causal_mask(query_count: int, caption_mask: Tensor) -> Tensor:
    """Return `[pairs, 1, queries + length, queries + length]`, True where a row sees a column.

    Queries see each other, the text sees all queries and its own past, nothing sees padding.
    """
    size = query_count + caption_mask.shape[1]
    sees = torch.ones(size, size, dtype=torch.bool, device=caption_mask.device).tril()
    sees[:query_count, :query_count] = True
    sees = sees.repeat(len(caption_mask), 1, 1, 1)
    sees[..., query_count:] &= caption_mask[:, None, None].bool()
    return sees
