"""What `fit` will read: what is on this disk, and what it would download first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vlbench.config.model_schema import LanguageModelConfig, ModelConfig, NamedEncoderConfig
from vlbench.encoder_names import is_hub_name
from vlbench.errors import UserError
from vlbench.graft.size_parts import size_parts
from vlbench.model.language_model import check_language_weights, tokenizer_folder
from vlbench.model.paired_encoder import named_as_second
from vlbench.model.vision_encoder import check_vision_weights
from vlbench.model.weights.tensor_files import WEIGHT_SUFFIXES, weight_files

NO_FILES = ("embedded", "random")
"""Values of `weights` that name no file."""


class LocalLanguage(NamedTuple):
    """A language model's configuration and tokenizer on this disk."""

    config: LanguageModelConfig
    """Its `weights` are a folder here, where there is one."""
    problem: str
    """Why there is none; "" where there is."""


def find_local_language(config: LanguageModelConfig) -> LocalLanguage:
    """Return a language model whose small files are here, fetched where it is a hub id.

    A named architecture (yi-6b) is known without them.

    Raises:
        UserError: there is no such folder or hub id, and no name that says what it is.
    """
    if config.weights in NO_FILES or Path(config.weights).is_dir():
        return LocalLanguage(config, "")
    try:
        folder = tokenizer_folder(config.weights)
    except UserError as error:
        if config.weights in {part.get("weights") for _, part in size_parts("language")}:
            return LocalLanguage(config, str(error))
        raise
    return LocalLanguage(config.model_copy(update={"weights": str(folder)}), "")


def file_lines(config: ModelConfig, local: LocalLanguage, parameters: dict[str, int]) -> list[str]:
    """Return where the weights of both parts are; `parameters` are the numbers of each part.

    Files here are compared with the architecture, tensor by tensor.

    Raises:
        UserError: files that are here are not whole, or are those of another model.
    """
    language = _language_line(config.language, local, parameters["language"])
    lines = [f"vision: {_vision_place(config.vision, parameters['vision'])}"]
    if config.vision.second:
        with named_as_second():
            place = _vision_place(config.vision.second, parameters["second_vision"])
        lines.append(f"vision.second: {place}")
    return [*lines, language]


def _vision_place(config: NamedEncoderConfig, parameters: int) -> str:
    if config.weights in NO_FILES:
        return _describe_no_files(config.weights)
    if Path(config.weights).exists():
        check_vision_weights(config.name, config.weights)
        return f"{config.weights} is here, and whole"
    repository, names = _published_files(config)
    if _has_cached_weights(repository, names):
        return f"{config.weights} is in the hub's cache on this disk"
    return f"{config.weights} is not on this disk: {_download_note(repository, 4 * parameters)}"


def _language_line(config: LanguageModelConfig, local: LocalLanguage, parameters: int) -> str:
    if config.weights in NO_FILES:
        return f"language: {_describe_no_files(config.weights)}"
    if Path(config.weights).is_dir():
        check_language_weights(config.weights)
        return f"language: {config.weights} is here, and whole"
    download = _download_note(config.weights, 2 * parameters)
    if local.problem:
        return f"language: nothing of {config.weights} is on this disk: {download}"
    try:
        weight_files(Path(local.config.weights))
    except UserError:
        return (
            f"language: {config.weights}: configuration and tokenizer are on this disk, weights "
            f"are not: {download}"
        )
    return f"language: {config.weights} is in the hub's cache on this disk"


def _describe_no_files(weights: str) -> str:
    return "weights are in this package" if weights == "embedded" else "weights begin random"


def _download_note(repository: str, byte_count: int) -> str:
    return f"fit downloads about {byte_count / 1e9:.1f} GB from {repository}"


def _published_files(config: NamedEncoderConfig) -> tuple[str, tuple[str, ...]]:
    """Return the repository of published weights, and the names of its file, if that is known."""
    import open_clip

    if config.weights not in open_clip.list_pretrained_tags_by_model(config.name):
        if is_hub_name(config.name):
            return config.name, ()
        check_vision_weights(config.name, config.weights)  # says what is allowed
    source = open_clip.get_pretrained_cfg(config.name, config.weights)["hf_hub"]
    owner, repository, file = [*source.split("/"), ""][:3]
    return f"{owner}/{repository}", (file,) if file else ()


def _has_cached_weights(repository: str, names: tuple[str, ...]) -> bool:
    """Tell whether the hub's cache has `names` of a repository; without names: any weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))  # nosec B615: local
    except (LocalEntryNotFoundError, ValueError, OSError):
        return False
    if names:
        return all((folder / name).is_file() for name in names)
    return any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir())
