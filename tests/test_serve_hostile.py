"""Requests that mean no good: each has its status; the server lives on without a stack trace."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import running_server
from fake_engine import FakeEngine, fake_model
from PIL import Image

from vlbench.serve.api.api_settings import ApiSettings

CHAT = "/v1/chat/completions"
SETTINGS = ApiSettings(max_body_bytes=1_000_000, max_images=2, max_image_pixels=1_000_000)
HASTY = ApiSettings(header_seconds=0.3, body_idle_seconds=0.3)
ENGINE = FakeEngine()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running_server([fake_model("fake", ENGINE)], SETTINGS) as (_, port):
        yield port


@pytest.fixture(scope="module")
def hasty_port() -> Iterator[int]:
    with running_server([fake_model("fake")], HASTY) as (_, port):
        yield port


@pytest.fixture(autouse=True)
def server_lives(port: int, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let every test end with a server that answers, and has logged nothing."""
    yield
    status, body = exchange(port, post(chat("hello")))
    assert status == 200 and body["choices"][0]["message"]["content"] == "hello"
    assert not caplog.records
    assert ENGINE.wait_until_idle()


def chat(content: Any = "a", **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": "fake", "messages": messages, **fields}).encode()


def shows(*urls: Any) -> bytes:
    return chat([{"type": "image_url", "image_url": {"url": url}} for url in urls])


def head(method: str = "POST", path: str = CHAT, **headers: str) -> bytes:
    """Return a request's first line and headers; `_` of a name is a hyphen."""
    given = {"Host": "127.0.0.1", **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(body: bytes, **headers: str) -> bytes:
    headers = {"Content_Type": "application/json", "Content_Length": str(len(body)), **headers}
    return head(**headers) + body


def chunked(*chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    return head(Content_Type="application/json", Transfer_Encoding="chunked") + framed


def exchange(
    port: int, data: bytes, half_close: bool = False, seconds: float = 10
) -> tuple[int, Any]:
    """Send bytes; return status and JSON (or bytes) of the response, 0 where there is none."""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        received = b""
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(1 << 16):
                received += chunk
                if is_whole(received):
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
    if not received:
        return 0, b""
    first, _, body = received.partition(b"\r\n\r\n")
    is_json = b"application/json" in first
    return int(first.split()[1]), json.loads(body[: body_length(first)]) if is_json else received


def is_whole(received: bytes) -> bool:
    first, end, body = received.partition(b"\r\n\r\n")
    length = body_length(first)
    return bool(end) and length is not None and len(body) >= length


def body_length(headers: bytes) -> int | None:
    """Return the length that a response's headers tell, None where they do not."""
    length = headers.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
    return int(length) if length else None


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SMALL = data_url(png(8, 8))
BOMB = data_url(png(30_000, 30_000))  # 110 kB that would be 900 million pixels
DEEP = b'{"messages":' + b"[" * 100_000
MIXED = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]
TWO_USERS = [{"role": "user", "content": "a"}] * 2
OF_ASSISTANT = [{"role": "assistant", "content": "a"}]
SLASHES = "..%2f..%2f..%2fetc%2fpasswd"
CASES: dict[str, tuple[bytes, int, str]] = {
    "two users": (post(chat(messages=TWO_USERS)), 400, "message 1 is of 'user' where 'assistant'"),
    "assistant last": (
        post(chat(messages=TWO_USERS[:1] + OF_ASSISTANT)),
        400,
        "the last one, is of 'assistant'; 'user' asks",
    ),
    "placeholder": (post(chat("<image_placeholder>")), 400, "an image is a part of its own"),
    "no JSON": (post(b"{model: fake"), 400, "no JSON"),
    "nothing": (post(b""), 400, "no JSON"),
    "a list": (post(b"[1, 2]"), 400, "a list"),
    "deep": (post(DEEP), 400, "recursion limit"),
    "no UTF-8": (post(b'{"model": "\xff\xfe"}'), 400, "no JSON"),
    "half a surrogate": (post(b'{"model": "\\ud800"}'), 400, "no JSON"),
    "infinite": (post(chat(temperature=float("inf"))), 400, "no JSON"),
    "overflow": (post(chat()[:-1] + b', "temperature": 1e999}'), 400, "temperature"),
    "many digits": (post(chat()[:-1] + b', "seed": ' + b"9" * 200_000 + b"}"), 400, "no JSON"),
    "twice": (post(chat()[:-1] + b', "model": "other"}'), 404, "no model"),
    "null": (post(chat(messages=None)), 400, "messages"),
    "numbers": (post(chat(messages=[1])), 400, "messages[0] is a number"),
    "no content": (post(chat(None)), 400, "messages[0].content"),
    "tool": (post(chat(messages=[{"role": "tool", "content": "a"}])), 400, "messages[0].role"),
    "role of a list": (post(chat(messages=[{"role": [], "content": "a"}])), 400, "role"),
    "audio": (post(chat(messages=MIXED)), 400, "allowed are text and image_url"),
    "a long name": (post(chat(**{"x" * 500_000: 1})), 400, "there is no field"),
    "control characters": (post(chat(**{"\x1b[31m\n": 1})), 400, "\\x1b[31m\\n"),
    "huge answer": (post(chat(max_tokens=10**12)), 400, "max_tokens must be at most"),
    "file": (post(shows("file:///etc/passwd")), 400, "an image is a URL"),
    "path": (post(shows("/etc/passwd")), 400, "an image is a URL"),
    "loopback": (post(shows("http://127.0.0.1:22/")), 400, "not downloaded from this host"),
    "mapped": (post(shows("http://[::ffff:127.0.0.1]/")), 400, "not downloaded"),
    "user": (post(shows("http://a@127.0.0.1/")), 400, "cannot have"),
    "no URL": (post(shows("http://[")), 400, "is no URL"),
    "no base64": (post(shows("data:image/png;base64,???")), 400, "no base64"),
    "no ASCII": (post(shows("data:image/png;base64,\u00e9")), 400, "no base64"),
    "no base64 mark": (post(shows("data:image/png,abc")), 400, "data:image/png;base64"),
    "HTML": (post(shows(data_url(b"<script>", "text/html"))), 400, "data:image/png"),
    "no image": (post(shows(data_url(b"<svg/>", "image/svg+xml"))), 400, "not an image"),
    "cut image": (post(shows(data_url(png(900, 900)[:-60]))), 400, "broken or cut off"),
    "bomb": (post(shows(BOMB)), 400, "too large"),
    "bomb in two": (post(shows(*[data_url(png(900, 900))] * 2)), 400, "content[1]"),
    "three images": (post(shows(SMALL, SMALL, SMALL)), 400, "at most 2 images"),
    "URL of a number": (post(shows(5)), 400, "image_url"),
    "large": (post(b" " * 3_000_000), 413, "1.0 MB"),
    "large in chunks": (chunked(*[b" " * 100_000] * 30), 413, "1.0 MB"),
    "said to be large": (head(Content_Type="application/json", Content_Length="9" * 18), 413, ""),
    "length and chunks": (
        head(Content_Type="application/json", Content_Length="4", Transfer_Encoding="chunked")
        + b"0\r\n\r\n"
        + head("GET", "/metrics"),
        400,
        "told twice",
    ),
    "chunks of HTTP/1.0": (chunked(chat()).replace(b"HTTP/1.1", b"HTTP/1.0"), 400, "told twice"),
    "two encodings": (
        post(chat(), Content_Encoding="identity\r\nContent-Encoding: gzip"),
        400,
        "content-encoding is there twice",
    ),
    "two types": (post(chat(), content_type="text/plain"), 400, "content-type is there twice"),
    "two origins": (
        post(chat(), Origin="http://127.0.0.1\r\nOrigin: http://evil.example"),
        400,
        "origin is there twice",
    ),
    "form": (post(chat(), Content_Type="application/x-www-form-urlencoded"), 400, "Content-Type"),
    "text across sites": (post(chat(), Content_Type="text/plain"), 400, "Content-Type"),
    "compressed": (post(b"\x1f\x8b", Content_Encoding="gzip"), 400, "Content-Encoding"),
    "other host": (post(chat(), Host="evil.example"), 403, "evil.example"),
    "other host with our name": (post(chat(), Host="localhost.evil.example:80"), 403, ""),
    "no name": (post(chat(), Host=""), 403, ""),
    "other origin": (post(chat(), Origin="http://evil.example"), 403, "a page of"),
    "null origin": (post(chat(), Origin="null"), 403, "a page of"),
    "other port": (post(chat(), Origin="http://127.0.0.1:1"), 403, "a page of"),
    "preflight": (head("OPTIONS", Origin="http://a.example"), 403, "a page of"),
    "other method": (head("DELETE"), 405, "method"),
    "trace": (head("TRACE"), 405, "method"),
    "traversal": (head("GET", "/../../../etc/passwd"), 404, "nothing at this address"),
    "encoded traversal": (head("GET", f"/v1/models/{SLASHES}"), 404, "there is no model"),
    "null byte": (head("GET", "/v1/models/%00"), 404, "\\x00"),
    "upgrade": (
        head("GET", CHAT, Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Key="a"),
        405,
        "method",
    ),
}
RAW: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\x00\x01\x02\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    "long header": (head("GET", "/health", X="a" * 100_000), 431),
    "many headers": (head("GET", "/health", **{f"X{n}": "a" * 20 for n in range(2000)}), 431),
    "long path": (head("GET", "/" + "a" * 100_000), 431),
    "negative length": (head(Content_Length="-5"), 400),
    "long length": (head(Content_Length="9" * 5000), 400),
    "two lengths": (head(Content_Length="5, 7"), 400),
    "split header": (head("GET", "/health", X="a\r\n b\x00c"), 400),
    "broken chunk": (
        head(Transfer_Encoding="chunked", Content_Type="application/json") + b"zz\r\n",
        400,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_request_has_its_status(port, name):
    request, status, words = CASES[name]
    given, body = exchange(port, request)
    assert given == status, body
    assert words in body["error"]["message"], body
    assert len(body["error"]["message"]) < 700 and set(body["error"]) >= {"type", "param", "code"}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_request_is_ended(port, name):
    request, status = RAW[name]
    given, body = exchange(port, request)
    assert given == status and body["error"]["message"] and "type" in body["error"]


def test_what_is_behind_a_body_of_two_lengths_is_not_answered(port):
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(CASES["length and chunks"][0])
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # until it is closed
    assert received.count(b"HTTP/1.1 ") == 1


def test_no_response_may_be_read_by_other_sites(port):
    for request in (head("GET", "/health"), head("OPTIONS"), post(b"")):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(request)
            headers = connection.recv(1 << 16).lower()
        assert b"access-control" not in headers and b"x-content-type-options: nosniff" in headers
        assert b"content-security-policy: default-src 'none'" in headers
        assert b"server:" not in headers


def test_slow_headers_are_ended(hasty_port):
    for beginning in (b"", b"GET /health HTT"):
        with socket.create_connection(("127.0.0.1", hasty_port), 10) as connection:
            connection.sendall(beginning)
            while connection.recv(1 << 16):
                pass


def test_headers_that_trickle_are_ended(hasty_port):
    with socket.create_connection(("127.0.0.1", hasty_port), 10) as connection:
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(b"X: a\r\n" if _ else b"GET / HTTP/1.1\r\n")
                time.sleep(0.02)


def test_a_slow_body_is_told_so(hasty_port):
    begin = head(Content_Type="application/json", Content_Length="1000") + b'{"model"'
    status, body = exchange(hasty_port, begin)
    assert status == 408 and "has not arrived" in body["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [
        head("GET", "/health")[:-2],
        head(Content_Type="application/json", Content_Length="100") + b'{"model',
        post(chat("forever", stream=True)),
        post(chat("forever")),
    ],
    ids=["headers", "body", "stream", "answer"],
)
def test_a_client_that_closes_its_half_is_left(port, data):
    exchange(port, data, half_close=True)
    assert ENGINE.wait_until_idle()


def test_connections_beyond_the_limit_are_ended():
    settings = ApiSettings(max_connections=20)
    with running_server([fake_model()], settings) as (_, port):
        held = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(20)]
        assert exchange(port, head("GET", "/health"))[0] == 0
        for connection in held:
            connection.close()
        while exchange(port, head("GET", "/health"))[0] != 200:
            time.sleep(0.01)  # until the server has noticed


def test_a_client_that_does_not_read_is_ended():
    engine = FakeEngine(delay=0.001)
    with running_server([fake_model("fake", engine)], ApiSettings(stall_seconds=0.1)) as (_, port):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            long_word = "forever " + "a" * 100_000
            connection.sendall(post(chat(long_word, stream=True, max_tokens=5000)))
            while not engine.ends:
                time.sleep(0.01)
        assert engine.ends[-1].finish_reason == "cancelled"


def test_a_missing_or_wrong_key_is_refused_before_anything_is_read():
    with running_server([fake_model()], ApiSettings(api_key="right")) as (_, port):
        for header in (None, "Bearer wrong", "Basic right", "right", "Bearer", ""):
            given = {} if header is None else {"Authorization": header}
            status, body = exchange(port, post(b"{", **given))
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
            assert exchange(port, head("GET", "/nothing", **given))[0] == 401
        twice = head("GET", "/v1/models", Authorization="Bearer right").replace(
            b"Authorization", b"Authorization: Bearer no\r\nAuthorization"
        )
        assert exchange(port, twice)[0] == 401


@pytest.mark.slow
def test_a_hundred_megabytes_are_refused():
    with running_server([fake_model()]) as (_, port):
        assert exchange(port, post(b" " * 100_000_000))[0] == 413
        assert exchange(port, chunked(*[b" " * 10_000_000] * 10))[0] == 413
