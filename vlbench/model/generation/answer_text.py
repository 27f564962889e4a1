"""Token ids of an answer to its text: where it ends, how it is decoded, and as a stream."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vlbench.processor import Processor


def has_ended(processor: Processor, eos_token_ids: Collection[int], new_ids: list[int]) -> bool:
    """Tell whether an answer has ended: at an end-of-text id, or when its text has the stop text.

    As in Yi-VL's reference, a `###` that is the very first token does not end the answer.
    """
    if new_ids[-1] in eos_token_ids:
        return True
    if len(new_ids) == 1 and processor.template.stops_late:
        return False
    return processor.template.stop in processor.tokenizer.decode(new_ids)


def decode_answer(processor: Processor, new_ids: list[int]) -> str:
    """Return the text of an answer: decoded, stripped, and cut at a stop text that ends it."""
    text = processor.tokenizer.decode(new_ids).strip()
    return text.removesuffix(processor.template.stop).strip()


class AnswerStream:
    """Pass on the text of an answer while it is generated.

    What may still change is held back: half a character, spaces, and the beginning of a stop text.
    The pieces concatenate to what `decode_answer` gives.
    """

    def __init__(self, processor: Processor, on_text: Callable[[str], None]) -> None:
        """Call `on_text` with each new piece of text."""
        self.processor, self.on_text, self.shown_text = processor, on_text, ""

    def __call__(self, new_ids: list[list[int]]) -> None:
        """Pass on what is certain of the first row."""
        text = self.processor.tokenizer.decode(new_ids[0]).strip().rstrip("\ufffd")
        stop = self.processor.template.stop
        text = text.split(stop)[0] if text.find(stop) > 0 else text
        lengths = range(len(stop), 0, -1)
        partial_stop = next((size for size in lengths if text.endswith(stop[:size])), 0)
        self._show_up_to(text[: len(text) - partial_stop].rstrip())

    def finish_answer(self, new_ids: list[int]) -> str:
        """Pass on the rest and return the whole answer."""
        text = decode_answer(self.processor, new_ids)
        self._show_up_to(text)
        return text

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self.shown_text):
            self.on_text(text[len(self.shown_text) :])
            self.shown_text = text
