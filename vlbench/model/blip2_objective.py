"""BLIP-2's first stage: image-text contrast (ITC), matching (ITM) and generation (ITG).

Li et al. 2023 (arXiv:2301.12597), as LAVIS does it: three losses of equal weight through one BERT,
whose queries attend to the image. Only the attention masks differ.
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

LABEL_SMOOTHING = 0.1  # in ITC and ITG
INITIAL_TEMPERATURE = 0.07  # of ITC at the start; it is learned
EXCLUDED_SIMILARITY = -10000.0  # of a pair that must not be drawn as a negative


def pair_similarity(image_embeddings: Tensor, caption_embeddings: Tensor) -> Tensor:
    """Return `[images, captions]`: the largest dot product of a caption with any query of an image.

    `image_embeddings` is `[images, queries, width]`, `caption_embeddings` `[captions, width]`.
    """
    return torch.einsum("iqw,cw->icq", image_embeddings, caption_embeddings).amax(dim=-1)


def draw_negatives(similarity: Tensor, local_indices: Tensor | int, seeds: Sequence[str]) -> Tensor:
    """Draw for each of some pairs another pair as its negative, more likely if more similar.

    `similarity` is `[pairs, all pairs]`, `local_indices` are the indices of these pairs among all
    (a number: that of the first, and the others follow), and `seeds` has one for each. The draw
    depends on the seed and the order of all pairs only. Without other pairs it is empty.
    """
    if similarity.shape[1] < 2:
        return torch.zeros(0, dtype=torch.long, device=similarity.device)
    own_indices = (
        range(local_indices, local_indices + len(seeds))
        if isinstance(local_indices, int)
        else local_indices.tolist()
    )
    drawn = []
    rows = _to_float32(similarity).cpu()
    for row, own_index, seed in zip(rows, own_indices, seeds, strict=True):
        scores = row.clone()
        scores[own_index] = EXCLUDED_SIMILARITY
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        drawn.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
    return torch.tensor(drawn, dtype=torch.long, device=similarity.device)


class Blip2Objective(nn.Module):
    """BERT's text embeddings and prediction head, and the heads of the three losses."""

    embeddings: Any
    caption_tokenizer: CaptionTokenizer
    decoder_start_token_id: int

    def __init__(
        self, embeddings: nn.Module, itc_width: int, caption_tokenizer: CaptionTokenizer
    ) -> None:
        """`embeddings` has one id more than the tokenizer, the last: it starts generation."""
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
                nn.init.normal_(module.weight, std=0.02)  # as BERT's

    def contrast_embeddings(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        encoder_hidden_states: Tensor,
        captions: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Return the embeddings of pairs, and their captions: `image`, `caption`, `ids`, `mask`.

        The queries attend to `encoder_hidden_states`. `image` has a vector for every query,
        `[pairs, queries, itc_width]`, `caption` one, `[pairs, itc_width]`, all of norm 1.
        """
        ids, mask = captions
        query_states = queries.expand(len(encoder_hidden_states), -1, -1)
        query_states = bert(
            query_states, encoder_hidden_states=encoder_hidden_states
        ).last_hidden_state
        text_states = bert(
            self.embeddings(ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        image = normalize(self.vision_proj(query_states), dim=-1)
        caption = normalize(self.text_proj(text_states[:, 0]), dim=-1)
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
        """Return the summed losses `itc`, `itm` and `itg` of images and their captions.

        Args:
            bert: The encoder, called as the Q-Former calls it.
            queries: `[1, queries, width]`.
            project_features: Makes of features what the queries attend to.
            features: `[pairs, patches, vision_width]` of the images.
            captions: Ids and mask, both `[pairs, length]`.
            seeds: One for each pair; empty for a micro-batch without pairs, which runs only so that
                all processes do the same collective calls.
            pool: The embeddings of all pairs of the global batch, from which negatives are drawn;
                None: these pairs are all.
        """
        ids, mask = captions
        embeddings = self.contrast_embeddings(bert, queries, project_features(features), captions)
        detached = {name: rows.detach() for name, rows in embeddings.items()}
        if pool is None:
            own = torch.arange(len(features), device=features.device)
            pool = ContrastPool(detached, own, list(seeds), lambda numbers: features[numbers])
        all_pairs = pool.embeddings if len(pool.embeddings["image"]) else detached
        own = pool.local_indices if seeds else ids.new_zeros(1)
        # as in the reference, the other side of each comparison carries no gradient
        to_captions = pair_similarity(embeddings["image"], all_pairs["caption"]) / self.temp
        to_images = pair_similarity(all_pairs["image"], embeddings["caption"]).T / self.temp
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
        generation_ids = torch.cat(
            [torch.full_like(ids[:, :1], self.decoder_start_token_id), ids[:, 1:]], dim=1
        )
        causal_mask = multimodal_causal_mask(queries.shape[1], mask)
        generated = self._encode_jointly(
            bert, queries, project_features(features), generation_ids, causal_mask
        )
        return {
            "itc": self._contrastive_loss(to_captions, to_images, own),
            "itm": self._matching_loss(matched[:, : queries.shape[1]], len(ids)),
            "itg": self._generation_loss(generated[:, queries.shape[1] :], ids, mask),
        }

    @torch.no_grad()
    def select_negative_pairs(
        self, pairs: dict[str, Tensor], local_indices: Tensor, seeds: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Draw for each caption another image, and for each image another caption."""
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
        """Run queries and text together under a mask; return `[pairs, queries + length, width]`."""
        embeds = self.embeddings(ids, query_embeds=queries.expand(len(ids), -1, -1))
        output = bert(
            embeds,
            query_length=queries.shape[1],
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _contrastive_loss(
        self, to_captions: Tensor, to_images: Tensor, local_indices: Tensor
    ) -> Tensor:
        """Return the loss of finding the caption of each image and the image of each caption."""
        both = [
            cross_entropy(
                _to_float32(logits), local_indices, reduction="sum", label_smoothing=LABEL_SMOOTHING
            )
            for logits in (to_captions, to_images)
        ]
        return (both[0] + both[1]) / 2

    def _matching_loss(self, query_states: Tensor, matched_count: int) -> Tensor:
        """Return the loss of telling matching pairs, the first `matched_count`, from the others."""
        logits = _to_float32(self.itm_head(query_states).mean(dim=1))
        labels = (
            torch.arange(len(query_states), device=query_states.device) < matched_count
        ).long()
        return cross_entropy(logits, labels, reduction="sum")

    def _generation_loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the next-token loss of the text's hidden states `[pairs, length, width]`."""
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
    """Return 16-bit logits in float32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _prepend_query_mask(queries: Tensor, caption_mask: Tensor) -> Tensor:
    """Put ones for the queries before the mask of the text, `[pairs, queries + length]`."""
    return torch.cat(
        [caption_mask.new_ones(len(caption_mask), queries.shape[1]), caption_mask], dim=1
    )


def multimodal_causal_mask(query_count: int, caption_mask: Tensor) -> Tensor:
    """Return the attention mask `[pairs, 1, queries + length, queries + length]`.

    Queries attend to each other, the text to all queries and to its own past, none to padding.
    """
    size = query_count + caption_mask.shape[1]
    mask = torch.ones(size, size, dtype=torch.bool, device=caption_mask.device).tril()
    mask[:query_count, :query_count] = True
    mask = mask.repeat(len(caption_mask), 1, 1, 1)
    mask[..., query_count:] &= caption_mask[:, None, None].bool()
    return mask
