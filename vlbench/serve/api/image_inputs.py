"""Images of requests: `data:` URLs, and URLs of hosts that the server's owner has listed.

A client never names a file of this machine. How many images, and how many pixels in all, is checked
before a pixel is decoded.
"""

from __future__ import annotations

from PIL import Image

from vlbench.data.image_processing import open_image_bytes
from vlbench.errors import UserError
from vlbench.serve.api.api_errors import ApiError
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.remote_images import RemoteImages
from vlbench.serve.data_urls import read_data_url

IMAGE_CODE = "invalid_image_url"


class RequestImages:
    """The images of one request, opened one after the other."""

    def __init__(self, settings: ApiSettings, remote_images: RemoteImages) -> None:
        """Take the limits, and what downloads the URLs that are allowed."""
        self._settings, self._remote_images = settings, remote_images
        self._pixels_left = settings.max_image_pixels
        self._count = 0

    def open(self, url: str, param: str) -> Image.Image:
        """Return the image of a URL in RGB; ApiError 400 names `param` and says what is wrong."""
        self._count += 1
        if self._count > self._settings.max_images:
            message = f"at most {self._settings.max_images} images are allowed in a request"
            raise ApiError(400, message, code="too_many_images", param=param)
        try:
            data = self._read_bytes(url)
            image = open_image_bytes(data, "image", max_pixels=self._pixels_left)
        except UserError as error:
            raise ApiError(400, f"{param}: {error}", code=IMAGE_CODE, param=param) from None
        self._pixels_left -= image.width * image.height
        return image

    def _read_bytes(self, url: str) -> bytes:
        """Return the bytes of the image file in, or at, a URL; a UserError says why not."""
        scheme = url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return self._remote_images.download(url)
        if scheme == "data":
            return read_data_url(url)
        raise UserError("an image is a URL: data:image/png;base64,..., or https: of a listed host")
