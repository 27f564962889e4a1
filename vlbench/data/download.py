"""A picture by URL, for people who type one: of http and https alone, bounded in size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from PIL import Image

from vlbench.data.images import open_bytes
from vlbench.mistakes import Mistake

SCHEMES = ("http://", "https://")
LARGEST = 32_000_000  # bytes of a file; photographs of 100 megapixels are below it
PATIENCE = 20.0  # seconds without a byte
LONGEST = 60.0  # seconds for all of it
PIECE = 1 << 16  # bytes that are read at once


def download_image(url: str) -> Image.Image:
    """Return the picture at `url` in RGB, or raise a Mistake that names the URL and the reason."""
    name = f"image {url:.200}"
    if not url.lower().startswith(SCHEMES):
        raise Mistake(f"{name}: is a URL of another kind than {' and '.join(SCHEMES)}")
    try:
        data = _download(url)
    except urllib.error.HTTPError as error:
        raise Mistake(f"{name}: cannot be downloaded ({error.code} {error.reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())[:200]
        raise Mistake(f"{name}: cannot be downloaded ({reason or type(error).__name__})") from error
    if data is None:
        most = f"{LARGEST // 10**6} MB or {LONGEST:.0f} seconds"
        raise Mistake(f"{name}: takes more than {most}; download it and name the file")
    return open_bytes(data, name)


def _download(url: str) -> bytes | None:
    """Return the bytes at `url`, None where they are too many or come too slowly."""
    asked = urllib.request.Request(url, headers={"User-Agent": "vlbench"})  # some refuse Python's
    data, late = bytearray(), time.monotonic() + LONGEST
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        while piece := answer.read1(PIECE):
            data += piece
            if len(data) > LARGEST or time.monotonic() > late:
                return None
    return bytes(data)
