"""Generation: prompts of any length in one batch, images encoded once, with a KV cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlbench.data.packing import PackedBatch
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.generation.answer_text import has_ended
from vlbench.model.generation.decoding_state import (
    CompiledDecodeStep,
    DecodingState,
    StaticDecodingState,
)
from vlbench.model.generation.kv_cache import (
    PrefixCache,
    common_prefix_length,
    prefill_common_prefix,
)
from vlbench.model.generation.sampling_options import check_sampling_options
from vlbench.model.vlm import VLM
from vlbench.process_settings import avoid_cudnn_attention
from vlbench.processor import Processor

NONFINITE_ID = -1
"""What `sample_next_ids` gives instead of an id where no logit is finite."""
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
            room = (vlm.language.config.max_position_embeddings - prompt_lengths).tolist()
            rows = _GeneratedRows(vlm, processor, [min(max_new_tokens, left) for left in room])
            logits = prefill.decode_embeddings(embeds)
            state: DecodingState | StaticDecodingState = prefill
            if compiled:
                new_token_count = max(rows.limits) - 1  # the last one is not run through the model
                state = StaticDecodingState(prefill, new_token_count, decode_step)
            _decode_rows(rows, state, logits, choose_ids, on_token)
    except BaseException:
        if past:
            past.clear_cache()  # it may have been stopped between two layers
        raise
    if past:
        past.append_generated(rows.new_ids[0])
    return rows.new_ids


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
    rows: _GeneratedRows,
    state: DecodingState | StaticDecodingState,
    logits: Tensor,
    choose_ids: Callable[[Tensor], Tensor],
    on_token: TokenCallback | None,
) -> None:
    """Append one token after the other, from `logits` `[rows, vocabulary]`, until all rows end."""
    while True:
        token_ids = choose_ids(logits[:, : rows.processor.tokenizer.embedding_rows])
        rows.append_tokens(token_ids.tolist())
        if on_token:
            on_token(rows.new_ids)
        if all(rows.ended):
            return
        logits = state.decode_next(token_ids)


class _GeneratedRows:
    """The new ids of every row, and which rows have ended."""

    def __init__(self, vlm: VLM, processor: Processor, limits: list[int]) -> None:
        """`limits` are the new tokens of each row at most."""
        self.vlm, self.processor, self.limits = vlm, processor, limits
        self.new_ids: list[list[int]] = [[] for _ in limits]
        self.ended = [False] * len(limits)
        self.eos_token_ids = eos_token_ids(vlm, processor)

    def append_tokens(self, token_ids: list[int]) -> None:
        """Append one id to every row that has not ended."""
        for row, token_id in enumerate(token_ids):
            if self.ended[row]:
                continue
            if token_id == NONFINITE_ID:
                raise _nonfinite_error(self.vlm)
            new_ids = self.new_ids[row]
            new_ids.append(token_id)
            self.ended[row] = (
                has_ended(self.processor, self.eos_token_ids, new_ids)
                or len(new_ids) >= self.limits[row]
            )


def eos_token_ids(vlm: VLM, processor: Processor) -> set[int]:
    """Return the ids that end an answer: those of the tokenizer, language model and template."""
    eos_of_language = vlm.language.generation_config.eos_token_id
    if isinstance(eos_of_language, int):
        eos_of_language = [eos_of_language]
    stop_id = processor.tokenizer.named_tokens.get(processor.template.stop)
    ends = {processor.tokenizer.eos_token_id, *(eos_of_language or [])}
    return ends if stop_id is None else {*ends, stop_id}


def sample_next_ids(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> Tensor:
    """Choose the next ids `[rows]` from logits `[rows, vocabulary]`: greedy at temperature 0.

    A row whose greatest logit is not finite gives NONFINITE_ID: the ids travel to the host anyway,
    so the device need not be waited for once more to know it.
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids.where(logits.gather(-1, ids[:, None])[:, 0].isfinite(), NONFINITE_ID)
    probabilities = (logits.float() / temperature).softmax(-1)
    ordered, index = probabilities.sort(-1, descending=True)
    finite = ordered[:, :1].isfinite()
    ordered = ordered.where(finite, 1.0)  # multinomial of nan on a GPU breaks the CUDA context
    beyond = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
    beyond[:, 0] = False
    ordered[beyond] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return index.gather(-1, choice).where(finite, NONFINITE_ID).squeeze(-1)


def _nonfinite_error(vlm: VLM) -> EnvironmentFailure:
    """Return the error for logits that are not finite; it names a weight that is not."""
    reason = "all its weights are finite, so numbers became too large on the way"
    if vlm.language.dtype == torch.float16:
        reason += ", as in float16 beyond 65504: dtype=bf16 or dtype=float32 may do"
    for name, weight in vlm.named_parameters():
        if not weight.isfinite().all():
            reason = f"its weight {name} holds nan or inf"
            break
    return EnvironmentFailure(f"the model's logits are not finite: {reason}")
