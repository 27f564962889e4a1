"""Generation: prompts of any length in one batch, images encoded once, with a KV cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlbench.data.packing import PackedBatch
from vlbench.errors import UserError
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.generation.decoding_state import (
    CompiledDecodeStep,
    DecodingState,
    StaticDecodingState,
)
from vlbench.model.generation.growing_answer import (
    GrowingAnswer,
    answer_limit,
    eos_token_ids,
    nonfinite_error,
)
from vlbench.model.generation.kv_cache import (
    PrefixCache,
    common_prefix_length,
    prefill_common_prefix,
)
from vlbench.model.generation.sampling_options import check_sampling_options
from vlbench.model.generation.token_sampling import NONFINITE_ID, sample_next_ids
from vlbench.model.vlm import VLM
from vlbench.process_settings import avoid_cudnn_attention
from vlbench.processor import Processor

TokenCallback = Callable[[list[list[int]]], None]
"""Called after each step with the new ids of all rows so far."""


@torch.inference_mode()
def generate(
    vlm: VLM,
    processor: Processor,
    batch: PackedBatch,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: TokenCallback | None = None,
    past: PrefixCache | None = None,
    compiled: bool = False,
    decode_step: CompiledDecodeStep | None = None,
) -> list[list[int]]:
    """Return the new ids of every row of `batch`.

    Several threads may call it with one model at once: nothing about the model is changed, not even
    its mode. A row ends at the latest where the language model's positions do, and ids beyond the
    tokenizer's are never chosen.

    Args:
        vlm: The model; if it is in training mode, a copy in evaluation mode that shares its weights
            answers.
        processor: The model's processor, whose tokenizer and template say where an answer ends.
        batch: Prompts, padded on the left (`sample_index` -1), on the model's device.
        max_new_tokens: Tokens per row at most.
        temperature: 0 for the likeliest token; otherwise the logits are divided by it and a token
            is drawn.
        top_p: A token is drawn from the likeliest that together have this probability.
        seed: Of the random generator of this call.
        on_token: Called after each step with all new ids so far, for streaming.
        past: The cache of the one conversation in `batch`; what it holds is not computed again.
        compiled: Compile the step of one token, once for each number of rows and rounded length:
            it takes tens of seconds, and pays off for many or long answers on a GPU.
        decode_step: Holds the compiled graphs, to be used again; None: one of this call alone.

    Raises:
        UserError: for an option whose value is not allowed.
        EnvironmentFailure: when logits are not finite.
    """
    check_sampling_options(max_new_tokens, temperature, top_p, seed)
    _check_cache_options(batch, past, compiled)
    generator = torch.Generator(device=vlm.device).manual_seed(seed)
    choose_ids = functools.partial(
        sample_next_ids, temperature=temperature, top_p=top_p, generator=generator
    )
    vlm = in_eval_mode(vlm)
    try:
        with avoid_cudnn_attention(vlm.device.type):
            prefill, embeds = _prepare_decoding(vlm, batch, past)
            prompt_lengths = prefill.attention_mask.sum(1)
            eos_ids = eos_token_ids(vlm, processor)
            rows = [
                GrowingAnswer(processor, eos_ids, answer_limit(vlm, length, max_new_tokens))
                for length in prompt_lengths.tolist()
            ]
            logits = prefill.decode_embeddings(embeds)
            state: DecodingState | StaticDecodingState = prefill
            if compiled:
                # the last token is not run through the model
                new_token_count = max(row.max_tokens for row in rows) - 1
                state = StaticDecodingState(prefill, new_token_count, decode_step)
            _decode_rows(rows, state, logits, choose_ids, on_token)
    except BaseException:
        if past:
            past.clear_cache()  # it may have been stopped between two layers
        raise
    if past:
        past.append_generated(rows[0].new_ids)
    return [row.new_ids for row in rows]


def _check_cache_options(batch: PackedBatch, past: Any, compiled: Any) -> None:
    """Raise a UserError where `past` and `compiled` are not allowed."""
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


def _prepare_decoding(
    vlm: VLM, batch: PackedBatch, past: PrefixCache | None
) -> tuple[DecodingState, Tensor]:
    """Return rows whose known or common prefix is in the cache, and the embeddings of the rest."""
    visual = past.encode_images(vlm, batch) if past else vlm.encode_images(batch)
    embeds = vlm.merge_embeddings(batch, visual)
    where = vlm.image_places(batch)
    if past:
        cache, prefix_length = past.reuse_prefix(vlm, batch)
    else:
        prefix_length = common_prefix_length(batch)
        cache = prefill_common_prefix(vlm, batch, visual, embeds, where, prefix_length)
    mask = (batch.sample_index >= 0).long()
    # the padding of a row now stands behind the common prefix
    mask = torch.cat(
        [mask.new_ones(len(mask), prefix_length), mask[:, : mask.shape[1] - prefix_length]], dim=1
    )
    state = DecodingState(
        vlm,
        visual,
        where and where.select(slice(None), slice(prefix_length, None)),
        batch.position_ids[:, prefix_length:],
        mask,
        cache,
    )
    return state, embeds[:, prefix_length:]


def _decode_rows(
    rows: list[GrowingAnswer],
    state: DecodingState | StaticDecodingState,
    logits: Tensor,
    choose_ids: Callable[[Tensor], Tensor],
    on_token: TokenCallback | None,
) -> None:
    """Append one token after the other, from logits `[rows, vocabulary]`, until all rows end."""
    while True:
        token_ids = choose_ids(logits[:, : rows[0].processor.tokenizer.embedding_rows])
        for row, token_id in zip(rows, token_ids.tolist(), strict=True):
            if row.end_reason:
                continue
            if token_id == NONFINITE_ID:
                raise nonfinite_error(state.vlm)
            row.append_token(token_id)
        if on_token:
            on_token([row.new_ids for row in rows])
        if all(row.end_reason for row in rows):
            return
        logits = state.decode_next(token_ids)
