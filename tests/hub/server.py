"""The server: info, tree and files of repositories, faults on order, and a log of what was asked.

The contents of large files come from a second port, as the hub's come from a CDN: the first answers
with a redirect, whose headers say commit, size and hash.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .repository import HubRepository, RepositoryFile

PIECE = 1 << 16  # bytes that are written at once
API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/(resolve|raw)/([^/]+)/(.+)")
CDN = re.compile(r"/cdn/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]+)/(.+)")
REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests"}


@dataclass
class InjectedFault:
    """What goes wrong with the next `times` requests in which `part`, a regex, is found."""

    part: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = -1
    """Bytes after which the connection is cut; -1: it is not."""
    wait: float = 0.0
    """Seconds before every piece that is written."""


@dataclass
class LoggedRequest:
    """One request, as the log has it."""

    method: str
    path: str
    range: str
    token: bool
    status: int = 0
    sent: int = 0
    """Bytes of the body."""


class FakeHub:
    """A hub at `endpoint` with `repositories`; `tokens` are those that open gated ones."""

    def __init__(self, repositories: list[HubRepository]) -> None:
        self.repositories = {(one.kind, one.name): one for one in repositories}
        self.tokens: set[str] = set()
        self.log: list[LoggedRequest] = []
        self.faults: list[InjectedFault] = []
        self.page = 1000  # entries of a tree in one answer
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_HubRequestHandler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        own, cdn = (server.server_port for server in self._servers)
        # the CDN has another host name: clients take a redirect within one for a renamed repository
        self.endpoint, self.cdn = f"http://127.0.0.1:{own}", f"http://localhost:{cdn}"

    def start(self) -> FakeHub:
        """Answer requests until `stop`."""
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Answer no more: connections are refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):  # clients keep them for the next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __getitem__(self, name: str) -> HubRepository:
        """Return the repository OWNER/NAME."""
        return next(one for (_, known), one in self.repositories.items() if known == name)

    def fail(self, part: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer requests in whose "METHOD PATH" `part` is found with `status`, so many times.

        `headers` are sent with it, `_` in their names as `-`.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(InjectedFault(part, times, status, named))

    def cut(self, part: str, after: int, times: int = 1) -> None:
        """Cut the connection after so many bytes of the body."""
        self.faults.append(InjectedFault(part, times, after=after))

    def slow(self, part: str, wait: float, times: int = 1) -> None:
        """Wait so many seconds before each piece of the body."""
        self.faults.append(InjectedFault(part, times, wait=wait))

    def take_fault(self, request: str) -> InjectedFault | None:
        """Return what goes wrong with a request, and count it."""
        with self.lock:
            for one in self.faults:
                if one.times > 0 and re.search(one.part, request):
                    one.times -= 1
                    return one
        return None

    def forget(self) -> None:
        """Empty the log, and let nothing go wrong."""
        self.log.clear()
        self.faults.clear()

    def fetched(self) -> dict[str, set[str]]:
        """Return the files whose content was given, by repository."""
        found: dict[str, set[str]] = {}
        for one in self.log:
            file = FILE.fullmatch(one.path) or CDN.fullmatch(one.path)
            if file and one.method == "GET" and one.status in (200, 206):
                found.setdefault(file[2], set()).add(file[file.lastindex or 0])
        return found


@contextlib.contextmanager
def serve_hub(repositories: list[HubRepository]) -> Iterator[FakeHub]:
    """Serve repositories while the context lasts."""
    hub = FakeHub(repositories).start()
    try:
        yield hub
    finally:
        hub.stop()


class _HubRequestHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Remember the connection."""
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        """Forget the connection."""
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the hub has its log."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer_request(self._route_request)

    def do_GET(self) -> None:
        """Answer with a body."""
        self._answer_request(self._route_request)

    def do_POST(self) -> None:
        """Answer the one question that is posted: what is known of some paths."""
        self._answer_request(self._route_request)

    def _answer_request(self, answer: Callable[[], None]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.posted = parse_qs(body.decode())
        parts = urlsplit(self.path)
        self.request_path, self.query = unquote(parts.path), parse_qs(parts.query)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.is_authorized = bearer in self.hub.tokens
        self.logged_request = LoggedRequest(
            self.command, self.request_path, self.headers.get("Range", ""), bool(bearer)
        )
        self.hub.log.append(self.logged_request)
        self.fault = self.hub.take_fault(f"{self.command} {self.request_path}")
        try:
            if self.fault and self.fault.status:
                self._send_refusal(self.fault.status, "", **self.fault.headers)
            else:
                answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked has left

    def _route_request(self) -> None:
        api, file, cdn = (
            API.fullmatch(self.request_path),
            FILE.fullmatch(self.request_path),
            CDN.fullmatch(self.request_path),
        )
        if api:
            kind, name, what, revision, rest = api.groups()
            self._send_api(kind, name, what or "revision", revision or "main", rest or "")
        elif cdn:
            self._send_content(self.hub.repositories[cdn[1], cdn[2]].files[cdn[4]])
        elif file:
            kind = "datasets" if file[1] else "models"
            self._send_file(kind, file[2], file[3], file[4], file[5])
        else:
            self._send_refusal(404, "")

    def _find_repository(self, kind: str, name: str, revision: str) -> HubRepository | None:
        """Return the repository that is asked for; None when the answer has been given."""
        found = self.hub.repositories.get((kind, name))
        if found is None:  # who is not known is not told whether a repository is private
            self._send_refusal(404 if self.is_authorized else 401, "RepoNotFound")
        elif unquote(revision) not in ("main", "HEAD", found.commit):
            self._send_refusal(
                404, "RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}"
            )
            found = None
        return found

    def _send_api(self, kind: str, name: str, resource: str, revision: str, rest: str) -> None:
        repository = self._find_repository(kind, name, revision)
        if repository is None:
            return
        if resource == "revision":
            self._send_json(repository.repository_info())
        elif resource == "tree":
            self._send_tree(repository, rest)
        else:
            wanted = self.posted.get("paths", [])
            self._send_json([one for one in repository.tree_entries() if one["path"] in wanted])

    def _send_tree(self, repository: HubRepository, folder: str) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = list(repository.tree_entries(folder, recursive))
        if folder and not entries:
            self._send_refusal(404, "EntryNotFound", X_Repo_Commit=repository.commit)
            return
        first = int(self.query.get("cursor", ["0"])[0])
        last = first + self.hub.page
        more = f"{self.hub.endpoint}{quote(self.request_path)}?recursive={recursive}&cursor={last}"
        link = {"Link": f'<{more}>; rel="next"'} if last < len(entries) else {}
        self._send_json(entries[first:last], link)

    def _send_file(self, kind: str, name: str, access: str, revision: str, path: str) -> None:
        repository = self._find_repository(kind, name, revision)
        if repository is None:
            return
        if repository.gated and not self.is_authorized:
            message = f"Access to {kind.removesuffix('s')} {name} is restricted."
            self._send_refusal(401, "GatedRepo", X_Error_Message=message)
            return
        file, commit = repository.files.get(path), {"X-Repo-Commit": repository.commit}
        if file is None:
            self._send_refusal(404, "EntryNotFound", X_Repo_Commit=repository.commit)
        elif access == "raw":
            self._send_body(file.lfs_pointer if file.is_lfs else file.path.read_bytes())
        elif file.is_lfs:
            place = f"{self.hub.cdn}/cdn/{kind}/{name}/{file.sha256}/{quote(path)}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            self._send_body(b"", 302, {**commit, **linked, "Location": place})
        else:
            self._send_content(file, commit)

    def _send_content(self, file: RepositoryFile, headers: dict[str, str] | None = None) -> None:
        """Send a file, or the range of it that is asked for."""
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.logged_request.range)
        first, last, status = 0, file.size - 1, 200
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first > last:
                self._send_body(b"", 416, {**headers, "Content-Range": f"bytes */{file.size}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{file.size}"
        self._send_headers(status, last + 1 - first, headers)
        if self.command != "HEAD":
            self._stream_file(file.path, first, last + 1 - first)

    def _stream_file(self, path: Path, first: int, size: int) -> None:
        with path.open("rb") as stream:
            stream.seek(first)
            while size > 0:
                piece = stream.read(min(PIECE, size))
                size -= len(piece)
                self._write_piece(piece)

    def _write_piece(self, piece: bytes) -> None:
        """Write a piece of the body, and what is wrong with it."""
        fault = self.fault
        if fault and fault.wait:
            time.sleep(fault.wait)
        left = (
            len(piece) if not fault or fault.after < 0 else fault.after - self.logged_request.sent
        )
        self.wfile.write(piece[:left])
        self.logged_request.sent += len(piece[:left])
        if left < len(piece):
            self.close_connection = True
            raise BrokenPipeError

    def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send_body(json.dumps(value).encode(), 200, {**kind, **(headers or {})})

    def _send_refusal(self, status: int, code: str, **headers: str) -> None:
        """Refuse a request as the hub does: a code in a header says what is wrong."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            named = {"X-Error-Code": code, **named}
        message = {"error": named.get("X-Error-Message", REASONS.get(status, "error"))}
        self._send_body(json.dumps(message).encode(), status, named)

    def _send_body(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send_headers(status, len(body), headers or {})
        if self.command != "HEAD" and body:
            self._write_piece(body)

    def _send_headers(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.logged_request.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
