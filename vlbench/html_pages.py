"""What HTML pages share: their Jinja templates, and images embedded in them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def jinja_environment(folder: Path) -> Environment:
    """Return the Jinja environment of a folder; a name that is not passed is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def image_data_uri(image: Image.Image, image_format: str, **save_options: Any) -> str:
    """Return an image as a data URI, as PNG or JPEG; `save_options` are those of PIL's `save`."""
    file = io.BytesIO()
    image.save(file, image_format, **save_options)
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{image_format.lower()};base64,{content}"
