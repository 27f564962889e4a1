"""Where a release or a data set lies: a folder, or a hub id that is fetched from a network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlbench.mistakes import Mistake
from vlbench.model.weights.hub_errors import reason

WEIGHTS = "model*.safetensors or pytorch_model*.bin"
RELEASE = f"config.json, {WEIGHTS}, tokenizer.model and, for Yi-VL, the tower's folder in vit/"
LANGUAGE = f"config.json, {WEIGHTS}, and tokenizer.model or tokenizer.json"
SMALL = ("*.json", "*.jinja", "*.model", "vit/**.json")
"""Files that describe a model; hub patterns let `*` match slashes as well."""
PATTERNS = (*SMALL, "model*.safetensors", "*.bin", "vit/**")


def fetch(
    source: str,
    key: str,
    files: str,
    kinds: str = "folder",
    patterns: tuple[str, ...] = PATTERNS,
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
        raise Mistake(f"{key} is '{source}', which is no {kinds} and no hub id (OWNER/NAME)")
    from huggingface_hub import constants, snapshot_download

    def snapshot(patterns: Iterable[str]) -> Path:
        return Path(snapshot_download(source, repo_type=repo_type, allow_patterns=list(patterns)))

    try:
        # many repositories hold the same weights twice, in safetensors and in torch's files
        folder = snapshot(pattern for pattern in patterns if not pattern.endswith(".bin"))
        twice = any(pattern.endswith(".bin") for pattern in patterns)
        return snapshot(patterns) if twice and not any(folder.glob("*.safetensors")) else folder
    except Exception as error:  # the hub's client has a dozen, of network, disk and permission
        raise Mistake(
            f"{key} is '{source}': no such {kinds} here, and the hub cannot give it "
            f"({reason(error, source)}). "
            f"Wanted are {files}; looked for in {Path(source).absolute()} and in "
            f"{constants.HF_HUB_CACHE}"
        ) from error


def fetch_file(repository: str, names: tuple[str, ...], key: str) -> Path:
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
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=kept_alone))
        except EntryNotFoundError as error:
            said = said or reason(error, repository)
            # where the hub does not answer, the next name may be here, but is not asked for
            kept_alone = kept_alone or isinstance(error, LocalEntryNotFoundError)
        except Exception as error:  # of network, disk and permission
            said = reason(error, repository)
            break
    raise Mistake(
        f"{key}: the hub cannot give it ({said}). Wanted is {' or '.join(names)} of "
        f"{repository}; looked for in {constants.HF_HUB_CACHE}"
    )
