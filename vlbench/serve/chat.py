"""`python -m vlbench chat`: ask a model one question, or talk to it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.data.images import open_image
from vlbench.mistakes import Mistake, nearest
from vlbench.words import given_keys, number, whole

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

KEYS = ("model", "run", "image", "question", "max_new_tokens", "temperature", "top_p", "seed")
HELP = """\
/image FILE   show a picture with the next question
/reset        forget the conversation
/history      print the conversation
/quit         leave (so do Ctrl-D, and Ctrl-C twice); Ctrl-C ends an answer"""
COMMANDS = ("/image", "/reset", "/history", "/help", "/quit")


def main(words: list[str]) -> int:
    """Answer `question=TEXT` about `image=FILE`, or talk until the input ends; return the code."""
    given = given_keys("chat", words, (), (*KEYS, "dtype", "device"))
    path = given.get("model") or given.get("run")
    if not path or ("model" in given and "run" in given):
        raise Mistake("chat needs model=PATH: a run, a checkpoint or a released model")
    options = {
        "max_new_tokens": whole(given, "max_new_tokens", 512, 1, 100_000),
        "temperature": number(given, "temperature", 0.0, 0.0, 10.0),
        "top_p": number(given, "top_p", 1.0, 0.0, 1.0),
        "seed": whole(given, "seed", 0, 0, 2**32 - 1),
    }
    if "question" not in given and sys.stdin is None:
        raise Mistake("chat needs question=TEXT where standard input is closed")
    if "image" in given:
        given["image"] = str(Path(given["image"]).expanduser())
        open_image(given["image"])  # before the model, which takes seconds
    from vlbench import load

    vlm = load(path, given.get("dtype"), given.get("device"))
    talk = Talk(vlm, options)
    talk.image = given.get("image")
    if "question" in given:
        talk.ask(given["question"])
        return 0
    return talk.loop()


class Talk:
    """A conversation: its messages, and the picture that comes with the next question."""

    def __init__(self, vlm: VLM, options: dict[str, Any]) -> None:
        """Talk to `vlm`; `options` are those of `VLM.chat`."""
        from vlbench.model.past import Past

        self.vlm, self.options = vlm, options
        self.messages: list[dict[str, Any]] = []
        self.image: str | None = None
        self.past = Past()

    def loop(self) -> int:
        """Read questions and commands until the input ends; return the exit code."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused where it is asked
            sys.stdin.reconfigure(errors="surrogateescape")
        if sys.stdin.isatty():
            import readline  # noqa: F401  # arrow keys, and what was typed before

            print(HELP)
        while True:
            try:
                line = self.read()
            except EOFError:
                print()
                return 0
            if line == "/quit":
                return 0
            try:
                self.take(line)
            except Mistake as mistake:
                print(f"vlbench: {mistake}", file=sys.stderr)
            except KeyboardInterrupt:
                print("(stopped)")

    def read(self) -> str:
        """Return what is typed; at a prompt only a second Ctrl-C leaves the conversation."""
        asks = sys.stdin.isatty()
        try:
            return input("you: " if asks else "").strip()
        except KeyboardInterrupt:
            if not asks:
                raise
            print("\n(press Ctrl-C again, or /quit, to leave)")
            return input("you: ").strip()

    def take(self, line: str) -> None:
        """Do what one line of the user asks for."""
        if line.startswith("/"):
            self.command(line)
        elif line:
            self.ask(line)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        if name == "/image":
            if not rest.strip():
                raise Mistake("/image FILE shows the model a picture")
            file = str(Path(rest.strip().strip("'\"")).expanduser())
            open_image(file)
            self.image = file
            print(f"{file} comes with the next question")
        elif name == "/reset":
            self.messages, self.image = [], None
            print("the conversation is forgotten")
        elif name == "/history":
            print(self.vlm.prompt([*self.messages, {"role": "user", "content": "..."}]))
        elif name == "/help":
            print(HELP)
        else:
            known = ", ".join(COMMANDS)
            raise Mistake(f"no command {name}; known are {known}.{nearest(name, COMMANDS)}")

    def ask(self, question: str) -> None:
        """Print the answer while it is written, and keep question and answer.

        What is stopped with Ctrl-C is kept as far as it was written.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if self.image:
            content.insert(0, {"type": "image", "image": self.image})
        asked = [*self.messages, {"role": "user", "content": content}]
        written: list[str] = []

        def show(text: str) -> None:
            written.append(text)
            print(text, end="", flush=True)

        try:
            self.vlm.chat(asked, stream=show, past=self.past, **self.options)
        finally:
            print(flush=True)
            if written:
                answer = {"role": "assistant", "content": "".join(written)}
                self.messages, self.image = [*asked, answer], None
