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

from vlbench.data.batch import Pool
from vlbench.model.caption_tokens import CaptionTokens

SMOOTHING = 0.1  # of labels, in ITC and ITG
TEMPERATURE = 0.07  # of ITC at the start; it is learned
NEVER = -10000.0  # likeness of a pair that must not be drawn as a negative


def likeness(images: Tensor, captions: Tensor) -> Tensor:
    """Return `[images, captions]`: the dot product of a caption with the query it is nearest to.

    `images` is `[images, queries, width]`, `captions` `[captions, width]`.
    """
    return torch.einsum("iqw,cw->icq", images, captions).amax(dim=-1)


def draw(likeness: Tensor, own: Tensor | int, seeds: Sequence[str]) -> Tensor:
    """Return for each of some pairs another one as its negative, the likelier the liker.

    `likeness` is `[pairs, all pairs]`, `own` says where among all these pairs are (a number: there
    is the first, and the others follow), and each has a seed of its own. The draw follows from the
    seed and the order of all pairs. Nothing is drawn where there is no other pair.
    """
    if likeness.shape[1] < 2:
        return torch.zeros(0, dtype=torch.long, device=likeness.device)
    places = range(own, own + len(seeds)) if isinstance(own, int) else own.tolist()
    drawn = []
    for row, place, seed in zip(_wide(likeness).cpu(), places, seeds, strict=True):
        one = row.clone()
        one[place] = NEVER
        generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        drawn.append(int(torch.multinomial(one.softmax(-1), 1, generator=generator)))
    return torch.tensor(drawn, dtype=torch.long, device=likeness.device)


