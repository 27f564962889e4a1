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

from vlbench.data.download import download_image
from vlbench.data.images import open_image
from vlbench.data.template import template_named
from vlbench.mistakes import Mistake, nearest
from vlbench.model.sampling import ELSEWHERE, refuse_unknown
from vlbench.words import given_keys, number, whole

if TYPE_CHECKING:
    from vlbench.model.vlm import VLM

SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed")
KEYS = ("model", "run", "image", "question", *SAMPLING, "template", "dtype", "device")
HELP = """\
/image FILE   show a picture with the next question; again: one more picture (a file or a URL)
/drop         take back the pictures that wait for the next question
/reset        forget the conversation
/history      print the conversation
/quit         leave (so do Ctrl-D, and Ctrl-C twice); Ctrl-C ends an answer"""
COMMANDS = ("/image", "/drop", "/reset", "/history", "/help", "/quit")
Shown = str | Image.Image
_URL = re.compile(r"[a-z][a-z\d+.-]*://((?!,[a-z]+://)\S)+", re.I)  # one, not several


def main(words: list[str]) -> int:
    """Answer `question=TEXT` about `image=FILE`, or talk until the input ends; return the code.

    `image=` may be given several times, and be a URL.
    """
    keys = [word.partition("=")[0] for word in words]
    refuse_unknown("chat", [key for key in keys if key in ELSEWHERE], KEYS)
    names = [word.removeprefix("image=") for word in words if word.startswith("image=")]
    given = given_keys("chat", [w for w in words if not w.startswith("image=")], (), KEYS)
    path = given.get("model") or given.get("run")
    if not path or ("model" in given and "run" in given):
        raise Mistake("chat needs model=PATH: a run, a checkpoint or a released model")
    options = _sampling(given)
    template = template_named(given.get("template"))
    if "question" not in given and sys.stdin is None:
        raise Mistake("chat needs question=TEXT where standard input is closed")
    # before the model, which takes seconds
    images = [picture for name in names for _, picture in pictures_of(name)]
    from vlbench import load

    vlm = load(path, given.get("dtype"), given.get("device"), template)
    talk = Talk(vlm, options)
    talk.images = images
    if "question" in given:
        talk.ask(given["question"])
        return 0
    return talk.loop()


def _sampling(given: dict[str, str]) -> dict[str, Any]:
    return {
        "max_new_tokens": whole(given, "max_new_tokens", 512, 1, 100_000),
        "temperature": number(given, "temperature", 0.0, 0.0, 10.0),
        "top_p": number(given, "top_p", 1.0, 0.0, 1.0),
        "seed": whole(given, "seed", 0, 0, 2**32 - 1),
    }


def picture_of(name: str) -> Shown:
    """Return the path of a picture, or the picture itself of a URL; a Mistake where it is none."""
    if not name:
        raise Mistake("image has no value; write image=FILE")
    name = url2pathname(name[7:]) if name.startswith("file:///") else name
    if _URL.match(name):
        return download_image(name)
    path = os.path.expanduser(name)
    open_image(path)
    return path


def pictures_of(line: str) -> list[tuple[str, Shown]]:
    """Return name and picture of every file that a line names, divided by spaces or commas.

    That is so where all of them exist or are URLs; otherwise the line is the name of one file.
    """
    line = line.strip()
    whole = line.strip("'\"")
    try:
        several = [shlex.split(line), whole.split(",")]
    except ValueError:  # a quote that is not closed
        several = []
    for names in [[whole], *several]:
        if names and all(map(_can_be_opened, names)):
            return [(name, picture_of(name)) for name in names]
    return [(whole, picture_of(whole))]


def _can_be_opened(name: str) -> bool:
    """Tell whether a name is that of a file or one URL; unlike Path, os.path takes any text."""
    return bool(_URL.fullmatch(name)) or os.path.isfile(os.path.expanduser(name))


class Talk:
    """A conversation: its messages, and the pictures that come with the next question."""

    def __init__(self, vlm: VLM, options: dict[str, Any]) -> None:
        """Talk to `vlm`; `options` are those of `VLM.chat`."""
        from vlbench.model.past import Past

        self.vlm, self.options = vlm, options
        self.messages: list[dict[str, Any]] = []
        self.images: list[Shown] = []
        self.talking = False  # more is asked than one question
        self.past = Past()

    def loop(self) -> int:
        """Read questions and commands until the input ends; return the exit code."""
        self.talking = True
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
            for file, picture in pictures_of(rest):
                self.images.append(picture)
                print(f"{file} comes with the next question ({self._attached()})")
        elif name == "/drop":
            print(f"taken back: {self._attached()}")
            self.images = []
        elif name == "/reset":
            self.messages, self.images = [], []
            print("the conversation is forgotten")
        elif name == "/history":
            print(self.vlm.prompt([*self.messages, {"role": "user", "content": "..."}]))
        elif name == "/help":
            print(HELP)
        else:
            known = ", ".join(COMMANDS)
            raise Mistake(f"no command {name}; known are {known}.{nearest(name, COMMANDS)}")

    def _attached(self) -> str:
        count = len(self.images)
        return f"{count} picture{'' if count == 1 else 's'}"

    def ask(self, question: str) -> None:
        """Print the answer while it is written, and keep question and answer.

        What is stopped with Ctrl-C is kept as far as it was written.
        """
        from vlbench.model.messages import TooLong  # it imports torch

        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in self.images]
        content.append({"type": "text", "text": question})
        asked = [*self.messages, {"role": "user", "content": content}]
        written: list[str] = []

        def show(text: str) -> None:
            written.append(text)
            print(text, end="", flush=True)

        try:
            self.vlm.chat(asked, stream=show, past=self.past, **self.options)
        except TooLong as mistake:
            way = "/reset forgets the conversation, /drop the waiting pictures"
            raise Mistake(f"{mistake}; {way}" if self.talking else str(mistake)) from mistake
        finally:
            print(flush=True)
            if written:
                answer = {"role": "assistant", "content": "".join(written)}
                self.messages, self.images = [*asked, answer], []
        self._remark(bool(written))

    def _remark(self, answered: bool) -> None:
        """Say of an answer what cannot be seen in it: that it is empty, or cut for want of room."""
        most = self.vlm.language.config.max_position_embeddings
        if not answered:
            print("vlbench: the answer is empty; it is not kept", file=sys.stderr)
        elif self.past.length >= most:
            way = "; /reset forgets the conversation" if self.talking else ""
            print(
                f"vlbench: the answer ends here because all {most} tokens that the language model "
                f"reads are used{way}",
                file=sys.stderr,
            )
