"""Which file `vision.weights` means for a vision encoder: here, or of a repository on a hub."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import open_clip

from vlbench import hub_download
from vlbench.encoder_names import is_hub_name
from vlbench.errors import UserError, suggest_name
from vlbench.model.named_encoder import encoder_weight_names
from vlbench.model.vision_config import EMBEDDED_ENCODERS, OPEN_CLIP_FILES, find_open_clip_file


def check_weights_choice(name: str, weights: str, folder: Path | None) -> None:
    """Raise a UserError for weights that do not go with `vision.name`, which `folder` describes."""
    own = ("embedded", "random", *([name] if name not in EMBEDDED_ENCODERS else []))
    if folder is not None and weights not in own:
        raise UserError(
            f"vision.weights is '{weights}'; vision.name={name} has its own weights, so only "
            "'embedded' and 'random' are allowed; for other weights name a folder that has a copy "
            "of its small file and them"
        )


def find_weight_file(name: str, weights: str, folder: Path | None) -> Path | None:
    """Return the file of open_clip or timm that `weights` is; None for a CLIP of transformers.

    `folder` is that of `named_encoder_folder`.
    """
    if folder is not None:
        known = encoder_weight_names(folder)
        if is_hub_name(name):
            return hub_download.fetch_hub_file(name, known, f"vision.weights={weights}")
        files = (folder / file for file in known)
        return next((file for file in files if file.is_file()), None) or _raise_missing_weights(
            folder, known
        )
    path = Path(weights)
    if path.is_dir():
        file_in_folder = find_open_clip_file(path)
        if file_in_folder is None and not (path / "config.json").is_file():
            _raise_missing_weights(path)
        return file_in_folder
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights in tags:
        source = open_clip.get_pretrained_cfg(name, weights)["hf_hub"]
        owner, repository, file = [*source.split("/"), ""][:3]
        names = (file,) if file else OPEN_CLIP_FILES
        return hub_download.fetch_hub_file(
            f"{owner}/{repository}", names, f"vision.weights={weights}"
        )
    if path.is_file():
        return path
    raise UserError(
        f"vision.weights is '{weights}'; for {name} allowed are 'random', a file, a folder with "
        f"{OPEN_CLIP_FILES[0]} or with config.json of a CLIP, or one of "
        f"{', '.join(tags) or '(no tags)'}.{suggest_name(weights, tags)}"
    )


def _raise_missing_weights(folder: Path, names: tuple[str, ...] = OPEN_CLIP_FILES) -> NoReturn:
    raise UserError(
        f"{folder} has no weights of a vision encoder; wanted is {' or '.join(names)}, "
        "or config.json and weights of a CLIP in Hugging Face's layout"
    )
