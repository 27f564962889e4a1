"""Generation: prompts of any length in one batch, the image encoded once, the cache reused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlbench.compat.transformers_internals import repeat_kv_cache
from vlbench.data.packing import PackedBatch
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.generation.decoding_state import CACHE_ARGUMENT, DecodingState
from vlbench.model.generation.prefix_cache import PrefixCache, common_prefix_length
from vlbench.model.generation.sampling_options import GENERATE_OPTIONS, refuse_unknown_options
from vlbench.model.generation.static_cache import StaticDecodingState

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

MIN_TEMPERATURE = 1e-4  # below, logits divided by the temperature are no longer finite
NONFINITE_ID = -1
"""What `pick` gives in the place of an id where nothing can be chosen."""


def has_ended(vlm: VLM, new_ids: list[int]) -> bool:
    """Tell whether a row has ended: at an end-of-text id, or when its new text has the stop text.

    In Yi-VL's reference a `###` given as the very first token is not seen yet.
    """
    if new_ids[-1] in eos_token_ids(vlm):
        return True
    if len(new_ids) == 1 and vlm.template.stops_late:
        return False
    return vlm.template.stop in vlm.tokenizer.decode(new_ids)


def eos_token_ids(vlm: VLM) -> set[int]:
    """Return the ids that end an answer: the tokenizer's, and those of the language model."""
    given = vlm.language.generation_config.eos_token_id
    return {vlm.tokenizer.eos_token_id, *([given] if isinstance(given, int) else given or [])}


def sample_next_ids(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Choose the next ids `[rows]` from logits `[rows, vocabulary]`: greedy at temperature 0.

    A row whose greatest logit is infinite or no number gives NOT_FINITE: the ids travel to the host
    anyway, so nobody has to wait for the device once more to know it.
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids.where(logits.gather(-1, ids[:, None])[:, 0].isfinite(), NONFINITE_ID)
    probs = (logits.float() / temperature).softmax(-1)
    ordered, index = probs.sort(-1, descending=True)
    finite = ordered[:, :1].isfinite()
    ordered = ordered.where(finite, 1.0)  # a GPU that draws from no numbers gives up for good
    beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
    beyond[:, 0] = False
    ordered[beyond] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return index.gather(-1, choice).where(finite, NONFINITE_ID).squeeze(-1)


@torch.inference_mode()
def generate(
    vlm: VLM,
    batch: PackedBatch,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[list[list[int]]], None] | None = None,
    past: PrefixCache | None = None,
    compiled: bool = False,
    **other: Any,
) -> list[list[int]]:
    """Return the new ids of every row of `batch`, prompts padded on the left (`sample_index` -1).

    `on_token` is called after each step with all new ids so far, for streaming. Ids beyond the
    tokenizer are never chosen. A row ends at the latest where the language model's positions do.
    Several threads may ask one model at once: nothing about it is changed, not even its mode, and
    `seed` draws from a generator of this call. Logits that are not finite are a Trouble.
    With `past` the batch is one conversation, and what was read of it before is not read again.
    `compiled` is for many or long answers on a GPU: after the prompts every step is a graph, made
    once for a number of rows and a length rounded up, which takes tens of seconds.
    """
    refuse_unknown_options("generate", other, GENERATE_OPTIONS)
    _check_options(max_new_tokens, temperature, top_p, seed)
    _check_cache_options(batch, past, compiled)
    drawn = torch.Generator(device=vlm.device).manual_seed(seed)
    choose = functools.partial(
        sample_next_ids, temperature=temperature, top_p=top_p, generator=drawn
    )
    try:
        return _generate_ids(
            in_eval_mode(vlm), batch, max_new_tokens, choose, on_token, past, compiled
        )
    except BaseException:
        if past:
            past.clear_cache()  # it may have been stopped between two layers
        raise


def _check_options(max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any) -> None:
    """Refuse what cannot be done, in one line."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}; allowed are whole numbers from 1")
    if not _is_number(temperature) or not (
        temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
    ):
        allowed = f"0 (greedy) and numbers from {MIN_TEMPERATURE}"
        raise UserError(f"temperature is {temperature!r}; allowed are {allowed}")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p!r}; allowed are numbers from 0 to 1")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed!r}; allowed are whole numbers from 0 to {2**64 - 1}")


def _check_cache_options(batch: PackedBatch, past: Any, compiled: Any) -> None:
    """Refuse a conversation's past where it cannot be read on from, in one line."""
    if type(compiled) is not bool:
        raise UserError(f"compiled is {compiled!r}; allowed are True and False")
    if past is not None and compiled:
        raise UserError(
            "compiled and past exclude each other: a conversation grows, a graph cannot"
        )
    if past is not None and len(batch.input_ids) != 1:
        raise UserError(
            f"past belongs to one conversation, and the batch has {len(batch.input_ids)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _generate_ids(
    vlm: VLM,
    batch: PackedBatch,
    max_new_tokens: int,
    choose_ids: Callable[[Tensor], Tensor],
    on_token: Callable[[list[list[int]]], None] | None,
    past: PrefixCache | None,
    compiled: bool,
) -> list[list[int]]:
    rows: DecodingState | StaticDecodingState
    rows, embeds = _prepare_decoding(vlm, batch, past)
    room = (vlm.language.config.max_position_embeddings - rows.attention_mask.sum(1)).tolist()
    limits = [min(max_new_tokens, left) for left in room]
    logits = rows.decode_embeddings(embeds)
    if compiled:
        rows = StaticDecodingState(rows, max(limits) - 1)  # the last token is not read
    new: list[list[int]] = [[] for _ in limits]
    ended = [False] * len(new)
    while True:
        ids = choose_ids(logits[:, : vlm.tokenizer.embedding_rows])
        for row, token in enumerate(ids.tolist()):
            if not ended[row]:
                ended[row] = _append_token(vlm, token, new[row], limits[row])
        if on_token:
            on_token(new)
        if all(ended):
            break
        logits = rows.decode_next(ids)
    if past:
        past.append_generated(new[0])
    return new


