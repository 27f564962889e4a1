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

from vlbench.model.caption_tokens import CaptionTokens
from vlbench.ranks import gather

SMOOTHING = 0.1  # of labels, in ITC and ITG
TEMPERATURE = 0.07  # of ITC at the start; it is learned
NEVER = -10000.0  # likeness of a pair that must not be drawn as a negative


def likeness(images: Tensor, captions: Tensor) -> Tensor:
    """Return `[images, captions]`: the dot product of a caption with the query it is nearest to.

    `images` is `[images, queries, width]`, `captions` `[captions, width]`.
    """
    return torch.einsum("iqw,cw->icq", images, captions).amax(dim=-1)


def draw(likeness: Tensor, first: int, seeds: Sequence[str]) -> Tensor:
    """Return for each of this process' pairs another one as its negative, the likelier the liker.

    `likeness` is `[pairs, all pairs]`, this process' pairs begin at `first` among all, and each has
    a seed of its own. Nothing is drawn where there is no other pair.
    """
    if likeness.shape[1] < 2:
        return torch.zeros(0, dtype=torch.long, device=likeness.device)
    drawn = []
    for row, seed in enumerate(seeds):
        one = likeness[row].float().cpu().clone()
        one[first + row] = NEVER
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

    def forward(
        self,
        bert: Callable[..., Any],
        queries: Tensor,
        look: Callable[[Tensor], Tensor],
        features: Tensor,
        captions: tuple[Tensor, Tensor],
        seeds: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the summed losses `itc`, `itm` and `itg` of pictures and their captions.

        `queries` is `[1, queries, width]`, `look` makes of `features` what they attend to,
        `captions` are ids and mask `[pairs, length]`. Without `seeds` no pair is real: it runs for
        the sake of other processes, from which, too, negatives come.
        """
        own, (ids, mask) = len(seeds), captions
        read = queries.expand(len(features), -1, -1)
        seen = bert(read, encoder_hidden_states=look(features)).last_hidden_state
        words = bert(self.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state
        image = normalize(self.vision_proj(seen), dim=-1)
        caption = normalize(self.text_proj(words[:, 0]), dim=-1)
        # as in the reference, a picture learns from captions that stand still, and they from it
        all_captions, first = gather(caption[:own].detach())
        all_images, _ = gather(image[:own].detach())
        if not len(all_captions):
            all_captions, all_images = caption, image
        to_captions = likeness(image, all_captions) / self.temp
        to_images = likeness(all_images, caption).T / self.temp
        no_image = draw(to_images.detach(), first, [f"{seed} image" for seed in seeds])
        no_caption = draw(to_captions.detach(), first, [f"{seed} caption" for seed in seeds])
        all_features, all_ids, all_mask = (gather(t[:own])[0] for t in (features, ids, mask))

        def both(features: Tensor, ids: Tensor, sees: Tensor) -> Tensor:
            """Let queries and text read together, as `sees` allows: `[pairs, both, width]`."""
            told = self.embeddings(ids, query_embeds=queries.expand(len(ids), -1, -1))
            count = queries.shape[1]
            out = bert(
                told,
                query_length=count,
                attention_mask=sees,
                encoder_hidden_states=look(features),
            )
            return out.last_hidden_state

        matched = both(
            torch.cat([features, all_features[no_image], features[: len(no_caption)]]),
            torch.cat([ids, ids[: len(no_image)], all_ids[no_caption]]),
            _after_queries(queries, torch.cat([mask, mask[: len(no_image)], all_mask[no_caption]])),
        )
        told_ids = torch.cat([torch.full_like(ids[:, :1], self.tell_id), ids[:, 1:]], dim=1)
        told = both(features, told_ids, telling_mask(queries.shape[1], mask))
        return {
            "itc": self._contrast(to_captions, to_images, first),
            "itm": self._match(matched[:, : queries.shape[1]], len(ids)),
            "itg": self._tell(told[:, queries.shape[1] :], ids, mask),
        }

    def _contrast(self, to_captions: Tensor, to_images: Tensor, first: int) -> Tensor:
        """Return the loss of finding its caption to a picture and its picture to a caption."""
        right = torch.arange(len(to_captions), device=to_captions.device) + first
        right = right.clamp(max=to_captions.shape[1] - 1)
        both = [
            cross_entropy(one.float(), right, reduction="sum", label_smoothing=SMOOTHING)
            for one in (to_captions, to_images)
        ]
        return (both[0] + both[1]) / 2

    def _match(self, seen: Tensor, true: int) -> Tensor:
        """Return the loss of telling the first `true` pairs, which belong together, from others."""
        logits = self.itm_head(seen).mean(dim=1).float()
        labels = (torch.arange(len(seen), device=seen.device) < true).long()
        return cross_entropy(logits, labels, reduction="sum")

    def _tell(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of the next token, from the text's `hidden` `[pairs, length, width]`."""
        hidden = self.norm(gelu(self.dense(hidden[:, :-1])))
        logits = linear(hidden, self.embeddings.word_embeddings.weight, self.bias)
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            reduction="sum",
            label_smoothing=SMOOTHING,
        )


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
