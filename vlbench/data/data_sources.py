"""The samples that a stage trains on: the sources that a recipe names, mixed."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

from vlbench.config.data_schema import MixtureSource
from vlbench.config.stage_schema import StageData
from vlbench.data.chosen_samples import take_part
from vlbench.data.conversation_files import ConversationFiles
from vlbench.data.large_scene_dataset import LargeSceneCaptions, LargeSceneConversations
from vlbench.data.parquet_files import iterate_parquet_files
from vlbench.data.remote_shards import is_url, shown_name
from vlbench.data.sample import SampleSource
from vlbench.data.scene_dataset import SceneCaptions, SceneConversations
from vlbench.data.shard_list import SHARD_LIST_FILE, is_tar
from vlbench.data.shards import WebDatasetShards
from vlbench.data.shuffle import SourceMixture
from vlbench.errors import UserError

SCENES_SOURCE, LARGE_SCENES_SOURCE = "scenes", "large_scenes"
RENDERED_SOURCES = (SCENES_SOURCE, LARGE_SCENES_SOURCE)
HELD_OUT_SEED_OFFSET = 1 << 20  # added to the seed of held-out rendered scenes

SourceCache = MutableMapping[tuple[str, str | None, bool], SampleSource]
"""Open sources, which stages share, by path, image folder and whether images may be outside."""


def open_stage_sources(
    stage_data: StageData, source_cache: SourceCache | None = None
) -> list[tuple[SampleSource, float]]:
    """Return the (source, weight) pairs that a stage trains on.

    A stage without data is a UserError; so is every source that cannot be opened or is empty, a
    line each. Opened files are kept in `source_cache`.
    """
    data = stage_data.config
    parts = data.mix
    if data.train is not None and not parts:
        parts = (MixtureSource(train=data.train),)
    if parts is None:
        raise UserError(
            f"stage {stage_data.stage_name} has no data: give data.train=FILE.json (LLaVA's "
            f"format) and data.images=FOLDER, or data.train={SCENES_SOURCE}"
        )
    sources, errors = [], []
    for part in parts:
        try:
            sources.append(_open_part(part, stage_data, source_cache))
        except UserError as error:
            errors += [_describe_failure(line, part) for line in error.lines]
    if errors:
        raise UserError(*errors)
    return sources


def _describe_failure(problem: str, part: MixtureSource) -> str:
    """Return why a source cannot be opened, with its name and what it needs."""
    source = shown_name(part.train)
    named = problem if source in problem else f"data {source}: {problem}"
    end = "" if named.endswith(("?", ".")) else "."
    return f"{named}{end} It needs: {part.needs}" if part.needs else named


def _open_part(
    part: MixtureSource, stage_data: StageData, source_cache: SourceCache | None
) -> tuple[SampleSource, float]:
    """Open one source of a mixture; return it with its weight."""
    images = part.images or stage_data.config.images
    base = open_source(part.train, images, stage_data, stage_data.seed, source_cache)
    if part.prompts and stage_data.stage.sample_format == "caption":
        name = stage_data.stage_name
        raise UserError(
            f"data {shown_name(part.train)}: has prompts, and stage {name} learns captions "
            f"without a question; leave them out, or give stages.{name}.sample_format=chat"
        )
    return take_part(base, part, stage_data.seed)


def open_source(
    path: str,
    image_folder: str | None,
    stage_data: StageData,
    seed: int,
    source_cache: SourceCache | None,
) -> SampleSource:
    """Open one source from its text; every key of a recipe that names data is opened here.

    Args:
        path: One of RENDERED_SOURCES, or what data.train takes: a file, folder, pattern of shards,
            URL, data set of the hub, or NAME:FOLDER of a mapping of annotation files.
        image_folder: Where the image names of a JSON file are looked up.
        stage_data: Number of samples and questions of rendered scenes; whether images may be
            outside. A caption stage renders scenes with captions.
        seed: Of rendered scenes.
        source_cache: Files that are open already; None opens the file anew.
    """
    data = stage_data.config
    if path in RENDERED_SOURCES:
        return _open_rendered(path, stage_data, seed)
    source_cache = {} if source_cache is None else source_cache
    key = (path, image_folder, data.allow_outside)
    if key not in source_cache:
        source_cache[key] = WebDatasetShards(path) if _is_shards(path) else ConversationFiles(*key)
    return source_cache[key]


def _open_rendered(path: str, stage_data: StageData, seed: int) -> SampleSource:
    """Open rendered scenes: captions for a caption stage, else conversations."""
    data, image_size = stage_data.config, stage_data.stage.image_size
    if stage_data.stage.sample_format == "caption":
        if path == LARGE_SCENES_SOURCE:
            return LargeSceneCaptions(seed, data.samples, data.scene_side)
        return SceneCaptions(seed, data.samples, image_size)
    if path == LARGE_SCENES_SOURCE:
        return LargeSceneConversations(seed, data.samples, data.questions, data.scene_side)
    return SceneConversations(seed, data.samples, data.questions, image_size)


def _is_shards(path: str) -> bool:
    """Tell whether a path is that of tar files, or of a folder that should have a list of them."""
    folder = Path(path)
    if is_url(path) or is_tar(path):
        return True
    is_listed = (folder / SHARD_LIST_FILE).exists()
    return folder.is_dir() and (is_listed or next(iterate_parquet_files(folder), None) is None)


def open_stage_mixture(
    stage_data: StageData, source_cache: SourceCache | None = None
) -> SourceMixture:
    """Return the shuffled stream of a stage."""
    return SourceMixture(open_stage_sources(stage_data, source_cache), stage_data.seed)


def open_held_out(
    stage_data: StageData, source_cache: SourceCache | None = None
) -> SampleSource | None:
    """Return samples that are never trained on, None when there are none."""
    data, seed = stage_data.config, stage_data.seed + HELD_OUT_SEED_OFFSET
    if data.val:
        try:
            return open_source(data.val, data.images, stage_data, seed, source_cache)
        except UserError as error:
            lines = [line.removeprefix("data ") for line in error.lines]
            raise UserError(*(f"data.val: {line}" for line in lines)) from error
    if data.train in RENDERED_SOURCES and not data.mix:
        return open_source(data.train, None, stage_data, seed, None)
    return None
