"""Talking to a model: one question, or a conversation with commands."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from golden_release import CASES, CHECKPOINT, GOLDEN
from PIL import Image

import vlbench
from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.errors import UserError
from vlbench.serve.chat_command import ChatSession

WIDE = GOLDEN / "images/wide_rgb.png"
MULTI = next(case for case in CASES["cases"] if case["name"] == "multi_turn")


def talk(lines: list[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", f"model={CHECKPOINT}", "max_new_tokens=6", *words])


def test_one_question_is_answered_as_the_reference_answers(capsys):
    case = CASES["cases"][0]
    question = case["conversation"][0]["content"].partition("\n")[2]
    words = [f"image={WIDE}", f"question={question}", "max_new_tokens=64", "dtype=float32"]
    assert main(["chat", f"model={CHECKPOINT}", *words]) == 0
    assert capsys.readouterr().out == case["text"] + "\n"


def test_a_conversation_has_history_images_and_an_end(monkeypatch, capsys):
    lines = [f"/image {WIDE}", "What?", "Why?", "/history", "/reset", "/history", "/quit", "never"]
    assert talk(lines, monkeypatch) == 0
    said = capsys.readouterr().out
    history, rest = said.split("a new conversation begins")
    assert "### Human: <image_placeholder>\nWhat?\n### Assistant: " in history
    assert "\n### Human: Why?\n### Assistant: " in history
    assert "Why?" not in rest and "never" not in said


def test_a_mistake_ends_no_conversation(monkeypatch, capsys):
    lines = ["/imgae x", "/image nothing.png", f"/image {GOLDEN / 'cases.json'}", "Hello"]
    assert talk(lines, monkeypatch) == 0
    said = capsys.readouterr()
    assert "Did you mean '/image'?" in said.err and "nothing.png: does not exist" in said.err
    assert "not an image" in said.err and said.out.strip()


def test_multi_turn_reaches_the_model_as_in_the_reference():
    vlm = vlbench.load(CHECKPOINT)
    talking = ChatSession(vlm, {"max_new_tokens": 64})
    turns = MULTI["conversation"]
    talking.pending_images = [str(WIDE)]
    for question, answer in zip(turns[0:-1:2], turns[1::2], strict=True):
        talking.answer_question(question["content"].removeprefix("<image_placeholder>\n"))
        talking.messages[-1]["content"] = answer["content"]
    asked = [*talking.messages, {"role": "user", "content": turns[-1]["content"]}]
    assert vlm.prompt(asked) == MULTI["prompt"]


def test_an_answer_that_is_stopped_keeps_what_was_written(monkeypatch, capsys):
    vlm = vlbench.load(CHECKPOINT)
    talking = ChatSession(vlm, {"max_new_tokens": 64})
    original, steps = type(vlm.tokenizer).decode, []

    def decode(self, ids, keep_special=False):
        steps.append(1)
        if len(steps) > 20:
            raise KeyboardInterrupt
        return original(self, ids, keep_special)

    monkeypatch.setattr(type(vlm.tokenizer), "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        talking.answer_question("Hello")
    assert [turn["role"] for turn in talking.messages] == ["user", "assistant"]
    assert talking.messages[1]["content"] == capsys.readouterr().out.strip("\n") != ""
    assert vlm.language.config._attn_implementation == "vlbench_packed"


MISTAKES = {
    "nothing": ([], "needs model=PATH"),
    "two": (["model=a", "model=b"], "model is given twice"),
    "old word": (["run=a"], "chat has no key 'run'"),
    "misspelt": (["modle=a"], "Did you mean 'model'"),
    "no model": (["model=no-such-folder"], "no run folder, checkpoint or released model"),
    "heat": (
        [f"model={CHECKPOINT}", "temperature=hot"],
        "temperature must be a number",
    ),
    "top_p": ([f"model={CHECKPOINT}", "top_p=2"], "top_p must be at most 1, given 2"),
    "type": ([f"model={CHECKPOINT}", "dtype=int4"], "dtype must be one of float32"),
    "device": ([f"model={CHECKPOINT}", "device=tpu"], "device is 'tpu'"),
    "no image": ([f"model={CHECKPOINT}", "image=no.png"], "no.png: does not exist"),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_what_chat_cannot_do_is_one_line(words, said, capsys):
    assert main(["chat", *words, "question=Hello"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_sampling_is_drawn_from_its_seed():
    vlm = vlbench.load(CHECKPOINT)
    ask = [{"role": "user", "content": "Hello"}]
    hot = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    answers = [vlm.chat(ask, seed=seed, **hot) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert vlm.chat(ask, max_new_tokens=12, temperature=1.0, top_p=0.0) == vlm.chat(
        ask, max_new_tokens=12
    )


def test_messages_of_another_shape_are_refused():
    vlm = vlbench.load(CHECKPOINT)
    image = Image.new("RGB", (8, 8))
    for wrong in (
        [{"role": "bot", "content": "x"}],
        [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": image}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image", "image": b"x"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "x"}],
        ["Hello"],
        {"role": "user", "content": "x"},
    ):
        with pytest.raises(UserError):
            vlm.prepare(wrong)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}])
def test_impossible_sampling_is_refused(options):
    vlm = vlbench.load(CHECKPOINT)
    with pytest.raises(UserError, match="temperature is"):
        vlm.chat([{"role": "user", "content": "x"}], **options)
    with pytest.raises(UserError, match="top_p is 2"):
        vlm.chat([{"role": "user", "content": "x"}], top_p=2)


WRONG_ORDERS = {
    "two users": [("user", "a"), ("user", "b")],
    "assistant first": [("assistant", "a"), ("user", "b")],
    "system later": [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")],
    "system alone": [("system", "a")],
    "nothing": [],
    "image of the system": [("system", WIDE), ("user", "b")],
    "image of the assistant": [("user", "a"), ("assistant", WIDE), ("user", "b")],
    "half a character": [("user", "a\ud800")],
    "an answer last": [("user", "a"), ("assistant", "b")],
    "an image that is not there": [("user", "a <image_placeholder>")],
}


@pytest.mark.parametrize("turns", WRONG_ORDERS.values(), ids=WRONG_ORDERS)
def test_a_conversation_that_training_would_refuse_is_not_answered(turns):
    vlm = vlbench.load(CHECKPOINT)
    asked = [
        {"role": role, "content": said if said != WIDE else [{"type": "image", "image": said}]}
        for role, said in turns
    ]
    with pytest.raises(UserError) as caught:
        vlm.prepare(asked)
    assert len(str(caught.value).splitlines()) == 1
    assert "human" not in str(caught.value)  # the word of training records


def chat(stdin: bytes | None, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Talk to the golden model in a process of its own; None closes its standard input."""
    command = [sys.executable, "-m", "vlbench", "chat", f"model={CHECKPOINT}", "max_new_tokens=4"]
    if stdin is None:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    return subprocess.run(
        [*command, *words], input=stdin, capture_output=True, env=os.environ | environment
    )


