"""Images that a request names by URL: of listed hosts alone, and never of this machine's networks.

A name is resolved once, every address that it has is checked, and the connection goes to a checked
address: a name that is resolved differently a moment later changes nothing. Where a server
redirects to is checked in the same way. Proxies of the environment are not used, as they resolve
names by themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from vlbench.errors import UserError, one_line
from vlbench.regular_files import format_bytes

MAX_BYTES = 20_000_000  # of an image file
MAX_REDIRECTS = 3
CONNECT_SECONDS = 5.0
DOWNLOAD_SECONDS = 20.0  # for one address, from the connection to the last byte
LATE_MESSAGE = f"takes more than {DOWNLOAD_SECONDS:.0f} seconds to download"
PORTS = {"http": 80, "https": 443}
REDIRECT_CODES = (301, 302, 303, 307, 308)
CHUNK_BYTES = 1 << 16  # read at once
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_FURTHER_NETWORKS = [
    ipaddress.ip_network(text) for text in ("64:ff9b:1::/48", "192.88.99.0/24", "3fff::/20")
]
"""Not public, which older releases of Python do not know."""

ResolveHost = Callable[[str, int], Sequence[str]]


def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system resolves it; OSError where there are none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public_address(text: str) -> bool:
    """Return whether an address is one of the open internet.

    Private, loopback, link-local, multicast and reserved ranges are not, neither written as IPv6:
    mapped, in 6to4, Teredo or NAT64.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None or address.teredo is not None:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
        if address.is_site_local:
            return False
    if any(address in network for network in _FURTHER_NETWORKS):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class RemoteImages:
    """What downloads image files of listed hosts."""

    def __init__(
        self,
        allowed_hosts: Sequence[str] = (),
        is_allowed_address: Callable[[str], bool] = is_public_address,
        resolve: ResolveHost = resolve_host,
    ) -> None:
        """Take the hosts, HOST or HOST:PORT, and how names are resolved and addresses checked."""
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._is_allowed_address, self._resolve = is_allowed_address, resolve

    def download(self, url: str) -> bytes:
        """Return the bytes at `url`, or raise a UserError with the reason."""
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._check_url(url)
            body, location = self._connect(parts).request_in_time(parts)
            if location is None:
                return body
            url = _redirect_target(url, location)
        raise UserError(f"is redirected more than {MAX_REDIRECTS} times")

    def _check_url(self, url: str) -> SplitResult:
        """Return the parts of a URL of a listed host; a UserError for any other."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise UserError(f"is no URL ({one_line(error)})") from None
        if parts.scheme not in PORTS:
            raise UserError(f"the URL's scheme is '{parts.scheme:.20}'; allowed are http and https")
        if not url.isascii() or not url.isprintable() or " " in url or "@" in parts.netloc:
            raise UserError("the URL has a name, a password or characters that a URL cannot have")
        written = f"[{host}]" if ":" in host else host
        is_usual = port in (None, PORTS[parts.scheme])
        names = {f"{written}:{port or PORTS[parts.scheme]}", *([written] if is_usual else [])}
        if not names & self._allowed_hosts:
            raise UserError(
                "images are not downloaded from this host; send the image as a data: URL (the "
                "server's owner may list hosts with allow_urls=)"
            )
        return parts

    def _connect(self, parts: SplitResult) -> _PinnedConnection:
        """Return a connection to a checked address of a URL's host."""
        host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
        try:
            addresses = self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise UserError(f"cannot be downloaded ({one_line(error)})") from None
        if not addresses or not all(map(self._is_allowed_address, addresses)):
            raise UserError("its host has an address that is not on the open internet")
        if parts.scheme == "https":
            return _PinnedTlsConnection(host, port, addresses[0])
        return _PinnedConnection(host, port, addresses[0])


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to a given address, for a host of a given name."""

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=CONNECT_SECONDS)
        self._address = address
        self._open_socket: socket.socket | None = None  # http.client forgets its own early
        self._is_late = False

    def connect(self) -> None:
        """Connect to the address, without resolving a name."""
        self.sock = socket.create_connection((self._address, self.port), CONNECT_SECONDS)
        self._open_socket = self.sock

    def request_in_time(self, parts: SplitResult) -> tuple[bytes, str | None]:
        """Return the bytes of a file, or where its server redirects to; a UserError if late."""
        deadline = threading.Timer(DOWNLOAD_SECONDS, self._end_late)
        deadline.start()
        try:
            answer = _request_file(self, parts)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = LATE_MESSAGE if self._is_late else f"cannot be downloaded ({one_line(error)})"
            raise UserError(reason) from None
        finally:
            deadline.cancel()
            self.close()
        if self._is_late:  # its bytes end where the connection was ended
            raise UserError(LATE_MESSAGE)
        return answer

    def _end_late(self) -> None:
        """End the connection: what waits for its bytes then meets their end."""
        self._is_late = True
        if self._open_socket is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._open_socket.shutdown(socket.SHUT_RDWR)


class _PinnedTlsConnection(_PinnedConnection):
    """A connection with TLS to a given address; the certificate is the named host's."""

    default_port = PORTS["https"]

    def connect(self) -> None:
        """Connect to the address, and check the certificate by the host's name."""
        super().connect()
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        self._open_socket = self.sock


def _redirect_target(url: str, location: str) -> str:
    """Return the URL that a server redirects to; a UserError for a location that is none."""
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise UserError(f"is redirected to what is no URL ({one_line(error)})") from None


def _request_file(
    connection: http.client.HTTPConnection, parts: SplitResult
) -> tuple[bytes, str | None]:
    """Return the bytes of a file, or where its server redirects to."""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"User-Agent": "vlbench", "Accept": "image/*", "Accept-Encoding": "identity"}
    connection.request("GET", target, headers=headers)
    response = connection.getresponse()
    if response.status in REDIRECT_CODES:
        location = response.getheader("Location")
        if not location:
            raise UserError("is redirected to nowhere")
        return b"", location
    if response.status != 200:
        raise UserError(f"cannot be downloaded (status {response.status})")
    data = bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        data += chunk
        if len(data) > MAX_BYTES:
            raise UserError(f"has more than {format_bytes(MAX_BYTES)}")
    if response.length:  # what is left of the length that its headers told
        raise UserError("cannot be downloaded (its server sent a part of it)")
    return bytes(data), None
