"""Token ids of an answer to its text: where it ends, how it is decoded, and as a stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from vlbench.data.tokenizer import Tokenizer
from vlbench.processor import Processor

SETTLED_AFTER = 16
"""Tokens of an answer that are decoded again at each step, at most."""


def has_ended(
    processor: Processor,
    eos_token_ids: Collection[int],
    new_ids: list[int],
    text: str | None = None,
) -> bool:
    """Tell whether an answer has ended: at an end-of-text id, or when its text has the stop text.

    As in Yi-VL's reference, a `###` that is the very first token does not end the answer. `text` is
    that of `new_ids`, where it is known.
    """
    if new_ids[-1] in eos_token_ids:
        return True
    if len(new_ids) == 1 and processor.template.stops_late:
        return False
    text = processor.tokenizer.decode(new_ids) if text is None else text
    return processor.template.stop in text


def decode_answer(processor: Processor, new_ids: list[int]) -> str:
    """Return the text of an answer: decoded, stripped, and cut at a stop text that ends it."""
    return _without_end(processor, processor.tokenizer.decode(new_ids))


def _without_end(processor: Processor, text: str) -> str:
    return text.strip().removesuffix(processor.template.stop).strip()


class GrowingText:
    """Decode an answer that grows, token by token, in a time that does not grow with it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin with an empty answer."""
        self._tokenizer = tokenizer
        self._settled_text, self._settled_count = "", 0

    def decode(self, new_ids: list[int]) -> str:
        """Return the text of `new_ids`, which begin with those of the last call."""
        text = self._settled_text + self._tokenizer.decode(new_ids[self._settled_count :])
        if len(new_ids) - self._settled_count >= SETTLED_AFTER:
            self._settle_tokens(new_ids, text)
        return text

    def _settle_tokens(self, new_ids: list[int], text: str) -> None:
        """Keep the text of all but the last tokens, where these decode alone as behind it.

        They do not where a character is cut in two; then the next step tries again.
        """
        settled_count = len(new_ids) - SETTLED_AFTER // 2
        rest = self._tokenizer.decode(new_ids[settled_count:])
        if rest and rest[0] != "\ufffd" and text.endswith(rest):
            self._settled_text, self._settled_count = text.removesuffix(rest), settled_count


class AnswerStream:
    """Pass on the text of an answer while it is generated.

    What may still change is held back: half a character, spaces, and the beginning of a stop text.
    The pieces concatenate to what `decode_answer` gives, up to the first of `stop_texts`.
    """

    def __init__(
        self,
        processor: Processor,
        on_text: Callable[[str], None],
        stop_texts: Sequence[str] = (),
    ) -> None:
        """Call `on_text` with each new piece of text; it ends before any of `stop_texts`.

        These count behind the spaces and line ends with which an answer may begin.
        """
        self.processor, self.on_text, self.shown_text = processor, on_text, ""
        self.stop_texts = tuple(stop_texts)
        self.met_stop_text = False
        """Whether one of `stop_texts` was met."""
        self._growing_text = GrowingText(processor.tokenizer)

    def __call__(self, new_ids: list[list[int]]) -> None:
        """Pass on what is certain of the first row."""
        self.pass_on(self._growing_text.decode(new_ids[0]))

    def pass_on(self, decoded_text: str) -> None:
        """Pass on what is certain of the text of the answer so far."""
        text = self._cut_at_stop_texts(decoded_text)
        if not self.met_stop_text:
            text = self._without_partial_stop(text.rstrip("\ufffd"), self.stop_texts)
        text = text.strip().rstrip("\ufffd")
        stop = self.processor.template.stop
        text = text.split(stop)[0] if text.find(stop) > 0 else text
        self._show_up_to(self._without_partial_stop(text, [stop]).rstrip())

    def finish_answer(self, new_ids: list[int]) -> str:
        """Pass on the rest and return the whole answer."""
        text = self._cut_at_stop_texts(self.processor.tokenizer.decode(new_ids))
        text = _without_end(self.processor, text)
        self._show_up_to(text)
        return text

    def _cut_at_stop_texts(self, text: str) -> str:
        """Return the answer before the first of the stop texts that it has."""
        text = text.lstrip()
        found = [text.find(stop_text) for stop_text in self.stop_texts if stop_text in text]
        self.met_stop_text = bool(found)
        return text[: min(found)] if found else text

    @staticmethod
    def _without_partial_stop(text: str, stop_texts: Sequence[str]) -> str:
        """Return a text without the beginning of a stop text at its end."""
        partial = max(
            (
                size
                for stop_text in stop_texts
                for size in range(1, len(stop_text) + 1)
                if text.endswith(stop_text[:size])
            ),
            default=0,
        )
        return text[: len(text) - partial]

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self.shown_text):
            self.on_text(text[len(self.shown_text) :])
            self.shown_text = text
