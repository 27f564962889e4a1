"""Requests of people and programs that mean well: unusual pictures, messages and uses of HTTP."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from api_server import running_server
from fake_engine import FakeEngine, fake_model
from PIL import Image
from test_serve_hostile import CHAT, chat, data_url, exchange, head, post

ENGINE = FakeEngine()
RED, BLUE = (200, 30, 30), (20, 30, 200)
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running_server([fake_model("fake", ENGINE)]) as (_, port):
        yield port


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not caplog.records


def picture(mode: str = "RGB", colour: Any = RED, size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    return saved(picture(mode), "JPEG", quality=100, **options)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


def about(*parts: Any) -> bytes:
    return post(chat([*parts, {"type": "text", "text": "what is it"}]))


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [picture(colour=BLUE)]}
PICTURES: dict[str, tuple[bytes, tuple[int, int], tuple[int, int, int]]] = {
    "one pixel": (saved(picture(size=(1, 1))), (1, 1), RED),
    "a line": (saved(picture(size=(1, 60_000))), (1, 60_000), RED),
    "animated GIF": (saved(picture(), "GIF", **FRAMES), (32, 24), RED),
    "animated PNG": (saved(picture(), **FRAMES), (32, 24), RED),
    "animated WebP": (saved(picture(), "WEBP", lossless=True, **FRAMES), (32, 24), RED),
    "CMYK JPEG": (jpeg("CMYK"), (32, 24), RED),
    "16 bits": (saved(Image.new("I;16", (32, 24), 0x8080)), (32, 24), (128, 128, 128)),
    "1 bit": (saved(Image.new("1", (32, 24), 1)), (32, 24), (255, 255, 255)),
    "alpha": (saved(picture("RGBA")), (32, 24), RED),
    "palette": (saved(picture("RGB").quantize(4)), (32, 24), RED),
    "gray with alpha": (saved(Image.new("LA", (32, 24), (9, 9))), (32, 24), (9, 9, 9)),
    # turned by the page and by data.exif, as in a training; not by the server
    "JPEG with EXIF": (jpeg(exif=turned()), (32, 24), RED),
    "JPEG with broken EXIF": (jpeg(exif=b"Exif\0\0MM\0*\xff"), (32, 24), RED),
}


@pytest.mark.parametrize("name", PICTURES)
def test_an_unusual_picture_reaches_the_model_as_it_is(port, name):
    data, size, colour = PICTURES[name]
    kind = "image/jpeg" if "JPEG" in name else "image/png"  # what stands there is not believed
    status, body = exchange(port, about(image_part(data_url(data, kind))))
    assert status == 200, body
    image = ENGINE.requests[-1].messages[0]["content"][0]["image"]
    assert image.size == size and image.mode == "RGB"
    pixel = image.getpixel((0, 0))
    assert all(abs(given - wanted) <= 3 for given, wanted in zip(pixel, colour, strict=True)), pixel


SMALL = data_url(saved(picture()))
BASE64 = SMALL.partition(",")[2]
USER = {"role": "user", "content": "a"}
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "floating point": (
        about(image_part(data_url(saved(Image.new("F", (9, 9), 0.5), "TIFF"), "image/tiff"))),
        "no agreed brightness",
        "messages[0].content[0].image_url",
    ),
    "PDF": (
        about(image_part(data_url(saved(picture(), "PDF"), "image/pdf"))),
        "not an image; readable are JPEG",
        "messages[0].content[0].image_url",
    ),
    "no type in the URL": (
        about(image_part(f"data:;base64,{BASE64}")),
        "is written as data:image/png;base64",
        "messages[0].content[0].image_url",
    ),
    "nothing in the URL": (
        about(image_part("data:image/png;base64,")),
        "is empty (0 bytes)",
        "messages[0].content[0].image_url",
    ),
    "base64 alone": (
        about(image_part(BASE64)),
        "an image is a URL",
        "messages[0].content[0].image_url",
    ),
    "base64 of URLs": (
        about(image_part("data:image/png;base64,__--")),
        "no base64",
        "messages[0].content[0].image_url",
    ),
    "a URL as text": (
        about({"type": "image_url", "image_url": SMALL}),
        "wanted is an object with a url",
        "messages[0].content[0].image_url",
    ),
    "part of another API": (
        about({"type": "input_image", "image_url": SMALL}),
        "allowed are text and image_url",
        "messages[0].content[0].type",
    ),
    "a text as part": (
        post(chat(["what is it"])),
        'is a text ("what is it"); wanted is an object',
        "messages[0].content[0]",
    ),
    "no parts": (post(chat([])), "a list of 1 to", "messages[0].content"),
    "role in capitals": (
        post(chat(messages=[{"role": "User", "content": "a"}])),
        "allowed are system, developer, user, assistant",
        "messages[0].role",
    ),
    "name": (post(chat(messages=[USER | {"name": "bob"}])), "not read it", "messages[0].name"),
    "two systems": (
        post(chat(messages=[{"role": "system", "content": "a"}] * 2 + [USER])),
        "message 1 is of 'system' where 'user' is expected",
        "messages",
    ),
    "whole number with a point": (post(chat(max_tokens=5.0)), "write 5", "max_tokens"),
    "number as text": (post(chat(max_tokens="5")), "a whole number", "max_tokens"),
    "five stops": (post(chat(stop=list("abcde"))), "up to 4", "stop"),
    "JSON schema": (
        post(chat(response_format={"type": "json_schema", "json_schema": {"name": "a"}})),
        'only {"type": "text"} is allowed',
        "response_format",
    ),
    "byte order mark": (post(b"\xef\xbb\xbf" + chat()), "no JSON", ""),
    "UTF-16": (post(chat().decode().encode("utf-16")), "no JSON", ""),
    "comment": (post(chat() + b"// hi"), "no JSON", ""),
    "curl without a header": (
        post(chat(), Content_Type="application/x-www-form-urlencoded"),
        "wanted is application/json",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_slip_is_named(port, name):
    request, words, param = REFUSED[name]
    status, body = exchange(port, request)
    assert status == 400 and words in body["error"]["message"], body
    assert (body["error"]["param"] or "") == param


ANSWERED: dict[str, bytes] = {
    "no text": post(chat("")),
    "an empty answer before": post(
        chat(messages=[USER, {"role": "assistant", "content": ""}, USER])
    ),
    "empty stops": post(chat(stop=[])),
    "whole temperature": post(chat(temperature=1)),
    "usage without a stream": post(chat(stream_options={"include_usage": True})),
    "query": post(chat()).replace(CHAT.encode(), f"{CHAT}?api-version=1".encode()),
    "other spelling of the type": post(chat(), Content_Type="Application/JSON; charset=utf-8"),
    "expectation": post(chat(), Expect="100-continue"),
    "HTTP/1.0": post(chat(), Connection="close").replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "upgrade to HTTP/2": post(chat(), Connection="Upgrade, HTTP2-Settings", Upgrade="h2c"),
    "two equal lengths": post(chat(), content_length=str(len(chat()))),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_unusual_and_right_is_answered(port, name):
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(ANSWERED[name])
        received = b""
        while b'"finish_reason"' not in received:
            chunk = connection.recv(1 << 16)
            assert chunk, received
            received += chunk
    assert b" 200 OK" in received


def test_a_stream_for_http_1_0_has_no_chunks(port):
    request = post(chat("one two", stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    headers, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in headers.lower()
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")


def test_requests_that_are_sent_at_once_are_answered_in_order(port):
    asked = b"".join(post(chat(f"number {number}")) for number in range(5))
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(asked + head("GET", "/health", Connection="close"))
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 6
    places = [received.index(f'"number {number}"'.encode()) for number in range(5)]
    assert places == sorted(places) and received.endswith(b"}")


def test_a_body_in_chunks_of_one_byte_is_read(port):
    framed = b"".join(b"1;ext=a\r\n%c\r\n" % byte for byte in chat("bytes"))
    request = head(Content_Type="application/json", Transfer_Encoding="chunked") + framed
    status, body = exchange(port, request + b"0\r\nX-Trailer: 1\r\n\r\n")
    assert status == 200 and body["choices"][0]["message"]["content"] == "bytes"


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/fake", "/metrics"])
def test_head_has_the_headers_of_get_alone(port, path):
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(head("HEAD", path, Connection="close"))
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    headers, _, body = received.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200") and b"content-length: " in headers and not body


def test_another_method_is_told_which_are_allowed(port):
    for method in ("GET", "HEAD", "OPTIONS", "post"):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(head(method, CHAT, Connection="close"))
            received = b"".join(iter(lambda: connection.recv(1 << 16), b"")).lower()
        assert received.startswith(b"http/1.1 405") and b"\r\nallow: post\r\n" in received


@pytest.mark.parametrize("name", ["模型 1", 'it\'s "a"\\b', "a/b,c", "connector.name=x/seed0"])
def test_any_name_of_a_model_can_be_asked(name):
    with running_server([fake_model(name)]) as (_, port):
        body = json.dumps({"model": name, "messages": [USER]}).encode()
        assert exchange(port, post(body))[1]["model"] == name
        path = "/v1/models/" + "".join(f"%{byte:02x}" for byte in name.encode())
        assert exchange(port, head("GET", path))[1]["id"] == name
        assert exchange(port, head("GET", "/metrics"))[0] == 200
