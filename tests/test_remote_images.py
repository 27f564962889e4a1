"""Images by URL: of listed hosts alone, at checked addresses, wherever they redirect to."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import running_server
from fake_engine import FakeEngine, fake_model
from PIL import Image

from vlbench.errors import UserError
from vlbench.serve.api import remote_images
from vlbench.serve.api.remote_images import RemoteImages, is_public_address

PUBLIC = ("93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101")
NOT_PUBLIC = (
    "127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fec0::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:a00:1",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "64:ff9b:1::a00:1",
    "192.88.99.1",
    "3fff::1",
    "localhost",
    "",
)


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_of_the_open_internet(address):
    assert is_public_address(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_none(address):
    assert not is_public_address(address)


class Images(http.server.BaseHTTPRequestHandler):
    """A loopback server, which stands for the open internet."""

    asked: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        self.asked.append((str(self.headers["Host"]), self.path))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        self.send_response(200 if kind != "missing" else 404)
        if kind == "part":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind == "picture":
                Image.new("RGB", (3, 5), "red").save(self.wfile, "PNG")
            for _ in range(400 if kind == "slow" else 1):
                self.wfile.write(b"image " * (10 if kind == "large" else 1))
                time.sleep(0.01 if kind == "slow" else 0)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class Names:
    """A resolver of names that is asked, and checks no address but those it is told to refuse."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses, self.asked = addresses, []

    def resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.addresses.get(host.partition(".")[0], ["127.0.0.1"])


def download(url: str, port: int, names: Names | None = None) -> bytes:
    """Download from `a.example` or `b.example`, which are the loopback server at `port`."""
    names = names or Names()
    allowed = [f"a.example:{port}", f"b.example:{port}"]
    images = RemoteImages(allowed, lambda address: address == "127.0.0.1", names.resolve)
    return images.download(url.replace("PORT", str(port)))


def test_an_image_of_a_listed_host_is_downloaded_by_its_checked_address(port):
    names = Names()
    assert download("http://a.example:PORT/x.png?q=1", port, names) == b"image "
    assert names.asked == ["a.example"]  # once: what is connected to is what was checked
    assert Images.asked[-1] == (f"a.example:{port}", "/x.png?q=1")


def test_a_redirect_is_checked_like_the_first_address(port):
    names = Names()
    assert download("http://a.example:PORT/to/http://B.example:PORT/y", port, names) == b"image "
    assert names.asked == ["a.example", "b.example"]
    refused = {
        "http://c.example:PORT/": "not downloaded from this host",
        "http://127.0.0.1:PORT/": "not downloaded from this host",
        "http://b.example:1/": "not downloaded from this host",
        "file:///etc/passwd": "allowed are http and https",
        "ftp://b.example/": "allowed are http and https",
        "//c.example/": "not downloaded from this host",
        "http://x@b.example:PORT/": "cannot have",
        "http://[": "redirected to what is no URL",
        "": "redirected to nowhere",
    }
    for target, message in refused.items():
        with pytest.raises(UserError, match=message):
            download(f"http://a.example:PORT/to/{target}", port)
    inner = Names(b=["10.0.0.1"])
    with pytest.raises(UserError, match="not on the open internet"):
        download("http://a.example:PORT/to/http://b.example:PORT/", port, inner)
    with pytest.raises(UserError, match="more than 3 times"):
        download("http://a.example:PORT/" + "to/" * 1 + "/to/" * 8, port)


@pytest.mark.parametrize("addresses", [["127.0.0.1", "10.0.0.1"], ["::1"], []])
def test_one_address_that_is_not_allowed_refuses_the_name(port, addresses):
    before = len(Images.asked)
    with pytest.raises(UserError, match="not on the open internet"):
        download("http://a.example:PORT/", port, Names(a=addresses))
    assert len(Images.asked) == before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:PORT/", "not downloaded from this host"),
        ("http://2130706433:PORT/", "not downloaded from this host"),
        ("http://a.example.:PORT/", "not downloaded from this host"),
        ("http://a.example/", "not downloaded from this host"),
        ("http://a.example:PORT@c.example/", "cannot have"),
        ("http://a.example:99999/", "is no URL"),
        ("http://a.example:PORT/a b", "cannot have"),
        ("http://a.example:PORT/\r\nX: y", "cannot have"),
        ("http://\uff41.example:PORT/", "cannot have"),
        ("gopher://a.example:PORT/", "allowed are http and https"),
        ("http://a.example:PORT/missing", "status 404"),
        ("http://a.example:PORT/part", "sent a part of it"),
        ("https://a.example:PORT/", "cannot be downloaded"),
    ],
)
def test_urls_that_are_refused(port, url, message):
    with pytest.raises(UserError, match=message):
        download(url, port)


def test_a_download_is_bounded_in_size_and_time(port, monkeypatch):
    monkeypatch.setattr(remote_images, "MAX_BYTES", 50)
    with pytest.raises(UserError, match="more than 50 bytes"):
        download("http://a.example:PORT/large", port)
    monkeypatch.setattr(remote_images, "MAX_BYTES", 10**6)
    monkeypatch.setattr(remote_images, "DOWNLOAD_SECONDS", 0.2)
    with pytest.raises(UserError, match="seconds to download"):
        download("http://a.example:PORT/slow", port)


def test_without_a_list_no_name_is_resolved():
    names = Names()
    with pytest.raises(UserError, match="send the image as a data: URL"):
        RemoteImages((), is_public_address, names.resolve).download("http://a.example/")
    assert names.asked == []


def test_an_image_by_url_reaches_the_model(port):
    engine = FakeEngine()
    host = f"a.example:{port}"
    images = RemoteImages([host], lambda address: address == "127.0.0.1", Names().resolve)
    with running_server([fake_model("fake", engine)], None, images) as (_, server_port):
        base_url = f"http://127.0.0.1:{server_port}/v1"
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)

        def ask(url: str) -> Any:
            content: Any = [{"type": "image_url", "image_url": {"url": url}}]
            messages: Any = [{"role": "user", "content": content}]
            return client.chat.completions.create(model="fake", messages=messages)

        ask(f"http://{host}/picture")
        image = engine.requests[-1].messages[0]["content"][0]["image"]
        assert (image.size, image.getpixel((0, 0))) == ((3, 5), (255, 0, 0))
        with pytest.raises(openai.BadRequestError, match="not an image") as caught:
            ask(f"http://{host}/text")
        assert caught.value.param == "messages[0].content[0].image_url"
        assert caught.value.code == "invalid_image_url"
