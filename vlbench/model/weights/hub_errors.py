"""What the hub's client raises, said so that a person knows what to do.

The client reports some failures by their consequence ("cannot find the requested files in the local
cache"), so the cause is looked for along the chain of exceptions.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vlbench.errors import one_line

LOGIN_HINT = "`hf auth login` or HF_TOKEN gives it a token"
CONNECTION_ERRORS = (
    "NetworkError",
    "TimeoutException",
    "RemoteProtocolError",
    "ConnectionError",
    "Timeout",
)
"""Base classes of connections that broke or never began, in the client's HTTP libraries."""
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}
"""Errors of the disk that a download ends with."""


def explain_hub_error(error: BaseException, repo_id: str) -> str:
    """Return in one line why `repository` could not be fetched, and what helps."""
    for one in _exception_chain(error):
        said = _explain_hub_response(one, repo_id) or _explain_local_error(one)
        if said:
            return said
    return one_line(error, max_lines=1)


def _explain_hub_response(error: BaseException, repo_id: str) -> str:
    """Say what the hub has answered, "" if the error is no answer of it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo_id}"
        return f"access must be asked for: accept its conditions at {page}; then {LOGIN_HINT}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check its name; else {LOGIN_HINT}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 allows no downloads, and not all of it was downloaded before"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the repository has no such file"
    return _explain_http_status(error) if isinstance(error, errors.HfHubHTTPError) else ""


def _explain_local_error(error: BaseException) -> str:
    """Say what is wrong with the disk or the network, "" if the error is of neither."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{DISK_ERRORS[error.errno]}{f': {error.filename}' if error.filename else ''}"
    if any(kind.__name__ in CONNECTION_ERRORS for kind in type(error).__mro__):
        return f"the connection broke or cannot be made ({one_line(error, max_lines=1)}); try again"
    return ""


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Give the first cause, then what it led to, up to the error itself."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    yield from reversed(chain)


def _explain_http_status(error: BaseException) -> str:
    """Say what a status of HTTP means for who asked."""
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", 0)
    if code == 429:
        wait = response.headers.get("Retry-After") if response is not None else None
        when = f"in {wait} seconds" if wait else "later"
        return f"status 429, too many requests: try again {when}"
    if code in (401, 403):
        return f"status {code}, the token is missing or may not read it: {LOGIN_HINT}"
    if code >= 500:
        return f"status {code}, the hub itself has a fault: try again later"
    return f"status {code}" if code else one_line(error, max_lines=1)
