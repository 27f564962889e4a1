"""The samples that a stage trains on: the sources that a recipe names, mixed."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from vlbench.config.schema import DataConfig, StageConfig
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.remote_shards import is_url
from vlbench.data.sample import SampleSource
from vlbench.data.scene_dataset import SceneCaptions, SceneConversations
from vlbench.data.shards import SHARD_LIST_FILE, WebDatasetShards, is_tar
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import UserError

SCENES_SOURCE = "scenes"
HELD_OUT_SEED_OFFSET = 1 << 20  # added to the seed of held-out rendered scenes

SourceCache = MutableMapping[tuple[str, str | None, bool], SampleSource]
"""Open sources, which stages share, by path, image folder and whether images may be outside."""


def stage_data(data: DataConfig, stage: StageConfig) -> DataConfig:
    """Return the data of a stage: its own, or that of the recipe."""
    return stage.data or data


def open_stage_sources(
    data: DataConfig,
    stage: StageConfig,
    stage_name: str,
    seed: int,
    source_cache: SourceCache | None = None,
) -> list[tuple[SampleSource, float]]:
    """Return the (source, weight) pairs that stage `stage_name` trains on.

    A stage without data is a UserError. Opened files are kept in `source_cache`.
    """
    data = stage_data(data, stage)
    if data.mix:
        return [
            (_open_source(part.train, part.images, data, stage, seed, source_cache), part.weight)
            for part in data.mix
        ]
    if data.train is None:
        raise UserError(
            f"stage {stage_name} has no data: give data.train=FILE.json (LLaVA's format) and "
            f"data.images=FOLDER, or data.train={SCENES_SOURCE}"
        )
    return [(_open_source(data.train, data.images, data, stage, seed, source_cache), 1.0)]


def _open_source(
    path: str,
    image_folder: str | None,
    data: DataConfig,
    stage: StageConfig,
    seed: int,
    source_cache: SourceCache | None,
) -> SampleSource:
    """Open one source.

    Args:
        path: The file, folder, pattern or URL of `data.train`, or SCENES_SOURCE.
        image_folder: Where the image names of a JSON file are looked up.
        data: Number of samples and questions of rendered scenes; whether images may be outside.
        stage: A caption stage renders scenes with captions.
        seed: Of rendered scenes.
        source_cache: Files that are open already; None opens the file anew.
    """
    if path == SCENES_SOURCE:
        if stage.sample_format == "caption":
            return SceneCaptions(seed, data.samples)
        return SceneConversations(seed, data.samples, data.questions)
    source_cache = {} if source_cache is None else source_cache
    key = (path, image_folder, data.allow_outside)
    if key not in source_cache:
        source_cache[key] = WebDatasetShards(path) if _is_shards(path) else ConversationFiles(*key)
    return source_cache[key]


def _is_shards(path: str) -> bool:
    """Tell whether a path is that of tar files, or of a folder that should have a list of them."""
    folder = Path(path)
    if is_url(path) or is_tar(path):
        return True
    is_listed = (folder / SHARD_LIST_FILE).exists()
    return folder.is_dir() and (is_listed or next(folder.rglob("*.parquet"), None) is None)


def open_stage_mixture(
    data: DataConfig,
    stage: StageConfig,
    stage_name: str,
    seed: int,
    source_cache: SourceCache | None = None,
) -> SourceMixture:
    """Return the shuffled stream of stage `stage_name`."""
    return SourceMixture(open_stage_sources(data, stage, stage_name, seed, source_cache), seed)


def open_held_out(
    data: DataConfig, stage: StageConfig, seed: int, source_cache: SourceCache | None = None
) -> SampleSource | None:
    """Return samples that are never trained on, None when there are none."""
    data = stage_data(data, stage)
    if data.val:
        try:
            return _open_source(
                data.val, data.images, data, stage, seed + HELD_OUT_SEED_OFFSET, source_cache
            )
        except UserError as error:
            raise UserError(f"data.val: {str(error).removeprefix('data ')}") from error
    if data.train == SCENES_SOURCE and not data.mix:
        return _open_source(SCENES_SOURCE, None, data, stage, seed + HELD_OUT_SEED_OFFSET, None)
    return None
