"""`python -m vlbench serve`: what it refuses, what it prints, and a real model from end to end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import running_server
from fake_engine import fake_model
from golden_release import CHECKPOINT
from test_serve_api import client_of, says
from test_serve_hostile import chat, exchange, head, post

import vlbench
from vlbench.__main__ import main
from vlbench.command_line.arguments import ServeArguments
from vlbench.data.scene_world import make_scene
from vlbench.errors import UserError
from vlbench.serve import serve_command
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.http_server import ApiServer, bind_socket
from vlbench.serve.api.served_model import ServedModel, choose_model_names
from vlbench.serve.generation_engine import GenerationEngine
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import show_results

ROOT = Path(__file__).parents[1]
MODEL = f"model={CHECKPOINT}"


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line with which a command is refused."""
    assert main(["serve", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlbench: ")
    return lines[0]


def test_a_mistake_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(serve_command.KEY_VARIABLE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} (Address already in use)" in one_line(capsys, MODEL, f"port={port}")
    free = "port=0"
    for host in ("http://127.0.0.1", "127.0.0.1:9000", "[::1]:80", "localhost/"):
        line = one_line(capsys, MODEL, f"host={host}", "api_key=k")
        assert f"host is '{host}'; write the address alone" in line
    assert "set a key in the environment" in one_line(capsys, MODEL, free, "host=0.0.0.0")
    elsewhere = one_line(capsys, MODEL, free, "host=192.0.2.1", "api_key=k")  # nobody's address
    assert "cannot listen on 192.0.2.1, port 0 (Cannot assign" in elsewhere
    assert "given 70000" in one_line(capsys, MODEL, "port=70000")
    assert "max_waiting must be at least 1" in one_line(capsys, MODEL, "max_waiting=0")
    assert "device is 'gpu9'" in one_line(capsys, MODEL, free, "device=gpu9")
    assert str(tmp_path) in one_line(capsys, f"model={tmp_path}", free)
    assert "Did you mean 'model'?" in one_line(capsys, "models=a")
    assert "served once" in one_line(capsys, f"model={CHECKPOINT},{CHECKPOINT}", free)
    assert "API key has characters" in one_line(capsys, MODEL, free, "api_key=a b")
    for word in ("http://a.example/", "a.example/b", "*", "\u00e4.example", "a.example:x"):
        assert f"names '{word}'; write HOST or" in one_line(capsys, MODEL, f"allow_urls={word}")
    for word in ("https://a.example", "a.example:443"):
        assert f"names '{word}'; write HOST," in one_line(capsys, MODEL, f"allow_hosts={word}")
    votes = tmp_path / "votes.jsonl"
    assert "has nothing to vote on" in one_line(capsys, MODEL, free, f"votes={votes}")
    assert not votes.exists()
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None)
    line = one_line(capsys, MODEL, free)
    assert line.endswith("pip install fastapi uvicorn")  # vlbench is on no package index


def test_the_key_of_the_environment_opens_other_hosts(monkeypatch):
    monkeypatch.setenv(serve_command.KEY_VARIABLE, "secret")
    arguments = ServeArguments(model="a", host="0.0.0.0", allow_urls="A.example, b.example:81")
    settings = serve_command.read_settings(arguments)
    assert (settings.api_key, settings.is_loopback) == ("secret", False)
    assert settings.image_hosts == ("A.example", "b.example:81")
    hosts = ServeArguments(model="a", allow_hosts="B-1.example, [::1]", allow_urls="[fd00::1]:81")
    assert serve_command.read_settings(hosts).allowed_hosts == ("b-1.example", "[::1]")
    monkeypatch.setenv(serve_command.KEY_VARIABLE, "")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org", ""):
        with pytest.raises(UserError, match="set a key"):
            serve_command.read_settings(ServeArguments(model="a", host=host))
    for host in ("127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"):
        assert serve_command.read_settings(ServeArguments(model="a", host=host)).is_loopback


def test_the_first_lines_name_models_addresses_and_a_command_that_works(tmp_path):
    models = [fake_model("it's"), fake_model("b")]
    settings = ApiSettings(api_key="right")
    with running_server(models, settings) as (_, port):
        lines = serve_command.start_lines(models, settings, port)
        assert lines[0] == "it's: object, 9 visual tokens per image of 28 pixels, on cpu"
        assert f"API: http://127.0.0.1:{port}/v1" in "\n".join(lines)
        command = lines[-1].removeprefix("try: ").replace("curl ", "curl --silent --noproxy '*' ")
        environment = {**os.environ, serve_command.KEY_VARIABLE: "right"}
        said = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, check=True
        )
    assert '"content":"What can you see?"' in said.stdout
    assert serve_command.start_lines(models, ApiSettings(host="::"), 5)[2].startswith(
        "API: http://127.0.0.1:5/v1"
    )