class FirstStage(nn.Module):
    """BERT's text side (its embeddings and prediction head) and the heads of the three losses."""

    embeddings: Any
    tokens: CaptionTokens
    tell_id: int

    def __init__(self, embeddings: nn.Module, itc_width: int, tokens: CaptionTokens) -> None:
        """`embeddings` has one id more than `tokens`, the last, with which telling begins."""
        super().__init__()
        self.embeddings = embeddings
        words: Any = embeddings.word_embeddings
        width = words.embedding_dim
        self.tokens, self.tell_id = tokens, words.num_embeddings - 1
        self.vision_proj, self.text_proj = nn.Linear(width, itc_width), nn.Linear(width, itc_width)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # as BERT begins

    def embed(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        seen: Tensor,
        captions: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Return what pairs are compared by, and their captions: `image`, `caption`, `ids`, `mask`.

        `seen` is what the queries attend to. Of each pair `image` has a vector for every query,
        `[pairs, queries, itc_width]`, `caption` one, `[pairs, itc_width]`, all of length 1.
        """
        ids, mask = captions
        read = queries.expand(len(seen), -1, -1)
        read = bert(read, encoder_hidden_states=seen).last_hidden_state
        words = bert(self.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
        image = normalize(self.vision_proj(read), dim=-1)
        caption = normalize(self.text_proj(words[:, 0]), dim=-1)
        return {"image": image, "caption": caption, "ids": ids, "mask": mask}

    def forward(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        look: Callable[[Tensor], Tensor],
        features: Tensor,
        captions: tuple[Tensor, Tensor],
        seeds: Sequence[str],
        pool: Pool | None = None,
    ) -> dict[str, Tensor]:
        """Return the summed losses `itc`, `itm` and `itg` of pictures and their captions.

        `queries` is `[1, queries, width]`, `look` makes of `features` what they attend to,
        `captions` are ids and mask `[pairs, length]`. Without `seeds` no pair is real: it runs for
        the sake of other processes. `pool` holds what `embed` gave of all pairs of the global
        batch, from which negatives come; without it, these pairs are all.
        """
        ids, mask = captions
        mine = self.embed(bert, queries, look(features), captions)
        still = {name: rows.detach() for name, rows in mine.items()}
        if pool is None:
            own = torch.arange(len(features), device=features.device)
            pool = Pool(still, own, list(seeds), lambda which: features[which])
        all_pairs = pool.rows if len(pool.rows["image"]) else still
        own = pool.own if seeds else ids.new_zeros(1)
        # as in the reference, a picture learns from captions that stand still, and they from it
        to_captions = likeness(mine["image"], all_pairs["caption"]) / self.temp
        to_images = likeness(all_pairs["image"], mine["caption"]).T / self.temp
        no_image, no_caption = self.negatives(all_pairs, own, seeds)
        matched = self._both(
            bert,
            queries,
            look(torch.cat([features, pool.features(no_image), features[: len(no_caption)]])),
            torch.cat([ids, ids[: len(no_image)], all_pairs["ids"][no_caption]]),
            _after_queries(
                queries, torch.cat([mask, mask[: len(no_image)], all_pairs["mask"][no_caption]])
            ),
        )
        told_ids = torch.cat([torch.full_like(ids[:, :1], self.tell_id), ids[:, 1:]], dim=1)
        sees = telling_mask(queries.shape[1], mask)
        told = self._both(bert, queries, look(features), told_ids, sees)
        return {
            "itc": self._contrast(to_captions, to_images, own),
            "itm": self._match(matched[:, : queries.shape[1]], len(ids)),
            "itg": self._tell(told[:, queries.shape[1] :], ids, mask),
        }

    @torch.no_grad()
    def negatives(
        self, pairs: dict[str, Tensor], own: Tensor, seeds: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Draw for captions another picture and for pictures another caption, of all `pairs`."""
        own = own[: len(seeds)]
        captions = likeness(pairs["image"][own], pairs["caption"]) / self.temp
        images = likeness(pairs["image"], pairs["caption"][own]).T / self.temp
        return (
            draw(images, own, [f"{seed} image" for seed in seeds]),
            draw(captions, own, [f"{seed} caption" for seed in seeds]),
        )

    def _both(
        self, bert: Callable[..., Any], queries: Tensor, seen: Tensor, ids: Tensor, sees: Tensor
    ) -> Tensor:
        """Let queries and text read together, as `sees` allows: `[pairs, both, width]`."""
        told = self.embeddings(ids, query_embeds=queries.expand(len(ids), -1, -1))
        out = bert(
            told,
            query_length=queries.shape[1],
            attention_mask=sees,
            encoder_hidden_states=seen,
        )
        return out.last_hidden_state

    def _contrast(self, to_captions: Tensor, to_images: Tensor, own: Tensor) -> Tensor:
        """Return the loss of finding its caption to a picture and its picture to a caption."""
        both = [
            cross_entropy(_wide(one), own, reduction="sum", label_smoothing=SMOOTHING)
            for one in (to_captions, to_images)
        ]
        return (both[0] + both[1]) / 2

    def _match(self, seen: Tensor, true: int) -> Tensor:
        """Return the loss of telling the first `true` pairs, which belong together, from others."""
        logits = _wide(self.itm_head(seen).mean(dim=1))
        labels = (torch.arange(len(seen), device=seen.device) < true).long()
        return cross_entropy(logits, labels, reduction="sum")

    def _tell(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of the next token, from the text's `hidden` `[pairs, length, width]`."""
        hidden = self.norm(gelu(self.dense(hidden[:, :-1])))
        logits = linear(hidden, self.embeddings.word_embeddings.weight, self.bias)
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return cross_entropy(
            _wide(logits.flatten(0, 1)),
            labels.flatten(),
            reduction="sum",
            label_smoothing=SMOOTHING,
        )


def _wide(logits: Tensor) -> Tensor:
    """Return logits of 16 bits in 32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _after_queries(queries: Tensor, mask: Tensor) -> Tensor:
    """Put ones for the queries before the mask of the text, `[pairs, queries + length]`."""
    return torch.cat([mask.new_ones(len(mask), queries.shape[1]), mask], dim=1)


def telling_mask(queries: int, mask: Tensor) -> Tensor:
    """Return `[pairs, 1, queries + length, queries + length]`, True where a row sees a column.

    Queries see each other, the text sees all queries and its own past, nothing sees padding.
    """
    size = queries + mask.shape[1]
    sees = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    sees[:queries, :queries] = True
    sees = sees.repeat(len(mask), 1, 1, 1)
    sees[..., queries:] &= mask[:, None, None].bool()
    return sees
