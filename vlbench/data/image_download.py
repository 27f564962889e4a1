"""A picture by URL, for people who type one: of http and https alone, bounded in size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.errors import UserError

URL_SCHEMES = ("http://", "https://")
MAX_BYTES = 32_000_000  # bytes of a file; photographs of 100 megapixels are below it
READ_TIMEOUT = 20.0  # seconds without a byte
DOWNLOAD_TIMEOUT = 60.0  # seconds for all of it
CHUNK_BYTES = 1 << 16  # bytes that are read at once


def download_image(url: str) -> Image.Image:
    """Return the picture at `url` in RGB, or raise a Mistake that names the URL and the reason."""
    name = f"image {url:.200}"
    if not url.lower().startswith(URL_SCHEMES):
        raise UserError(f"{name}: is a URL of another kind than {' and '.join(URL_SCHEMES)}")
    try:
        data = _download_bytes(url)
    except urllib.error.HTTPError as error:
        raise UserError(f"{name}: cannot be downloaded ({error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:200]
        raise UserError(
            f"{name}: cannot be downloaded ({reason or type(error).__name__})"
        ) from error
    if data is None:
        most = f"{MAX_BYTES // 10**6} MB or {DOWNLOAD_TIMEOUT:.0f} seconds"
        raise UserError(f"{name}: takes more than {most}; download it and name the file")
    return open_image_bytes(data, name)


def _download_bytes(url: str) -> bytes | None:
    """Return the bytes at `url`, None where they are too many or come too slowly."""
    asked = urllib.request.Request(url, headers={"User-Agent": "vlbench"})  # some refuse Python's
    data, late = bytearray(), time.monotonic() + DOWNLOAD_TIMEOUT
    with urllib.request.urlopen(asked, timeout=READ_TIMEOUT) as answer:
        while piece := answer.read1(CHUNK_BYTES):
            data += piece
            if len(data) > MAX_BYTES or time.monotonic() > late:
                return None
    return bytes(data)
