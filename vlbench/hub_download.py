"""Folders of models and data sets: local ones, or downloaded from the Hugging Face hub.

The hub's client reports some failures by their consequence ("cannot find the requested files in the
local cache"), so the cause is looked for along the chain of exceptions.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlbench.errors import UserError, one_line, suggest_name

WEIGHTS_CONTENTS = "model*.safetensors or pytorch_model*.bin"
RELEASE_CONTENTS = (
    f"config.json, {WEIGHTS_CONTENTS}, tokenizer.model and, for Yi-VL, the vision encoder in vit/"
)
LANGUAGE_CONTENTS = f"config.json, {WEIGHTS_CONTENTS}, and tokenizer.model or tokenizer.json"
TOKENIZER_CONTENTS = "config.json, and tokenizer.model or tokenizer.json (no weights)"
SMALL_FILE_PATTERNS = ("*.json", "*.jinja", "*.model", "vit/**.json")
"""Files that describe a model; in patterns of the hub `*` matches slashes too."""
TOKENIZER_PATTERNS = ("*config.json", "*token*.json", "*.jinja", "*.model")
"""Files of a language model without its weights and their index."""
DOWNLOAD_PATTERNS = (*SMALL_FILE_PATTERNS, "model*.safetensors", "*.bin", "vit/**")
LOGIN_HINT = "`hf auth login` or HF_TOKEN gives it a token"
CONNECTION_ERRORS = (
    "NetworkError",
    "TimeoutException",
    "RemoteProtocolError",
    "ConnectionError",
    "Timeout",
)
"""Base classes of network errors in the client's HTTP libraries."""
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}
"""What is wrong with the disk, by error number."""


def fetch_hub_folder(
    source: str,
    key: str,
    expected_files: str,
    expected_kinds: str = "folder",
    patterns: tuple[str, ...] = DOWNLOAD_PATTERNS,
    repo_type: str = "model",
) -> Path:
    """Return the local folder of `source`, downloaded where that is a hub id.

    Args:
        source: A folder, or a hub id OWNER/NAME.
        key: The option that gave it, as errors name it.
        expected_files: What such a folder holds, for errors.
        expected_kinds: What `source` may be, for errors.
        patterns: Files to download; *.bin only where the repository has no safetensors.
        repo_type: "model" or "dataset".

    Raises:
        UserError: when there is no such folder, or the hub cannot give it.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"{key} is '{source}', which is no {expected_kinds} and no hub id (OWNER/NAME)."
            f"{_suggest_folder(Path(source))}"
        )
    from huggingface_hub import constants, snapshot_download

    def download_snapshot(patterns: Iterable[str]) -> Path:
        # the user names a repository, whose newest commit it is; what is loaded has a checksum
        folder = snapshot_download(  # nosec B615
            source, repo_type=repo_type, allow_patterns=list(patterns)
        )
        return Path(folder)

    try:
        # many repositories hold the same weights as safetensors and as *.bin
        folder = download_snapshot(pattern for pattern in patterns if not pattern.endswith(".bin"))
        wants_bin = any(pattern.endswith(".bin") for pattern in patterns)
        if wants_bin and not any(folder.glob("*.safetensors")):
            return download_snapshot(patterns)
        return folder
    except Exception as error:  # the client has a dozen kinds, of network, disk and permission
        raise UserError(
            f"{key} is '{source}': no such {expected_kinds} here, and the hub cannot give it "
            f"({explain_hub_error(error, source)}). "
            f"Wanted are {expected_files}; looked for in {Path(source).absolute()} and in "
            f"{constants.HF_HUB_CACHE}.{_suggest_folder(Path(source))}"
        ) from error


def _suggest_folder(missing: Path) -> str:
    """Return " Did you mean 'x'?" for the folder that is called most like one that is missing."""
    try:
        names = [child.name for child in missing.parent.iterdir() if child.is_dir()]
    except OSError:  # its parent is missing too, or may not be read
        return ""
    return suggest_name(missing.name, names)


def fetch_hub_file(repo_id: str, filenames: tuple[str, ...], key: str) -> Path:
    """Return the local copy of the first of `filenames` that a repository of the hub has.

    Args:
        repo_id: OWNER/NAME.
        filenames: Files that would do, the preferred one first.
        key: The option that asked for it, as errors name it.

    Raises:
        UserError: when the repository has none of them, or it cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason, cached_only = "", False
    for name in filenames:
        try:
            # nosec B615 below: as above, the newest commit, with a checksum
            file = hf_hub_download(repo_id, name, local_files_only=cached_only)  # nosec B615
            return Path(file)
        except EntryNotFoundError as error:
            reason = reason or explain_hub_error(error, repo_id)
            # the hub does not answer: the next name is looked for in the cache alone
            cached_only = cached_only or isinstance(error, LocalEntryNotFoundError)
        except Exception as error:  # of network, disk and permission
            reason = explain_hub_error(error, repo_id)
            break
    raise UserError(
        f"{key}: the hub cannot give it ({reason}). Wanted is {' or '.join(filenames)} of "
        f"{repo_id}; looked for in {constants.HF_HUB_CACHE}"
    )


def explain_hub_error(error: BaseException, repo_id: str) -> str:
    """Return in one line why a repository could not be downloaded, and what helps."""
    for cause in _exception_chain(error):
        reason = _explain_hub_response(cause, repo_id) or _explain_local_error(cause)
        if reason:
            return reason
    return one_line(error, max_lines=1)


def _explain_hub_response(error: BaseException, repo_id: str) -> str:
    """Explain an answer of the hub, "" for another error."""
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
    """Explain an error of the disk or the network, "" for another error."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{DISK_ERRORS[error.errno]}{f': {error.filename}' if error.filename else ''}"
    if any(kind.__name__ in CONNECTION_ERRORS for kind in type(error).__mro__):
        return f"the connection broke or cannot be made ({one_line(error, max_lines=1)}); try again"
    return ""


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the first cause, then what it led to, up to the error itself."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    yield from reversed(chain)


def _explain_http_status(error: BaseException) -> str:
    """Explain an HTTP status."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status == 429:
        seconds = response.headers.get("Retry-After") if response is not None else None
        when = f"in {seconds} seconds" if seconds else "later"
        return f"status 429, too many requests: try again {when}"
    if status in (401, 403):
        return f"status {status}, the token is missing or may not read it: {LOGIN_HINT}"
    if status >= 500:
        return f"status {status}, the hub itself has a fault: try again later"
    return f"status {status}" if status else one_line(error, max_lines=1)
