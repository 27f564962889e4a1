"""Downloads of an image by URL: http and https only, bounded in size and time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.errors import UserError

URL_SCHEMES = ("http://", "https://")
MAX_BYTES = 32_000_000  # of a file; photographs of 100 megapixels are below it
READ_TIMEOUT = 20.0  # seconds without any data
DOWNLOAD_TIMEOUT = 60.0  # seconds for the whole download
CHUNK_BYTES = 1 << 16  # read at once


def download_image(url: str) -> Image.Image:
    """Return the image at `url` in RGB, or raise a UserError with the URL and the reason."""
    name = f"image {url:.200}"
    if not url.lower().startswith(URL_SCHEMES):
        raise UserError(f"{name}: the URL does not begin with {' or '.join(URL_SCHEMES)}")
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
        limits = f"{MAX_BYTES // 10**6} MB or {DOWNLOAD_TIMEOUT:.0f} seconds"
        raise UserError(f"{name}: takes more than {limits}; download it and name the file")
    return open_image_bytes(data, name)


def _http_opener() -> urllib.request.OpenerDirector:
    """Return what opens URLs of http and https alone, where a server redirects to as well.

    That of `urlopen` follows a redirect to ftp, and knows file.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _download_bytes(url: str) -> bytes | None:
    """Return the bytes at `url`, None where they are too many or arrive too slowly."""
    # some servers refuse the user agent of urllib
    request = urllib.request.Request(url, headers={"User-Agent": "vlbench"})
    data, deadline = bytearray(), time.monotonic() + DOWNLOAD_TIMEOUT
    with _http_opener().open(request, timeout=READ_TIMEOUT) as response:
        while chunk := response.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > MAX_BYTES or time.monotonic() > deadline:
                return None
    return bytes(data)
