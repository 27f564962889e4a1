"""The engine of `serve`: one thread that answers many requests with one model, together.

In a turn of the thread every row that is decoded gets one token, and prompts that wait are computed
for as many positions as `prefill_tokens`, or an image, take: so neither waits for the other long.
"""

from __future__ import annotations

import atexit
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass

import torch

from vlbench.core_sharing import share_cores
from vlbench.errors import UserError
from vlbench.model.eval_copy import in_eval_mode
from vlbench.model.generation.continuous_batch import BatchRow, ContinuousBatch
from vlbench.model.generation.decoding_state import CompiledDecodeStep
from vlbench.model.generation.growing_answer import (
    GrowingAnswer,
    answer_limit,
    eos_token_ids,
    nonfinite_error,
)
from vlbench.model.generation.prefix_pool import PrefixPool, position_keys
from vlbench.model.generation.prompt_prefill import PromptPrefill
from vlbench.model.generation.sampling_options import check_sampling_options
from vlbench.model.generation.token_sampling import NONFINITE_ID, RowSampler
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.process_settings import avoid_cudnn_attention
from vlbench.processor import holds_conversations
from vlbench.serve.answer_request import (
    AnswerRequest,
    EndCallback,
    EngineClosing,
    FinishReason,
    QueueFull,
    TextCallback,
)
from vlbench.serve.running_answer import Prompt, RunningAnswer


@dataclass(frozen=True)
class EngineCounts:
    """What the engine does now, and has done since it began."""

    rows_running: int
    """Answers that are decoded."""
    requests_waiting: int
    """Accepted requests without a token, the one whose prompt is computed included."""
    answers_stopped: int
    """Answers that were complete, or met a stop text."""
    answers_cut: int
    """Answers that had all their tokens."""
    answers_cancelled: int
    answers_failed: int
    """Answers that an error ended."""
    prompt_tokens: int
    """Positions of the prompts of answers that have begun."""
    cached_tokens: int
    """Those that were known from earlier requests."""
    completion_tokens: int
    decode_steps: int
    """Steps, in each of which every row got one token."""
    kept_positions: int
    """Positions kept for prompts that begin alike."""


class AnswerHandle:
    """What the one who asked holds of an answer."""

    def __init__(self, cancel_request: threading.Event) -> None:
        """Take what the engine looks at between two steps."""
        self._cancel_request = cancel_request

    def cancel(self) -> None:
        """End the answer at the next step; `on_end` is called with "cancelled".

        Nothing happens if it has ended.
        """
        self._cancel_request.set()


