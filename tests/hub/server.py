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

from .repository import File, Repository

PIECE = 1 << 16  # bytes that are written at once
API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/(resolve|raw)/([^/]+)/(.+)")
CDN = re.compile(r"/cdn/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]+)/(.+)")
REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests"}


@dataclass
class Fault:
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
class Asked:
    """One request, as the log has it."""

    method: str
    path: str
    range: str
    token: bool
    status: int = 0
    sent: int = 0
    """Bytes of the body."""


class Hub:
    """A hub at `endpoint` with `repositories`; `tokens` are those that open gated ones."""

    def __init__(self, repositories: list[Repository]) -> None:
        self.repositories = {(one.kind, one.name): one for one in repositories}
        self.tokens: set[str] = set()
        self.log: list[Asked] = []
        self.faults: list[Fault] = []
        self.page = 1000  # entries of a tree in one answer
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def start(self) -> Hub:
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

    def __getitem__(self, name: str) -> Repository:
        """Return the repository OWNER/NAME."""
        return next(one for (_, known), one in self.repositories.items() if known == name)

    def fail(self, part: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer requests in whose "METHOD PATH" `part` is found with `status`, so many times.

        `headers` are sent with it, `_` in their names as `-`.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(part, times, status, named))

    def cut(self, part: str, after: int, times: int = 1) -> None:
        """Cut the connection after so many bytes of the body."""
        self.faults.append(Fault(part, times, after=after))

    def slow(self, part: str, wait: float, times: int = 1) -> None:
        """Wait so many seconds before each piece of the body."""
        self.faults.append(Fault(part, times, wait=wait))

    def fault(self, request: str) -> Fault | None:
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
def serving(repositories: list[Repository]) -> Iterator[Hub]:
    """Serve repositories while the context lasts."""
    hub = Hub(repositories).start()
    try:
        yield hub
    finally:
        hub.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
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
        self._do(self._route)

    def do_GET(self) -> None:
        """Answer with a body."""
        self._do(self._route)

    def do_POST(self) -> None:
        """Answer the one question that is posted: what is known of some paths."""
        self._do(self._route)

    def _do(self, answer: Callable[[], None]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.posted = parse_qs(body.decode())
        parts = urlsplit(self.path)
        self.at, self.query = unquote(parts.path), parse_qs(parts.query)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.known = bearer in self.hub.tokens
        self.asked = Asked(self.command, self.at, self.headers.get("Range", ""), bool(bearer))
        self.hub.log.append(self.asked)
        self.fault = self.hub.fault(f"{self.command} {self.at}")
        try:
            if self.fault and self.fault.status:
                self._refuse(self.fault.status, "", **self.fault.headers)
            else:
                answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked has left

    def _route(self) -> None:
        api, file, cdn = API.fullmatch(self.at), FILE.fullmatch(self.at), CDN.fullmatch(self.at)
        if api:
            kind, name, what, revision, rest = api.groups()
            self._api(kind, name, what or "revision", revision or "main", rest or "")
        elif cdn:
            self._content(self.hub.repositories[cdn[1], cdn[2]].files[cdn[4]])
        elif file:
            kind = "datasets" if file[1] else "models"
            self._file(kind, file[2], file[3], file[4], file[5])
        else:
            self._refuse(404, "")

    def _repository(self, kind: str, name: str, revision: str) -> Repository | None:
        """Return the repository that is asked for; None when the answer has been given."""
        found = self.hub.repositories.get((kind, name))
        if found is None:  # who is not known is not told whether a repository is private
            self._refuse(404 if self.known else 401, "RepoNotFound")
        elif unquote(revision) not in ("main", "HEAD", found.commit):
            self._refuse(404, "RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            found = None
        return found

    def _api(self, kind: str, name: str, what: str, revision: str, rest: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if what == "revision":
            self._json(repository.info())
        elif what == "tree":
            self._tree(repository, rest)
        else:
            wanted = self.posted.get("paths", [])
            self._json([one for one in repository.entries() if one["path"] in wanted])

    def _tree(self, repository: Repository, folder: str) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = list(repository.entries(folder, recursive))
        if folder and not entries:
            self._refuse(404, "EntryNotFound", X_Repo_Commit=repository.commit)
            return
        first = int(self.query.get("cursor", ["0"])[0])
        last = first + self.hub.page
        more = f"{self.hub.endpoint}{quote(self.at)}?recursive={recursive}&cursor={last}"
        link = {"Link": f'<{more}>; rel="next"'} if last < len(entries) else {}
        self._json(entries[first:last], link)

    def _file(self, kind: str, name: str, how: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if repository.gated and not self.known:
            message = f"Access to {kind.removesuffix('s')} {name} is restricted."
            self._refuse(401, "GatedRepo", X_Error_Message=message)
            return
        file, commit = repository.files.get(path), {"X-Repo-Commit": repository.commit}
        if file is None:
            self._refuse(404, "EntryNotFound", X_Repo_Commit=repository.commit)
        elif how == "raw":
            self._body(file.pointer if file.lfs else file.path.read_bytes())
        elif file.lfs:
            place = f"{self.hub.cdn}/cdn/{kind}/{name}/{file.sha256}/{quote(path)}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            self._body(b"", 302, {**commit, **linked, "Location": place})
        else:
            self._content(file, commit)

    def _content(self, file: File, headers: dict[str, str] | None = None) -> None:
        """Send a file, or the range of it that is asked for."""
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.asked.range)
        first, last, status = 0, file.size - 1, 200
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first > last:
                self._body(b"", 416, {**headers, "Content-Range": f"bytes */{file.size}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{file.size}"
        self._send(status, last + 1 - first, headers)
        if self.command != "HEAD":
            self._stream(file.path, first, last + 1 - first)

    def _stream(self, path: Path, first: int, size: int) -> None:
        with path.open("rb") as stream:
            stream.seek(first)
            while size > 0:
                piece = stream.read(min(PIECE, size))
                size -= len(piece)
                self._write(piece)

    def _write(self, piece: bytes) -> None:
        """Write a piece of the body, and what is wrong with it."""
        fault = self.fault
        if fault and fault.wait:
            time.sleep(fault.wait)
        left = len(piece) if not fault or fault.after < 0 else fault.after - self.asked.sent
        self.wfile.write(piece[:left])
        self.asked.sent += len(piece[:left])
        if left < len(piece):
            self.close_connection = True
            raise BrokenPipeError

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._body(json.dumps(value).encode(), 200, {**kind, **(headers or {})})

    def _refuse(self, status: int, code: str, **headers: str) -> None:
        """Refuse a request as the hub does: a code in a header says what is wrong."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            named = {"X-Error-Code": code, **named}
        message = {"error": named.get("X-Error-Message", REASONS.get(status, "error"))}
        self._body(json.dumps(message).encode(), status, named)

    def _body(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, len(body), headers or {})
        if self.command != "HEAD" and body:
            self._write(body)

    def _send(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