def _append_token(vlm: VLM, token_id: int, new_ids: list[int], max_new_tokens: int) -> bool:
    """Add a token to the new ids of a row; tell whether the row has ended."""
    if token_id == NONFINITE_ID:
        raise _nonfinite_error(vlm)
    new_ids.append(token_id)
    return has_ended(vlm, new_ids) or len(new_ids) >= max_new_tokens


def _nonfinite_error(vlm: VLM) -> EnvironmentFailure:
    """Return the error for a model that gives no numbers; it names a weight that is none."""
    reason = "all its weights are finite, so numbers became too large on the way"
    if vlm.language.dtype == torch.float16:
        reason += ", as in float16 beyond 65504: dtype=bf16 or dtype=float32 may do"
    for name, weight in vlm.named_parameters():
        if not weight.isfinite().all():
            reason = f"its weight {name} holds nan or inf"
            break
    return EnvironmentFailure(f"the model's logits are not finite: {reason}")


def _prepare_decoding(
    vlm: VLM, batch: PackedBatch, past: PrefixCache | None
) -> tuple[DecodingState, Tensor]:
    """Return rows that have read what is known or common, and embeddings of what they read next."""
    visual = past.encode_images(vlm, batch) if past else vlm.visual(batch)
    embeds, sees, positions = (
        vlm.merge_embeddings(batch, visual),
        batch.image_index,
        batch.position_ids,
    )
    mask = (batch.sample_index >= 0).long()
    if past:
        begin = past.reuse_prefix(vlm, batch)
        cache = past.kv_cache
    else:
        begin = common_prefix_length(batch)
        cache = _prefill_common_prefix(vlm, batch, visual, embeds, begin)
    embeds, sees, positions = (one[:, begin:] for one in (embeds, sees, positions))
    padded = mask[:, : mask.shape[1] - begin]  # the padding now covers the end of what was read
    mask = torch.cat([mask.new_ones(len(mask), begin), padded], dim=1)
    return DecodingState(vlm, visual, sees, positions, mask, cache), embeds


def _prefill_common_prefix(
    vlm: VLM, batch: PackedBatch, visual: Tensor, embeds: Tensor, prefix_length: int
) -> DynamicCache:
    """Return the cache after the `begin` tokens that all prompts begin with, read in one row.

    They stand at the left of every row, before its padding.
    """
    cache = DynamicCache(config=vlm.language.config)
    if prefix_length:
        padding = embeds.shape[1] - batch.sample_lengths[0][-1]
        at = (slice(1), slice(padding, padding + prefix_length))
        vlm.run_decoder(
            embeds[at],
            visual,
            batch.image_index[at],
            position_ids=batch.position_ids[at],
            use_cache=True,
            **{CACHE_ARGUMENT: cache},
        )
        repeat_kv_cache(cache, len(embeds))
    return cache


def decode_answer(vlm: VLM, new_ids: list[int]) -> str:
    """Return the text of an answer: decoded, stripped, and cut at a stop text that ends it."""
    text = vlm.tokenizer.decode(new_ids).strip()
    return text.removesuffix(vlm.template.stop).strip()


class AnswerStream:
    """Hand out the text of an answer while it is written.

    What may still change is held back: half a character, spaces, and the beginning of a stop text.
    The pieces concatenate to `answer_text`.
    """

    def __init__(self, vlm: VLM, on_text: Callable[[str], None]) -> None:
        """Call `show` with each new piece of text."""
        self.vlm, self.on_text, self.shown_text = vlm, on_text, ""

    def __call__(self, new_ids: list[list[int]]) -> None:
        """Show what is certain of the first row."""
        text = self.vlm.tokenizer.decode(new_ids[0]).strip().rstrip("\ufffd")
        stop = self.vlm.template.stop
        text = text.split(stop)[0] if text.find(stop) > 0 else text
        longest = next((n for n in range(len(stop), 0, -1) if text.endswith(stop[:n])), 0)
        self._show_up_to(text[: len(text) - longest].rstrip())

    def finish_answer(self, new_ids: list[int]) -> str:
        """Show the rest and return the whole answer."""
        text = decode_answer(self.vlm, new_ids)
        self._show_up_to(text)
        return text

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self.shown_text):
            self.on_text(text[len(self.shown_text) :])
            self.shown_text = text