class GenerationEngine:
    """Answers requests, together; `submit` may be called by any thread."""

    def __init__(
        self,
        vlm: LoadedVLM,
        max_rows: int = 32,
        max_waiting: int = 64,
        prefill_tokens: int = 512,
        prefix_positions: int = 16384,
        decode_step: CompiledDecodeStep | None = None,
    ) -> None:
        """Start the thread.

        Args:
            vlm: The model; if it is in training mode, a copy in evaluation mode answers.
            max_rows: Answers that are decoded together at most.
            max_waiting: Requests that wait at most.
            prefill_tokens: Positions of prompts that are computed between two steps at most; the
                last prompt among them may bring as many again.
            prefix_positions: Positions of earlier conversations whose keys and values are kept, for
                prompts that begin alike.
            decode_step: Compiles the decoding step, before the first request; None compiles none.

        Raises:
            UserError: when the step cannot be compiled.
        """
        self._processor, self._model = vlm.processor, in_eval_mode(vlm.model)
        self._max_rows, self._max_waiting = max_rows, max_waiting
        self._prefill_tokens = prefill_tokens
        self._eos_ids = eos_token_ids(self._model, self._processor)
        self._pool = PrefixPool(prefix_positions)
        self._batch = ContinuousBatch(
            self._model, self._processor.tokenizer.embedding_rows, max_rows, decode_step
        )
        if self._batch.is_compiled:
            self._compile_step()
        self._changed = threading.Condition()
        """Guards the four below, which other threads read."""
        self._waiting: deque[RunningAnswer] = deque()
        self._unfinished_count = 0
        self._is_draining = self._is_closed = False
        self._prefilling: RunningAnswer | None = None
        self._decoding: list[RunningAnswer] = []
        self._end_counts = dict.fromkeys(("stop", "length", "cancelled", "failed"), 0)
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._steps = 0
        self._thread = threading.Thread(target=self._run, name="vlbench generation", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that outlives the interpreter may crash it

    def submit(
        self, request: AnswerRequest, on_text: TextCallback, on_end: EndCallback
    ) -> AnswerHandle:
        """Accept a request, whose prompt is encoded in the calling thread.

        Args:
            request: What is asked.
            on_text: Called by the engine's thread with each piece of the answer, whole characters.
                If it raises, the answer ends with that error.
            on_end: Called by the engine's thread once, with how the answer ended, or with the error
                of the model or of `on_text` that ended it.

        Raises:
            UserError: for what is wrong with the request; ConversationTooLong is one.
            QueueFull: when `max_waiting` requests wait.
            EngineClosing: after `drain` or `close`.
        """
        arrived_at = time.monotonic()
        self._refuse_if_full()  # before the work
        prompt = self._encode_prompt(request)
        limit = answer_limit(self._model, len(prompt.position_keys), request.max_new_tokens)
        growing = GrowingAnswer(self._processor, self._eos_ids, limit)
        answer = RunningAnswer(request, prompt, growing, on_text, on_end, arrived_at)
        with self._changed:
            self._refuse_if_full()
            self._waiting.append(answer)
            self._unfinished_count += 1
            self._changed.notify_all()
        return AnswerHandle(answer.cancel_request)

    def drain(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and wait until all accepted answers have ended.

        Return False if they have not after `timeout` seconds; they go on.
        """
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._unfinished_count, timeout)

    def close(self) -> None:
        """Accept nothing more, end what is left with EngineClosing, and stop the thread."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def counts(self) -> EngineCounts:
        """Return the counts of this moment."""
        with self._changed:
            rows = len(self._decoding)
            ends = self._end_counts
            return EngineCounts(
                rows_running=rows,
                requests_waiting=self._unfinished_count - rows,
                answers_stopped=ends["stop"],
                answers_cut=ends["length"],
                answers_cancelled=ends["cancelled"],
                answers_failed=ends["failed"],
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                completion_tokens=self._completion_tokens,
                decode_steps=self._steps,
                kept_positions=self._pool.position_count,
            )

    def _refuse_if_full(self) -> None:
        if self._is_draining:
            raise EngineClosing("the server ends the answers it has begun, and begins no others")
        if len(self._waiting) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} requests wait, as many as may; ask again later")

    def _encode_prompt(self, request: AnswerRequest) -> Prompt:
        check_sampling_options(
            request.max_new_tokens, request.temperature, request.top_p, request.seed
        )
        if not all(isinstance(text, str) and text for text in request.stop):
            raise UserError(f"stop is {request.stop!r}; allowed are texts that are not empty")
        if holds_conversations(request.messages):
            raise UserError(f"messages are {len(request.messages)} conversations; wanted is one")
        batch = self._processor.prepare(request.messages)
        return Prompt(batch, position_keys(batch))

    @torch.inference_mode()
    def _compile_step(self) -> None:
        """Decode a row that nobody has asked for: requests need not wait for the compiler."""
        device = self._model.device
        with share_cores(device), avoid_cudnn_attention(device.type):
            batch = self._processor.prepare([{"role": "user", "content": "Hello"}])
            keys = position_keys(batch)
            prefill = PromptPrefill(self._model, batch.to(device), keys, PrefixPool(0))
            while prefill.logits is None:
                prefill.advance(self._prefill_tokens)
            sampler = RowSampler(0.0, 1.0, torch.Generator(device))
            row = self._batch.add_row(prefill, sampler)
            self._batch.step()
            self._batch.remove_row(row)

    @torch.inference_mode()
    def _run(self) -> None:
        device = self._model.device
        while self._wait_for_work():
            with share_cores(device), avoid_cudnn_attention(device.type):
                while self._unfinished_count and not self._is_closed:
                    self._take_turn()
        self._end_all(EngineClosing("the server was closed before the answer ended"))

    def _wait_for_work(self) -> bool:
        """Wait for a request; return False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished_count or self._is_closed)
            return not self._is_closed

    def _take_turn(self) -> None:
        try:
            self._end_cancelled()
            self._compute_prompts()
            self._decode_rows()
        except Exception as error:  # nothing may end the thread, on which all answers wait
            self._end_all(error)

    def _unfinished_answers(self) -> list[RunningAnswer]:
        with self._changed:
            first = [self._prefilling] if self._prefilling else []
            return [*self._decoding, *first, *self._waiting]

    def _end_cancelled(self) -> None:
        for answer in self._unfinished_answers():
            if answer.cancel_request.is_set():
                self._end_answer(answer, "cancelled")

    def _end_all(self, error: Exception) -> None:
        for answer in self._unfinished_answers():
            self._end_answer(answer, error)

    def _compute_prompts(self) -> None:
        """Compute pieces of prompts until `prefill_tokens` positions are done, or none is left."""
        done_count = 0
        while done_count < self._prefill_tokens:
            answer = self._prefilling or self._begin_next()
            if answer is None:
                return
            try:
                done_count += self._advance_prompt(answer)
            except Exception as error:
                self._end_failed(answer, error)

    def _begin_next(self) -> RunningAnswer | None:
        """Return the request that waits for longest, if there are a row and memory for it."""
        with self._changed:
            if self._waiting and len(self._decoding) < self._max_rows:
                rows = [*self._decoding, self._waiting[0]]
                longest = max(answer.most_positions for answer in rows)
                if not self._decoding or self._batch.has_room(len(rows), longest):
                    self._prefilling = self._waiting.popleft()
            return self._prefilling

    def _advance_prompt(self, answer: RunningAnswer) -> int:
        """Compute a piece of a prompt; behind its end the answer joins with its first token."""
        prompt, request, device = answer.prompt, answer.request, self._model.device
        if answer.prefill is None:
            answer.prefill = PromptPrefill(
                self._model, prompt.batch.to(device), prompt.position_keys, self._pool
            )
            answer.cached_count = answer.prefill.cached_count
        done_count = answer.prefill.advance(self._prefill_tokens)
        if answer.prefill.logits is not None:
            generator = torch.Generator(device=device).manual_seed(request.seed)
            sampler = RowSampler(request.temperature, request.top_p, generator)
            answer.row = self._batch.add_row(answer.prefill, sampler)
            self._prompt_tokens += answer.prefill.length
            self._cached_tokens += answer.cached_count
            with self._changed:
                self._prefilling, answer.prefill = None, None
                self._decoding.append(answer)
            self._take_token(answer, answer.row.token_id)
        return done_count

    def _decode_rows(self) -> None:
        """Give every row one token."""
        if not self._decoding:
            return
        answers = list(self._decoding)
        try:
            self._batch.step()
        except Exception as error:
            for answer in answers:
                self._end_failed(answer, error)
            return
        self._steps += 1
        for answer in answers:
            assert answer.row is not None
            self._take_token(answer, answer.row.token_id)

    def _take_token(self, answer: RunningAnswer, token_id: int) -> None:
        if token_id == NONFINITE_ID:
            self._end_failed(answer, nonfinite_error(self._model))
            return
        self._completion_tokens += 1
        try:
            answer.take_token(token_id)
        except Exception as error:  # of on_text
            self._end_answer(answer, error)
            return
        if answer.end_reason:
            self._end_answer(answer, answer.end_reason)

    def _end_failed(self, answer: RunningAnswer, error: Exception) -> None:
        """End an answer with an error of the model; memory may be what it lacked."""
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        self._pool.clear()
        self._end_answer(answer, error)

    def _end_answer(self, answer: RunningAnswer, outcome: FinishReason | Exception) -> None:
        """Free what an answer holds, and tell how it ended."""
        if answer.row is not None:
            if outcome in ("stop", "length") and self._pool.max_positions:
                self._keep_prefix(answer, answer.row)
            self._batch.remove_row(answer.row)
        with self._changed:
            if answer in self._decoding:
                self._decoding.remove(answer)
            elif answer in self._waiting:
                self._waiting.remove(answer)
            else:
                self._prefilling = None
        answer.prefill = answer.row = None
        self._end_counts["failed" if isinstance(outcome, Exception) else outcome] += 1
        answer.end(outcome)
        with self._changed:
            self._unfinished_count -= 1
            self._changed.notify_all()

    def _keep_prefix(self, answer: RunningAnswer, row: BatchRow) -> None:
        """Keep what was computed, for the conversation's next turn."""
        try:
            self._pool.add_prefix(self._batch.copy_prefix(row, answer.growing.new_ids))
        except RuntimeError:  # no memory for the copy: the next turn is computed anew
            self._pool.clear()
