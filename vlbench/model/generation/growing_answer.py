"""One answer while it is generated: its ids, their text, and why it ended."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from vlbench.errors import EnvironmentFailure
from vlbench.model.generation.answer_text import GrowingText, has_ended
from vlbench.model.vlm import VLM
from vlbench.processor import Processor


class GrowingAnswer:
    """The new ids of one answer, to which tokens are appended until it ends."""

    def __init__(
        self, processor: Processor, eos_token_ids: Collection[int], max_tokens: int
    ) -> None:
        """Begin an answer of at most `max_tokens`, which any of `eos_token_ids` ends."""
        self.processor, self.max_tokens = processor, max_tokens
        self.new_ids: list[int] = []
        self.text = ""
        """The text of `new_ids`, with the stop text if it has one."""
        self.end_reason: Literal["stop", "length"] | None = None
        """Whether the answer was complete, or had all its tokens; None while it goes on."""
        self._eos_token_ids = eos_token_ids
        self._growing_text = GrowingText(processor.tokenizer)

    def append_token(self, token_id: int) -> None:
        """Append one id, and find whether the answer has ended."""
        self.new_ids.append(token_id)
        self.text = self._growing_text.decode(self.new_ids)
        if has_ended(self.processor, self._eos_token_ids, self.new_ids, self.text):
            self.end_reason = "stop"
        elif len(self.new_ids) >= self.max_tokens:
            self.end_reason = "length"


def answer_limit(vlm: VLM, prompt_length: int, max_new_tokens: int) -> int:
    """Return how many tokens an answer may have: the language model's positions are a limit too."""
    return min(max_new_tokens, vlm.language.config.max_position_embeddings - prompt_length)


def eos_token_ids(vlm: VLM, processor: Processor) -> set[int]:
    """Return the ids that end an answer: those of the tokenizer, language model and template."""
    eos_of_language = vlm.language.generation_config.eos_token_id
    if isinstance(eos_of_language, int):
        eos_of_language = [eos_of_language]
    stop_id = processor.tokenizer.named_tokens.get(processor.template.stop)
    ends = {processor.tokenizer.eos_token_id, *(eos_of_language or [])}
    return ends if stop_id is None else {*ends, stop_id}


def nonfinite_error(vlm: VLM) -> EnvironmentFailure:
    """Return the error for logits that are not finite; it names a weight that is not."""
    reason = "all its weights are finite, so numbers became too large on the way"
    if vlm.language.dtype == torch.float16:
        reason += ", as in float16 beyond 65504: dtype=bf16 or dtype=float32 may do"
    for name, weight in vlm.named_parameters():
        if not weight.isfinite().all():
            reason = f"its weight {name} holds nan or inf"
            break
    return EnvironmentFailure(f"the model's logits are not finite: {reason}")
