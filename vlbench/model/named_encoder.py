"""From `vision.name` to what it is: of open_clip or timm, by name, in a folder or on a hub."""

from __future__ import annotations

from pathlib import Path

from vlbench.compat.vision_internals import timm_pretrained_names
from vlbench.encoder_names import is_hub_name
from vlbench.errors import UserError, suggest_name
from vlbench.hub_download import fetch_hub_file
from vlbench.model.timm_config import (
    TIMM_CONFIG,
    TIMM_FILES,
    TimmConfig,
    check_plain_vit,
    is_timm_folder,
    read_timm_config,
)
from vlbench.model.vision_config import (
    EMBEDDED_ENCODERS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_FILES,
    VisionConfig,
    read_vision_config,
    resolve_vision_config,
)

EncoderConfig = VisionConfig | TimmConfig


def named_encoder_folder(name: str) -> Path | None:
    """Return the folder that describes `vision.name` itself; None for a name of open_clip.

    Of a repository on a hub it is the local copy, of which the small file alone is fetched: the hub
    is asked, so it is looked for once and handed on.
    """
    if name in EMBEDDED_ENCODERS:
        return EMBEDDED_ENCODERS[name]
    if is_hub_name(name):
        return _fetch_config(name).parent
    folder = Path(name)
    is_described = (folder / OPEN_CLIP_CONFIG).is_file() or is_timm_folder(folder)
    return folder if is_described else None


def resolve_encoder_config(name: str, weights: str, folder: Path | None) -> EncoderConfig:
    """Return what `vision.name` is with `vision.weights`, of which small files alone are read.

    `folder` is that of `named_encoder_folder`.

    Raises:
        UserError: for an unknown name, for what is no plain ViT, and for weights that were trained
            as something else.
    """
    if folder is not None:
        config = read_encoder_config(folder)
        if isinstance(config, VisionConfig):
            _refuse_hybrid(config, folder / OPEN_CLIP_CONFIG)
        return config
    if (Path(name) / TIMM_CONFIG).is_file():
        raise UserError(
            f"vision.name is '{name}', a folder with neither {OPEN_CLIP_CONFIG} nor a "
            f"{TIMM_CONFIG} of timm (which has an architecture); a CLIP in Hugging Face's layout "
            f"is given by vision.weights={name}, and vision.name says which it is"
        )
    return resolve_vision_config(name, weights)


def _refuse_hybrid(config: VisionConfig, file: Path) -> None:
    """Refuse a model of timm in open_clip's `file` that is no plain ViT, before its weights."""
    timm_name = config.vision_cfg.get("timm_model_name")
    if timm_name:
        import vlbench.model.miniature_eva  # noqa: F401  makes its architecture known to timm

        check_plain_vit(str(timm_name), file, "timm_model_name")


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Return what the small file in `folder` describes, open_clip's or timm's."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return read_vision_config(folder)
    return read_timm_config(folder)


def encoder_weight_names(folder: Path) -> tuple[str, ...]:
    """Return the names that weights beside the small file in `folder` have, the preferred first."""
    return OPEN_CLIP_FILES if (folder / OPEN_CLIP_CONFIG).is_file() else TIMM_FILES


def _fetch_config(name: str) -> Path:
    """Return the local copy of the file that describes a repository's encoder."""
    try:
        return fetch_hub_file(name, (OPEN_CLIP_CONFIG, TIMM_CONFIG), f"vision.name={name}")
    except UserError as error:
        if not name.startswith("timm/"):
            raise
        known, wanted = timm_pretrained_names(), name.removeprefix("timm/")
        close = "" if wanted in known else suggest_name(wanted, known)
        raise UserError(*error.lines[:-1], f"{error.lines[-1]}.{close}") from error
