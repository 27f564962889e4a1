"""What a server allows: hosts, key, sizes and times. Imports neither FastAPI nor torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ApiSettings:
    """What a server allows; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    """The address that it listens on."""
    api_key: str | None = None
    """What clients send as `Authorization: Bearer KEY`; None where no key is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which browsers may reach the server beside loopback's, as behind a proxy."""
    image_hosts: tuple[str, ...] = ()
    """HOST or HOST:PORT whose image URLs are downloaded; none by default."""
    max_images: int = 8
    """Of a request."""
    max_image_pixels: int = 64_000_000
    """Of all images of a request together, before they are resized."""
    max_body_bytes: int = 48_000_000
    """Of a request: images of 36 MB as base64."""
    max_held_bytes: int = 256_000_000
    """Of all bodies that are being read, or wait for their images to be decoded."""
    max_preparing: int = 4
    """Requests whose images are decoded at once."""
    max_arriving: int = 256
    """Requests that are being read, or wait for their images to be decoded."""
    max_connections: int = 512
    """One beyond is ended at once."""
    max_header_bytes: int = 16_384
    """Of the address and the headers of a request."""
    header_seconds: float = 10.0
    """From a connection, or a request's first byte, to the end of its headers."""
    body_idle_seconds: float = 10.0
    """Without a byte of a body."""
    body_seconds: float = 120.0
    """For a whole body."""
    stall_seconds: float = 60.0
    """That a client may take to read what was sent, once buffers are full."""
    drain_seconds: float = 600.0
    """After a stop signal, for answers that were accepted."""

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine reach the server."""
        return is_loopback_host(self.host)

    @property
    def url_host(self) -> str:
        """The host of a URL by which this machine reaches the server."""
        host = self.host.strip("[]")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host
        if address.is_unspecified:  # listens on every address, loopback's too
            return LOOPBACK_NAMES[1]
        return f"[{host}]" if address.version == 6 else host


def is_loopback_host(host: str) -> bool:
    """Return whether a host to listen on is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
