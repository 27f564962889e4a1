"""Standard output and error on which no text can act: control characters are shown as escapes.

Ids, texts, paths, answers and what libraries say of them reach the terminal through many doors:
prints, warnings, log handlers, progress bars. All of them end at these two streams.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from vlbench.errors import printable_text
from vlbench.process_settings import SettingsGuard
from vlbench.stop_signals import RestoreFunction

MESSAGE_MARK = "vlbench:"
"""How a message of vlbench begins."""
CURSOR_MOVES = re.compile(r"(?:\n|\x1b\[A)*")  # tqdm's, between bars that stand below each other


class PrintableStream:
    """A text stream that escapes control characters; everything else is the stream's own.

    A progress bar may return to the start of its line, and no quoted text may begin a line as
    vlbench's own do.
    """

    def __init__(self, stream: Any, carries_bars: bool) -> None:
        """Take the stream, and whether progress bars are drawn on it."""
        self._stream, self._carries_bars = stream, carries_bars

    def write(self, text: str) -> int:
        """Write a text; return its length. An OSError names the stream as its file."""
        with self._naming_the_stream():
            self._stream.write(self._escape(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered. An OSError names the stream as its file."""
        with self._naming_the_stream():
            self._stream.flush()

    @contextmanager
    def _naming_the_stream(self) -> Iterator[None]:
        """Tell a stream that cannot be written from any other file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or getattr(self._stream, "name", None)
            raise

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, one after the other."""
        for line in lines:
            self.write(line)

    def _escape(self, text: str) -> str:
        if text.isascii() and text.replace("\n", "").isprintable() and "\n" not in text[:-1]:
            return text
        start = end = ""
        if self._carries_bars:
            if CURSOR_MOVES.fullmatch(text) and self._stream.isatty():
                return text
            start = text[: len(text) - len(text.lstrip("\r"))]
            text = text[len(start) :]
            end = text[len(text.rstrip("\r")) :]
            text = text[: len(text) - len(end)]
        shown = printable_text(text).replace(f"\n{MESSAGE_MARK}", f"\\n{MESSAGE_MARK}")
        return start + shown + end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


class QuotedPieces:
    """Passes on a text that comes in pieces; no line of it begins as vlbench's own messages do.

    What may become such a beginning is held back until the next piece, or `finish`.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        """Call `write` with what may be shown; it begins a line."""
        self._write, self._held, self._begins_line = write, "", True

    def __call__(self, piece: str) -> None:
        """Pass on a piece."""
        text = self._held + piece
        last_line = text[text.rfind("\n") + 1 :]
        begins_line = self._begins_line or "\n" in text
        self._held = last_line if begins_line and MESSAGE_MARK.startswith(last_line) else ""
        self._show(text[: len(text) - len(self._held)])

    def finish(self) -> None:
        """Pass on what is held back."""
        text, self._held = self._held, ""
        self._show(text)

    def _show(self, text: str) -> None:
        if not text:
            return
        escape = "\\" if self._begins_line and text.startswith(MESSAGE_MARK) else ""
        self._begins_line = text.endswith("\n")
        self._write(escape + text.replace(f"\n{MESSAGE_MARK}", f"\n\\{MESSAGE_MARK}"))


def show_control_characters() -> AbstractContextManager[None]:
    """Let everything written on standard output and error be printable.

    Of threads that overlap, the last one to leave puts the streams back.
    """
    return _STREAMS_GUARD


def _replace_streams() -> RestoreFunction:
    before = sys.stdout, sys.stderr
    # None where a stream is closed
    sys.stdout = PrintableStream(sys.stdout, False) if sys.stdout else sys.stdout
    sys.stderr = PrintableStream(sys.stderr, True) if sys.stderr else sys.stderr

    def restore_streams() -> None:
        sys.stdout, sys.stderr = before

    return restore_streams


_STREAMS_GUARD = SettingsGuard(_replace_streams)
