"""`python -m vlbench chat`: ask a model one question, or talk to it."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

from PIL import Image

from vlbench.command_line.arguments import ChatArguments
from vlbench.data.image_download import download_image
from vlbench.data.image_processing import open_image
from vlbench.errors import UserError, suggest_name
from vlbench.garbage_collection import pause_garbage_collection
from vlbench.printable_streams import QuotedPieces

if TYPE_CHECKING:
    from vlbench.model.loaded_vlm import LoadedVLM

GENERATION_KEYS = ("max_new_tokens", "temperature", "top_p", "seed")
COMMANDS_HELP = """\
/image FILE   add an image (a file or a URL) to the next question; again: one more image
/drop         remove the images that wait for the next question
/reset        start a new conversation
/history      print the conversation
/quit         leave (so do Ctrl-D, and Ctrl-C twice); Ctrl-C ends an answer"""
CHAT_COMMANDS = ("/image", "/drop", "/reset", "/history", "/help", "/quit")
ImageInput = str | Image.Image
_URL_PATTERN = re.compile(r"[a-z][a-z\d+.-]*://((?!,[a-z]+://)\S)+", re.I)  # one, not several


def run_chat(arguments: ChatArguments) -> int:
    """Answer one question, or talk until the input ends; return the exit code."""
    if arguments.question is None and sys.stdin is None:
        raise UserError("chat needs question=TEXT where standard input is closed")
    # before the model, which takes seconds to load
    images = [image for name in arguments.image for _, image in resolve_images(name)]
    with pause_garbage_collection():
        from vlbench.load_model import load_chosen_model  # it imports torch
        from vlbench.train.model_names import folder_model_names

    vlm = load_chosen_model(arguments)
    options = {key: getattr(arguments, key) for key in GENERATION_KEYS}
    session = ChatSession(vlm, options, compiled=arguments.compiled)
    session.pending_images = images
    if arguments.question is not None:
        session.answer_question(arguments.question)
        return 0
    if sys.stdin.isatty():
        names = folder_model_names(arguments.model)
        print(f"{arguments.model}: vision {names.vision}, language {names.language}")
    return session.run_interactive()


def resolve_image(name: str) -> ImageInput:
    """Return the path of an image file, or the image of a URL; a UserError if it is neither."""
    name = url2pathname(name[7:]) if name.startswith("file:///") else name
    if _URL_PATTERN.match(name):
        return download_image(name)
    path = os.path.expanduser(name)
    open_image(path)
    return path


def resolve_images(line: str) -> list[tuple[str, ImageInput]]:
    """Return name and image of every file that a line names, separated by spaces or commas.

    That is so where all of them exist or are URLs; otherwise the line is the name of one file.
    """
    line = line.strip()
    whole = line.strip("'\"")
    try:
        several = [shlex.split(line), whole.split(",")]
    except ValueError:  # an unclosed quote
        several = []
    for names in [[whole], *several]:
        if names and all(map(_is_file_or_url, names)):
            return [(name, resolve_image(name)) for name in names]
    return [(whole, resolve_image(whole))]


def _is_file_or_url(name: str) -> bool:
    """Return whether a name is a file or one URL; unlike Path, os.path takes any text."""
    return bool(_URL_PATTERN.fullmatch(name)) or os.path.isfile(os.path.expanduser(name))


class ChatSession:
    """A conversation: its messages, and the images that come with the next question."""

    def __init__(
        self, vlm: LoadedVLM, chat_options: dict[str, Any], compiled: bool = False
    ) -> None:
        """Talk to `vlm`; `chat_options` are those of `LoadedVLM.chat`.

        With `compiled` the decoding step is compiled, and every answer reads the whole prompt: the
        KV cache of a conversation grows, which a compiled step cannot.
        """
        from vlbench.model.generation.kv_cache import PrefixCache

        self.vlm, self.chat_options, self.compiled = vlm, chat_options, compiled
        self.messages: list[dict[str, Any]] = []
        self.pending_images: list[ImageInput] = []
        self.is_interactive = False  # whether more than one question is asked
        self.has_noted_no_image = False
        self.prefix_cache = PrefixCache()

    def run_interactive(self) -> int:
        """Read questions and commands until the input ends; return the exit code."""
        self.is_interactive = True
        if isinstance(sys.stdin, io.TextIOWrapper):  # invalid bytes are refused by the tokenizer
            sys.stdin.reconfigure(errors="surrogateescape")
        if sys.stdin.isatty():
            import readline  # noqa: F401  # arrow keys and history

            print(COMMANDS_HELP)
        while True:
            try:
                line = self.read_line()
            except EOFError:
                print()
                return 0
            if line == "/quit":
                return 0
            try:
                self.dispatch_line(line)
            except UserError as error:
                print(f"vlbench: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print("(stopped)")

    def read_line(self) -> str:
        """Return the next line; at a prompt only a second Ctrl-C ends the session."""
        is_terminal = sys.stdin.isatty()
        try:
            return input("you: " if is_terminal else "").strip()
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(press Ctrl-C again, or /quit, to leave)")
            return input("you: ").strip()

    def dispatch_line(self, line: str) -> None:
        """Run a command, or answer a question."""
        if line.startswith("/"):
            self.run_command(line)
        elif line:
            self.answer_question(line)

    def run_command(self, line: str) -> None:
        """Run a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        if name == "/image":
            if not rest.strip():
                raise UserError("/image needs a file, as in /image FILE")
            for file, image in resolve_images(rest):
                self.pending_images.append(image)
                print(f"{file} comes with the next question ({self._describe_pending_images()})")
        elif name == "/drop":
            print(f"removed: {self._describe_pending_images()}")
            self.pending_images = []
        elif name == "/reset":
            self.messages, self.pending_images, self.has_noted_no_image = [], [], False
            print("a new conversation begins")
        elif name == "/history":
            print(self.vlm.prompt([*self.messages, {"role": "user", "content": "..."}]))
        elif name == "/help":
            print(COMMANDS_HELP)
        else:
            known = ", ".join(CHAT_COMMANDS)
            raise UserError(
                f"no command {name}; known are {known}.{suggest_name(name, CHAT_COMMANDS)}"
            )

    def _describe_pending_images(self) -> str:
        count = len(self.pending_images)
        return f"{count} image{'' if count == 1 else 's'}"

    def answer_question(self, question: str) -> None:
        """Print the answer while it is generated, and keep question and answer.

        An answer that is stopped with Ctrl-C is kept as far as it was generated.
        """
        from vlbench.processor import ConversationTooLong  # it imports torch

        content: list[dict[str, Any]] = [
            {"type": "image", "image": image} for image in self.pending_images
        ]
        content.append({"type": "text", "text": question})
        messages = [*self.messages, {"role": "user", "content": content}]
        chunks: list[str] = []

        shown = QuotedPieces(lambda text: print(text, end="", flush=True))

        def print_chunk(text: str) -> None:
            chunks.append(text)
            shown(text)

        self._note_missing_image(messages)
        past = None if self.compiled else self.prefix_cache
        try:
            self.vlm.chat(
                messages,
                stream=print_chunk,
                past=past,
                compiled=self.compiled,
                **self.chat_options,
            )
        except ConversationTooLong as error:
            hint = "; /reset starts a new conversation, /drop removes the waiting images"
            raise UserError(f"{error}{hint if self.is_interactive else ''}") from error
        finally:
            shown.finish()
            print(flush=True)
            if chunks:
                answer = {"role": "assistant", "content": "".join(chunks)}
                self.messages, self.pending_images = [*messages, answer], []
        self._warn_about_answer(bool(chunks))

    def _note_missing_image(self, messages: list[dict[str, Any]]) -> None:
        """Say at the first question of a conversation that no image comes with it."""
        parts = [
            part
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        has_image = any(part["type"] == "image" for part in parts)
        if not has_image and not self.has_noted_no_image:
            self.has_noted_no_image = True
            how = "/image FILE adds one" if self.is_interactive else "image=FILE shows one"
            print(f"vlbench: there is no image in this conversation; {how}", file=sys.stderr)

    def _warn_about_answer(self, has_answer: bool) -> None:
        """Warn of an answer that is empty, or cut because the context is full."""
        max_tokens = self.vlm.language.config.max_position_embeddings
        if not has_answer:
            print("vlbench: the answer is empty; it is not kept", file=sys.stderr)
        elif self.prefix_cache.position_count >= max_tokens:
            hint = "; /reset starts a new conversation" if self.is_interactive else ""
            print(
                f"vlbench: the answer ends here because all {max_tokens} tokens of the language "
                f"model's context are used{hint}",
                file=sys.stderr,
            )
