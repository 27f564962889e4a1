"""The files of the web page: nothing in them is secret, and nothing of another host is loaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from vlbench.serve.api.access_checks import SAFE_METHODS

PAGE_FOLDER = Path(__file__).parent / "page"
INDEX_FILE = "index.html"
FILES_PREFIX = "/page/files/"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # a newer server brings newer files
}


def page_files() -> dict[str, Path]:
    """Return the file that is sent at each address; the page names them relative to its own."""
    files = sorted(path for path in PAGE_FOLDER.iterdir() if path.suffix in MEDIA_TYPES)
    return {
        "/" if path.name == INDEX_FILE else f"{FILES_PREFIX}{path.name}": path for path in files
    }


def file_router() -> APIRouter:
    """Return the routes of the page's files, which are read now."""
    router = APIRouter()
    for address, path in page_files().items():
        send = _file_sender(path.read_bytes(), MEDIA_TYPES[path.suffix])
        router.add_api_route(address, send, methods=[*SAFE_METHODS])
    return router


def _file_sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send_file() -> Response:
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return send_file