def test_bytes_that_are_no_text_are_refused_and_the_talk_goes_on():
    done = chat(b"caf\xe9\nHello\n")
    assert done.returncode == 0 and done.stdout.strip()
    note, error = done.stderr.splitlines()
    assert b"no image in this conversation; /image FILE adds one" in note
    assert b"character 4 is half a character" in error


def test_without_standard_input_a_question_is_needed():
    done = chat(None)
    assert done.returncode == 2 and b"needs question=TEXT" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert chat(None, "question=Hello").returncode == 0


def test_a_terminal_that_lacks_letters_shows_their_numbers():
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = chat(b"/history\n", **latin)
    assert done.returncode == 0 and b"\\u8fd9\\u662f" in done.stdout


TWICE = {
    "twice": (["max_new_tokens=3", "max_new_tokens=5"], "max_new_tokens is given twice, as '3'"),
    "part of a token": (
        ["max_new_tokens=2.7"],
        "max_new_tokens must be a whole",
    ),
    "part of a seed": (["seed=0.5"], "seed must be a whole number, given 0.5"),
    "no device": (["device=meta"], "device is 'meta'"),
}


@pytest.mark.parametrize(("words", "said"), TWICE.values(), ids=TWICE)
def test_what_would_be_taken_otherwise_is_refused(words, said, capsys):
    test_what_chat_cannot_do_is_one_line([f"model={CHECKPOINT}", *words], said, capsys)


def test_ctrl_c_at_the_prompt_asks_first_and_keeps_the_conversation(monkeypatch, capsys):
    vlm = vlbench.load(CHECKPOINT)
    talking = ChatSession(vlm, {"max_new_tokens": 4})
    typed = iter(["Hello", KeyboardInterrupt, "/history", KeyboardInterrupt, KeyboardInterrupt])

    def ask(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        talking.run_interactive()
    said = capsys.readouterr().out
    assert said.count("press Ctrl-C again, or /quit, to leave") == 2
    assert "Human: Hello" in said


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", f"model={CHECKPOINT}", "out=~/own", "format=vlbench"]) == 0
    assert main(["chat", "model=~/own", "question=Hello", "max_new_tokens=1"]) == 0
    words = ["recipe=yivl_llava", "init=~/own", "run=~/run", "data.train=~/a.json"]
    recipe = recipes.load_recipe(words)
    assert recipe.init == f"{tmp_path}/own" and recipe.run == f"{tmp_path}/run"
    assert recipe.data.train == f"{tmp_path}/a.json"
