"""Images in a conversation: several at once, by URL, taken back; and answers that are none."""

from __future__ import annotations

import http.server
import io
import threading
from dataclasses import replace

import pytest
from golden_release import CHECKPOINT, GOLDEN
from PIL import Image

import vlbench
from vlbench import load_model
from vlbench.__main__ import main
from vlbench.data import image_download
from vlbench.errors import EnvironmentFailure, UserError
from vlbench.model.loaded_vlm import LoadedVLM

WIDE, TALL = sorted((GOLDEN / "images").glob("*.png"))[:2]


def talk(lines: list[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", f"model={CHECKPOINT}", "max_new_tokens=3", *words])


class Server(http.server.BaseHTTPRequestHandler):
    """An image, a page that is none, and a file without end."""

    def do_GET(self) -> None:
        if self.path == "/gone.png":
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        if self.path == "/picture.png":
            return void(self.wfile.write(WIDE.read_bytes()))
        if self.path == "/page":
            return void(self.wfile.write(b"<html>a page</html>"))
        while True:
            try:
                self.wfile.write(b"x" * 65536)
            except OSError:
                return None

    def log_message(self, *_) -> None:
        """Say nothing."""


def void(_: object) -> None:
    return None


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def shown(monkeypatch) -> list[list[int]]:
    """Note how many images every question is asked with."""
    real, seen = LoadedVLM.chat, []

    def chat(self, messages, *args, **options):
        parts = [message["content"] for message in messages if message["role"] == "user"]
        seen.append([sum(part["type"] == "image" for part in one) for one in parts])
        return real(self, messages, *args, **options)

    monkeypatch.setattr(LoadedVLM, "chat", chat)
    return seen


def test_every_image_line_adds_an_image_to_the_next_question(monkeypatch, capsys):
    seen = shown(monkeypatch)
    lines = [f"/image {WIDE}", f"/image {TALL}", "Both?", f"/image '{WIDE}' {TALL}", "More?"]
    assert talk([*lines, "None?"], monkeypatch) == 0
    assert seen == [[2], [2, 2], [2, 2, 0]]
    said = capsys.readouterr().out
    assert f"{WIDE} comes with the next question (1 image)" in said
    assert said.count(f"{TALL} comes with the next question (2 images)") == 2


def test_waiting_images_can_be_taken_back(monkeypatch, capsys):
    seen = shown(monkeypatch)
    assert talk([f"/image {WIDE}", "/drop", "Hello"], monkeypatch) == 0
    assert seen == [[0]] and "removed: 1 image" in capsys.readouterr().out


def test_image_may_be_given_several_times(monkeypatch):
    seen = shown(monkeypatch)
    words = [f"image={WIDE}", f"image={TALL}", "question=Both?", "max_new_tokens=2"]
    assert main(["chat", f"model={CHECKPOINT}", *words]) == 0
    assert seen == [[2]]


def test_several_names_may_be_divided_by_commas_or_spaces(monkeypatch):
    seen = shown(monkeypatch)
    for names in (f"{WIDE},{TALL}", f"{WIDE} {TALL}"):
        words = [f"image={names}", "question=Both?", "max_new_tokens=2"]
        assert main(["chat", f"model={CHECKPOINT}", *words]) == 0
    assert seen == [[2], [2]]


def test_files_and_urls_may_be_named_together(url, monkeypatch, capsys):
    seen = shown(monkeypatch)
    picture = f"{url}/picture.png"
    lines = [
        f"/image {WIDE} {picture}",
        f"/image {picture} {picture}",
        f"/image {picture},{picture}",
    ]
    assert talk([*lines, "All?"], monkeypatch) == 0
    assert seen == [[6]] and not capsys.readouterr().err


@pytest.mark.parametrize("name", ["a" * 5000, "data:image/png;base64," + "A" * 9000, "~nobody/a"])
def test_a_name_that_no_file_can_have_is_one_line(name, monkeypatch, capsys):
    assert main(["chat", f"model={CHECKPOINT}", f"image={name}", "question=What?"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    seen = shown(monkeypatch)
    assert talk([f"/image {name}", "Still here?"], monkeypatch) == 0
    assert seen == [[0]]


def test_a_path_that_is_too_long_is_one_line(capsys):
    assert main(["chat", f"model={'a' * 5000}", "question=What?"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "File name too long" in said[0]


@pytest.mark.parametrize("word", ["question=", "template=", "dtype="])
def test_a_key_without_a_value_is_refused(word, capsys):
    assert main(["chat", f"model={CHECKPOINT}", word]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"{word[:-1]} has no value; write {word}" in said[0]


def test_a_name_with_spaces_is_one_file(tmp_path, monkeypatch, capsys):
    seen = shown(monkeypatch)
    file = tmp_path / "my own picture.png"
    Image.open(WIDE).save(file)
    lines = [f"/image {file}", f'/image "{file}"', f"/image {file.as_uri()}"]
    lines += [f"/image {tmp_path / 'not there.png'}", "Hello"]
    assert talk(lines, monkeypatch) == 0
    assert seen == [[3]]
    assert f"image {tmp_path / 'not there.png'}: does not exist" in capsys.readouterr().err


def test_an_image_by_url_is_the_file_it_names(url, monkeypatch, capsys):
    words = ["question=What?", "max_new_tokens=8"]
    answers = []
    for image in (WIDE, f"{url}/picture.png"):
        assert main(["chat", f"model={CHECKPOINT}", f"image={image}", *words]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"
    seen = shown(monkeypatch)
    assert talk([f"/image {url}/picture.png", "What?"], monkeypatch) == 0
    assert seen == [[1]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.png", "cannot be downloaded (404 Not Found)"),
        ("/page", "not an image"),
        ("/endless", "takes more than 1 MB or 60 seconds"),
    ],
)
def test_a_url_that_gives_no_image_is_one_line(path, message, url, monkeypatch, capsys):
    monkeypatch.setattr(image_download, "MAX_BYTES", 1_000_000)
    assert main(["chat", f"model={CHECKPOINT}", f"image={url}{path}", "question=Hello"]) == 2
    said = capsys.readouterr().err
    assert f"image {url}{path}: " in said and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/a.png", "the URL does not begin with http:// or https://"),
        ("http://127.0.0.1:9/a.png", "cannot be downloaded (Connection refused)"),
        ("http://[a/a.png", "cannot be downloaded"),
        ("", "image has no value; write image=FILE"),
    ],
)
def test_other_urls_are_refused_in_one_line(name, message, capsys):
    assert main(["chat", f"model={CHECKPOINT}", f"image={name}", "question=Hello"]) == 2
    said = capsys.readouterr().err
    assert message in said.replace("[Errno 111] ", "") and len(said.splitlines()) == 1


@pytest.mark.parametrize("image", ["https://x.org/a.png", "data:image/png;base64," + "A" * 80_000])
def test_python_refuses_urls_in_messages_and_says_what_to_give(image):
    vlm = vlbench.load(CHECKPOINT)
    with pytest.raises(UserError, match="is a URL, and images come from files") as caught:
        vlm.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}])
    assert len(str(caught.value)) < 400


HUGGING_FACE = {
    "do_sample": "greedy at temperature=0",
    "num_beams": "no search over beams",
    "top_k": "top_p and temperature alone",
    "repetition_penalty": "no penalty",
    "max_length": "max_new_tokens",
}


@pytest.mark.parametrize(("name", "message"), HUGGING_FACE.items())
def test_options_of_transformers_are_answered_with_what_stands_for_them(name, message, capsys):
    assert main(["chat", f"model={CHECKPOINT}", f"{name}=2", "question=Hello"]) == 2
    said = capsys.readouterr().err
    assert f"chat has no key '{name}'; its keys are model, " in said and message in said
    assert len(said.splitlines()) == 1
    vlm = vlbench.load(CHECKPOINT)
    ask = [{"role": "user", "content": "Hello"}]
    with pytest.raises(UserError, match=f"chat has no option '{name}'.*{message}"):
        vlm.chat(ask, **{name: 2})
    with pytest.raises(UserError, match=f"generate has no option '{name}'.*{message}"):
        vlm.generate(vlm.prepare(ask), **{name: 2})


def test_an_empty_answer_is_said_and_not_kept(monkeypatch, capsys):
    monkeypatch.setattr(LoadedVLM, "chat", lambda self, messages, **options: "")
    assert talk([f"/image {WIDE}", "Hello", "/history"], monkeypatch) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == ["vlbench: the answer is empty; it is not kept"]
    assert "Hello" not in said.out


@pytest.mark.parametrize("words", [["question=Hello", f"image={WIDE}"], []])
def test_trouble_of_the_model_is_one_line_and_exit_1(words, monkeypatch, capsys):
    def chat(self, messages, **options):
        raise EnvironmentFailure("the logits are not finite")

    monkeypatch.setattr(LoadedVLM, "chat", chat)
    assert talk([f"/image {WIDE}", "Hello", "never"], monkeypatch, *words) == 1
    assert capsys.readouterr().err.splitlines() == ["vlbench: the logits are not finite"]


def test_where_the_context_is_full_reset_is_named(monkeypatch, capsys):
    load = load_model.load_model

    def narrow(*args):
        vlm = load(*args)
        vlm.language.config.max_position_embeddings = 120
        vlm.processor = replace(vlm.processor, max_positions=120)
        return vlm

    monkeypatch.setattr(load_model, "load_model", narrow)
    words = ["max_new_tokens=400"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain?\n/reset\nHello\n"))
    assert main(["chat", f"model={CHECKPOINT}", *words]) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "there is no image in this conversation" not in line]
    assert len(lines) - len(said) == 2  # once for each conversation: /reset begins the second
    assert [line.count("/reset") for line in said] == [1, 1, 1]
    assert "all 120 tokens" in said[0] and "the language model reads fewer than 120" in said[1]
