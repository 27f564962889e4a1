"""The data of a run: it goes on with what it has trained on, or is refused.

versions.json has a checksum of every path of data, and size and modification time of the files:
where these are as they were, nothing is read. It has the steps of each stage, too, which the number
of records may decide, and which order of shards and Parquet files it has.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlbench.data.chosen_samples import base_source
from vlbench.data.data_checksums import (
    CHECKSUMS_KEY,
    DATA_KEYS,
    ORDERS_KEY,
    STAMPS_KEY,
    STEPS_KEY,
    checksum_sources,
    stamp_sources,
)
from vlbench.data.shard_sampler import ORDER_VERSION
from vlbench.distributed import collectives
from vlbench.errors import UserError
from vlbench.train.checkpoint_files import RunPosition
from vlbench.train.quarantine import forget_sources
from vlbench.train.run_folder import RunFolder
from vlbench.train.run_report import print_status
from vlbench.train.stage_plan import StageRun


def keep_data(run: RunFolder, stage_runs: Sequence[StageRun]) -> None:
    """Record what the data of a run hold when it begins; compare them when it goes on.

    What differs is told. It is recorded anew where nothing was trained on it: held-out data, and
    those of stages that have not begun. That of stages that are done does not matter any more. A
    finished run is left as it is.

    Raises:
        UserError: Data differ on which the run has trained and would go on to train; a line for
            each path. Or a stage is under way in another order of its shards or Parquet files.
    """
    if run.is_finished:
        return
    restore_stage_steps(run, stage_runs)
    recorded, stamps, steps, orders = (_read_mapping(run, key) for key in DATA_KEYS)
    sources = {source.name: source for one in stage_runs for source in one.all_sources}
    new_stamps = stamp_sources(sources.values())
    same_files = {name for name in recorded if stamps.get(name, ()) == new_stamps.get(name)}
    checksums = checksum_sources(sources[name] for name in sources.keys() - same_files)
    changed = {name for name, found in checksums.items() if found != recorded.get(name, found)}
    position = run.latest_position
    begun = [one for one in stage_runs if _has_begun(position, one)]
    _refuse_other_order(run, [one for one in begun if not _is_done(position, one, steps)], orders)
    trained = _training_paths(begun)
    wanted = _training_paths(one for one in stage_runs if not _is_done(position, one, steps))
    mixed = sorted(changed & trained & wanted)
    if mixed:
        raise UserError(
            *(
                f"run={run.folder} would go on with other data: {name} had the checksum "
                f"{recorded[name][:12]} when it was trained on, and has {checksums[name][:12]} "
                f"now, with {len(base_source(sources[name])):,} records. Put the old data back, or "
                f"begin a new run with {shlex.quote(f'init={run.folder}')}"
                for name in mixed
            )
        )
    for name in sorted(changed):
        why = "stages that trained on it are done" if name in trained else "it was not trained on"
        print_status(f"{name}: holds other data than when the run began; {why}")
    forget_sources(run, changed - trained)
    found = {name: one for name, one in checksums.items() if name not in changed & trained}
    found_stamps = {name: new_stamps[name] for name in found if name in new_stamps}
    new_steps = {one.name: one.total_steps for one in stage_runs}
    new_orders = {one.name: ORDER_VERSION for one in stage_runs if not _has_begun(position, one)}
    run.record_versions(
        {
            CHECKSUMS_KEY: {**recorded, **found},
            STAMPS_KEY: {**stamps, **found_stamps},
            STEPS_KEY: {**steps, **new_steps},
            ORDERS_KEY: {**orders, **new_orders},
        }
    )


def _refuse_other_order(
    run: RunFolder, under_way: Sequence[StageRun], orders: Mapping[str, Any]
) -> None:
    """Raise a UserError for a stage that this version would go on with in another order."""
    for one in under_way:
        # of a single shard the order is as it was
        in_parts = [
            source.name
            for source in one.data.sources
            if len(getattr(source, "block_counts", None) or ()) > 1
        ]
        if in_parts and orders.get(one.name, 1) != ORDER_VERSION:
            raise UserError(
                f"run={run.folder} is in stage {one.name}, and this version reads shards and "
                f"Parquet files in another order than the one that began it: {in_parts[0]}. Go on "
                "with that version (versions.json), or begin a new run with "
                f"{shlex.quote(f'init={run.folder}')}"
            )


def restore_stage_steps(run: RunFolder, stage_runs: Iterable[StageRun]) -> None:
    """Give stages that have begun the steps that they began with."""
    recorded, position = _read_mapping(run, STEPS_KEY), run.latest_position
    for one in stage_runs:
        if _has_begun(position, one):
            one.total_steps = recorded.get(one.name, one.total_steps)


def sync_stage_steps(run: RunFolder, stage_runs: Sequence[StageRun]) -> None:
    """Restore the steps of stages as the first process reads them, in all processes.

    On a network file system another machine may see a run folder as it was a minute ago.
    """

    def read_steps() -> list[int]:
        restore_stage_steps(run, stage_runs)
        return [one.total_steps for one in stage_runs]

    steps = collectives.call_on_rank_zero(read_steps)
    for one, total_steps in zip(stage_runs, steps, strict=True):
        one.total_steps = total_steps


def _read_mapping(run: RunFolder, key: str) -> dict[str, Any]:
    """Return what versions.json has under a key, {} where it has none."""
    value = run.read_versions().get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{run.versions_file}: {key} is no mapping")
    return value


def _training_paths(stage_runs: Iterable[StageRun]) -> set[str]:
    return {source.name for one in stage_runs if one.total_steps for source in one.data.sources}


def _has_begun(position: RunPosition | None, stage_run: StageRun) -> bool:
    return position is not None and (position.stage, position.step) > (stage_run.stage_index, 0)


def _is_done(
    position: RunPosition | None, stage_run: StageRun, recorded_steps: Mapping[str, int]
) -> bool:
    """Tell whether no step of a stage is left; False where it is unknown how many it had."""
    if position is None or position.stage < stage_run.stage_index:
        return False
    if position.stage > stage_run.stage_index:
        return True
    is_known = stage_run.stage.steps is not None or stage_run.name in recorded_steps
    return is_known and position.step >= stage_run.total_steps
