"""One answer that the engine was asked for: its prompt, its text so far, and its end."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from torch import Tensor

from vlbench.data.packing import PackedBatch
from vlbench.data.sample_encoding import IMAGE_TOKEN_INDEX
from vlbench.errors import one_line
from vlbench.model.generation.answer_text import AnswerStream
from vlbench.model.generation.continuous_batch import BatchRow
from vlbench.model.generation.growing_answer import GrowingAnswer
from vlbench.model.generation.prompt_prefill import PromptPrefill
from vlbench.serve.answer_request import (
    AnswerEnd,
    AnswerRequest,
    EndCallback,
    FinishReason,
    TextCallback,
)


@dataclass(frozen=True)
class Prompt:
    """The prompt of a request, on the CPU, as the submitting thread has made it."""

    batch: PackedBatch
    """One row without padding."""
    position_keys: Tensor
    """`[length]`, see `prefix_pool.position_keys`."""


class RunningAnswer:
    """One accepted request until its end; all but `cancel_request` is the model thread's."""

    def __init__(
        self,
        request: AnswerRequest,
        prompt: Prompt,
        growing: GrowingAnswer,
        on_text: TextCallback,
        on_end: EndCallback,
        arrived_at: float,
    ) -> None:
        """Begin without a token.

        Args:
            request: What is asked.
            prompt: Its prompt.
            growing: The answer, without a token.
            on_text: Called with each piece of its text.
            on_end: Called once, with how it ended or with the error that ended it.
            arrived_at: When the request arrived, in seconds of `time.monotonic`.
        """
        self.request, self.prompt, self.growing = request, prompt, growing
        self.cancel_request = threading.Event()
        """Set by any thread when nobody wants the answer any more."""
        self.prefill: PromptPrefill | None = None
        """None before it, and after it."""
        self.row: BatchRow | None = None
        """Its row while it is decoded."""
        self.cached_count = 0
        self._stream = AnswerStream(growing.processor, on_text, request.stop)
        self._on_end, self._arrived_at = on_end, arrived_at
        self._seconds_to_first_token: float | None = None

    @property
    def end_reason(self) -> FinishReason | None:
        """Why it has ended; None while it goes on."""
        return "stop" if self._stream.met_stop_text else self.growing.end_reason

    @property
    def most_positions(self) -> int:
        """Positions that its row may take."""
        return len(self.prompt.position_keys) + self.growing.max_tokens

    def take_token(self, token_id: int) -> None:
        """Append a token, and pass on the text that is certain; raises what `on_text` raises."""
        if self._seconds_to_first_token is None:
            self._seconds_to_first_token = time.monotonic() - self._arrived_at
        self.growing.append_token(token_id)
        self._stream.pass_on(self.growing.text)
        if self.end_reason:
            self._stream.finish_answer(self.growing.new_ids)

    def end(self, outcome: FinishReason | Exception) -> None:
        """Tell how it ended. What `on_end` raises is logged: nobody is left to be told."""
        told: AnswerEnd | Exception
        if isinstance(outcome, Exception):
            told = outcome
        else:
            ids = self.prompt.batch.input_ids
            told = AnswerEnd(
                finish_reason=outcome,
                prompt_tokens=ids.shape[1],
                visual_tokens=int((ids == IMAGE_TOKEN_INDEX).sum()),
                views=len(self.prompt.batch.pixels),
                cached_tokens=self.cached_count,
                completion_tokens=len(self.growing.new_ids),
                seconds_to_first_token=self._seconds_to_first_token,
                seconds=time.monotonic() - self._arrived_at,
            )
        try:
            self._on_end(told)
        except Exception as error:
            logging.getLogger(__name__).error("the end of an answer: %s", one_line(error))