def test_the_port_is_open_when_the_first_lines_are_printed(monkeypatch, capsys):
    def connect(server: ApiServer, sockets: list[socket.socket]) -> None:
        assert "try: curl" in capsys.readouterr().out
        socket.create_connection(sockets[0].getsockname(), 10).close()

    monkeypatch.setattr(serve_command, "load_served_model", lambda name, *_: fake_model(name))
    monkeypatch.setattr(ApiServer, "run", connect)
    assert main(["serve", MODEL, "port=0"]) == 0


def test_all_models_are_looked_for_before_the_first_is_loaded(monkeypatch, capsys, tmp_path):
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(serve_command, "load_served_model", load)
    missing = f"{MODEL},{tmp_path / 'missing'}"
    assert "missing" in one_line(capsys, missing, "port=0")
    assert "loaded" not in capsys.readouterr().err


def test_a_path_may_have_commas(tmp_path):
    folder = tmp_path / "layers=[1,2]"
    folder.mkdir()
    assert serve_command.split_paths(f" {folder}") == [str(folder)]
    assert serve_command.split_paths("a, b,") == ["a", "b"]


def test_names_of_models_are_unique(tmp_path, monkeypatch):
    assert choose_model_names(["runs/a", "b/"]) == ["a", "b"]
    assert choose_model_names(["x/a", "y/a", "z/b"]) == ["x/a", "y/a", "b"]
    assert choose_model_names(["x/y/a/seed0", "x/y/b/seed0"]) == ["a/seed0", "b/seed0"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    assert choose_model_names([".", "..", "../../other/"]) == ["checkpoints", "run", "other"]
    for same in (".", "../checkpoints", str(tmp_path / "run" / "checkpoints")):
        with pytest.raises(UserError, match="twice; a model is served once"):
            choose_model_names([".", same])
    with pytest.raises(UserError, match="a is served once|names a twice"):
        choose_model_names(["a", "a"])
    with pytest.raises(UserError, match="a/ twice|a twice"):
        choose_model_names(["runs/a", "runs/a/"])


def test_a_port_is_free_again_when_its_server_has_ended():
    listener = bind_socket("localhost", 0)
    port = listener.getsockname()[1]
    listener.close()
    bind_socket("localhost", port).close()


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Any, int]]:
    vlm = vlbench.load(CHECKPOINT, dtype="float32", device="cpu")
    model = ServedModel("tiny", vlm, GenerationEngine(vlm, max_rows=8), created=1)
    with running_server([model]) as (_, port):
        yield vlm, port


def questions(count: int) -> list[tuple[list[Any], list[Any]]]:
    """Return conversations with zero to two images, as OpenAI's messages and as `chat`'s."""
    asked = []
    for number in range(count):
        pictures = [make_scene("served", 0, number + n).open() for n in range(number % 3)]
        text = f"{number}: what is this? " * (1 + number % 2)
        own = [{"type": "image", "image": picture} for picture in pictures]
        ours = {"role": "user", "content": [*own, {"type": "text", "text": text}]}
        asked.append(([says(text, *pictures)], [ours]))
    return asked


