"""Pictures as text: the `data:` URLs of requests and of votes."""

from __future__ import annotations

import base64
import re

from vlbench.errors import UserError

DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)


def read_data_url(url: str) -> bytes:
    """Return the bytes in a URL `data:image/TYPE;base64,...`, whose text may have line ends.

    Raises a UserError for any other URL, and for what is no base64.
    """
    begin = DATA_URL.match(url)
    if begin is None:
        raise UserError("a data: URL is written as data:image/png;base64,...")
    try:
        return base64.b64decode("".join(url[begin.end() :].split()), validate=True)
    except ValueError:  # binascii.Error is one; characters beyond ASCII raise a plain one
        raise UserError("the data: URL is no base64") from None
