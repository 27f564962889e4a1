"""Where a release or a data set lies: a folder, or a hub id that is fetched from a network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlbench.errors import UserError
from vlbench.model.weights.hub_errors import explain_hub_error

WEIGHTS_CONTENTS = "model*.safetensors or pytorch_model*.bin"
RELEASE_CONTENTS = (
    f"config.json, {WEIGHTS_CONTENTS}, tokenizer.model and, for Yi-VL, the tower's folder in vit/"
)
LANGUAGE_CONTENTS = f"config.json, {WEIGHTS_CONTENTS}, and tokenizer.model or tokenizer.json"
SMALL_FILE_PATTERNS = ("*.json", "*.jinja", "*.model", "vit/**.json")
"""Files that describe a model; hub patterns let `*` match slashes as well."""
DOWNLOAD_PATTERNS = (*SMALL_FILE_PATTERNS, "model*.safetensors", "*.bin", "vit/**")


def fetch_hub_folder(
    source: str,
    key: str,
    expected_files: str,
    expected_kinds: str = "folder",
    patterns: tuple[str, ...] = DOWNLOAD_PATTERNS,
    repo_type: str = "model",
) -> Path:
    """Return the local folder of `source`, a folder or a hub id.

    In mistakes `key` names what was given, `kinds` what it could have been, and `files` what such
    a folder holds. `patterns` are the files that are fetched, those that end in .bin only where
    there are no safetensors; `repo_type` is model or dataset.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"{key} is '{source}', which is no {expected_kinds} and no hub id (OWNER/NAME)"
        )
    from huggingface_hub import constants, snapshot_download

    def download_snapshot(patterns: Iterable[str]) -> Path:
        return Path(snapshot_download(source, repo_type=repo_type, allow_patterns=list(patterns)))

    try:
        # many repositories hold the same weights twice, in safetensors and in torch's files
        folder = download_snapshot(pattern for pattern in patterns if not pattern.endswith(".bin"))
        twice = any(pattern.endswith(".bin") for pattern in patterns)
        return (
            download_snapshot(patterns)
            if twice and not any(folder.glob("*.safetensors"))
            else folder
        )
    except Exception as error:  # the hub's client has a dozen, of network, disk and permission
        raise UserError(
            f"{key} is '{source}': no such {expected_kinds} here, and the hub cannot give it "
            f"({explain_hub_error(error, source)}). "
            f"Wanted are {expected_files}; looked for in {Path(source).absolute()} and in "
            f"{constants.HF_HUB_CACHE}"
        ) from error


def fetch_hub_file(repo_id: str, filenames: tuple[str, ...], key: str) -> Path:
    """Return the local copy of the first of `names` that a repository of the hub has.

    Args:
        repository: Its id, OWNER/NAME.
        names: Files that would do, the preferred one first.
        key: What was asked for, as mistakes name it.

    Raises:
        Mistake: when there is none of them, or it cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    said, kept_alone = "", False
    for name in filenames:
        try:
            return Path(hf_hub_download(repo_id, name, local_files_only=kept_alone))
        except EntryNotFoundError as error:
            said = said or explain_hub_error(error, repo_id)
            # where the hub does not answer, the next name may be here, but is not asked for
            kept_alone = kept_alone or isinstance(error, LocalEntryNotFoundError)
        except Exception as error:  # of network, disk and permission
            said = explain_hub_error(error, repo_id)
            break
    raise UserError(
        f"{key}: the hub cannot give it ({said}). Wanted is {' or '.join(filenames)} of "
        f"{repo_id}; looked for in {constants.HF_HUB_CACHE}"
    )