@pytest.mark.parametrize("count", [6, pytest.param(32, marks=pytest.mark.slow)])
def test_clients_at_once_are_answered_as_chat_answers_each(real, count):
    vlm, port = real
    asked = questions(count)

    async def ask_all() -> list[str]:
        async with client_of(port, kind=openai.AsyncOpenAI) as client:
            requests = [
                client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
                for messages, _ in asked
            ]
            answers = await asyncio.gather(*requests)
            return [answer.choices[0].message.content for answer in answers]

    expected = [vlm.chat(messages, max_new_tokens=8) for _, messages in asked]
    assert asyncio.run(ask_all()) == expected
    stream = client_of(port).chat.completions.create(
        model="tiny", messages=asked[2][0], max_tokens=8, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == expected[2]


def test_what_a_model_cannot_read_is_a_mistake_of_the_request(real):
    vlm, port = real
    client = client_of(port)
    longest = vlm.processor.max_positions
    for messages, code in (
        ([says("word " * longest)], "context_length_exceeded"),
        ([says("<image_placeholder> what?")], None),
        ([{"role": "assistant", "content": "I begin"}], None),
        ([says("a"), {"role": "assistant", "content": "last"}], None),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages)
        assert (caught.value.param, caught.value.code) == ("messages", code)
    usage = client.chat.completions.create(
        model="tiny", messages=questions(3)[2][0], max_tokens=3
    ).usage
    assert usage.prompt_tokens_details.visual_tokens == 2 * vlm.processor.tokens_per_image
    assert usage.completion_tokens == 3


class Server:
    """`python -m vlbench serve` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.errors = (folder / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlbench", "serve", *words, "port=0"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if found := re.search(r"API: http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found[1])
            if line.startswith("try: "):
                return
        raise AssertionError(self.told())

    def told(self) -> str:
        """Return what it has written to standard error."""
        self.errors.seek(0)
        return self.errors.read()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def start(*words: str, model: str = MODEL) -> Server:
        servers.append(Server(tmp_path, model, *words))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()
        server.errors.close()


def streams(server: Server, count: int, max_tokens: int) -> list[Iterator[Any]]:
    """Return streams of answers of which each has begun."""
    client = client_of(server.port)
    begun = [
        iter(
            client.chat.completions.create(
                model="checkpoint",
                messages=[says(f"{number}?")],
                max_tokens=max_tokens,
                stream=True,
            )
        )
        for number in range(count)
    ]
    for stream in begun:
        next(stream)
    return begun


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_lets_answers_end(serve, number):
    server = serve("max_rows=4")
    begun = streams(server, 12, max_tokens=40)
    server.process.send_signal(number)
    ends = [list(stream)[-1].choices[0].finish_reason for stream in begun]
    assert all(end in ("stop", "length") for end in ends)
    assert server.process.wait(30) == 0
    assert server.told() == ""


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(serve):
    server = serve("max_rows=1")
    streams(server, 8, max_tokens=100)
    for _ in range(2):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert server.process.wait(30) in (0, 130)
    assert "Traceback" not in server.told()


@pytest.mark.slow
def test_the_command_at_the_end_of_fit_leads_to_the_page(serve, tmp_path, capsys):
    run = tmp_path / "a run"
    shutil.copytree(CHECKPOINT, run)
    (run / "results.json").write_text(json.dumps({"accuracy": 0.5, "questions": 2}))
    assert show_results(RunFolder(run)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " serve " in line)
    *program, model = shlex.split(line, comments=True)
    assert program == ["python", "-m", "vlbench", "serve"]
    port = serve(model=model).port
    status, page = exchange(port, head("GET", "/"))
    assert status == 200 and b"<title>vlbench</title>" in page
    assert [one.id for one in client_of(port).models.list()] == ["a run"]


KILLED_CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    connection.sendall(sys.stdin.buffer.read())
    connection.recv(100)
    print("begun", flush=True)
    while connection.recv(1 << 16):
        pass
"""


@pytest.mark.slow
def test_clients_that_are_killed_leave_their_places(serve):
    server = serve("max_rows=2", "max_waiting=4")
    request = post(chat("say on", stream=True, max_tokens=400).replace(b'"fake"', b'"checkpoint"'))
    for _ in range(200):
        client = subprocess.Popen(
            [sys.executable, "-S", "-c", KILLED_CLIENT, str(server.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdin and client.stdout
        client.stdin.write(request)
        client.stdin.close()
        assert client.stdout.readline() == b"begun\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
    deadline = time.monotonic() + 20
    idle = 'vlbench_requests_running{model="checkpoint"} 0'
    while idle not in (text := client_of(server.port).get("/../metrics", cast_to=str)):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    assert 'vlbench_requests_waiting{model="checkpoint"} 0' in text
    assert list(streams(server, 6, max_tokens=2)[-1])
    assert server.told() == ""
