"""Finished runs of equal recipe are one row of a comparison; rows are named by what differs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vlbench.command_line.overrides import shorten_keys
from vlbench.compare.report.finished_runs import ComparisonArm, FinishedRun
from vlbench.compare.report.row_identity import (
    STAGES_KEY,
    identity_with_source,
    stage_names,
    stages_that_ran,
)
from vlbench.errors import UserError

BUDGET_KEYS = ("steps", "epochs", "global_batch_size", "max_tokens_per_row", "warmup_ratio")
RowIdentity = Mapping[str, Any]
"""What a row was trained with: the keys of its recipe that say so, with their values."""


OWN_STAGES_KEY = "stages"
"""The stages that were run, in the place of `STAGES_KEY` where recipes have other stages."""


def group_into_arms(runs: Sequence[FinishedRun]) -> list[ComparisonArm]:
    """Group runs into arms, named by the keys in which they differ; a repeated seed is an error."""
    grouped: dict[str, list[FinishedRun]] = {}
    for run, identity in zip(runs, _row_identities(runs), strict=True):
        grouped.setdefault(json.dumps(identity, sort_keys=True), []).append(run)
    names = _arm_names([group[0] for group in grouped.values()])
    arms = []
    for name, group in zip(names, grouped.values(), strict=True):
        group = sorted(group, key=lambda run: run.seed)
        for run, following in pairwise(group):
            if run.seed == following.seed:
                raise UserError(
                    f"{run.folder} and {following.folder} are the same recipe with the same seed "
                    f"{run.seed}: name one of them"
                )
        arms.append(ComparisonArm(name, tuple(group)))
    return arms


def differing_keys(arms: Sequence[ComparisonArm]) -> list[str]:
    """Return the keys in which arms differ, learning rates first."""
    identities = _row_identities([arm.runs[0] for arm in arms])
    differing = [key for key in _telling_keys(identities) if _count_distinct(identities, [key]) > 1]
    return sorted(differing, key=lambda key: not key.endswith(".lr"))


def shown_values(runs: Sequence[FinishedRun], key: str) -> list[Any]:
    """Return the values of a key as recipes have them, or else what tells them apart.

    A recipe's text is not enough where the file that it names was another one.
    """
    values = [identity.get(key) for identity in _row_identities(runs)]
    if key in (STAGES_KEY, OWN_STAGES_KEY):
        return ["all stages" if value is None else ",".join(value) for value in values]
    typed = [run.recipe.get(key, value) for run, value in zip(runs, values, strict=True)]
    pairs = [json.dumps(pair) for pair in zip(typed, values, strict=True)]
    return typed if len({*map(json.dumps, typed)}) == len({*pairs}) else values


def _row_identities(runs: Sequence[FinishedRun]) -> list[RowIdentity]:
    """Return what rows were trained with; "all stages" is no answer where recipes have others."""
    identities: list[RowIdentity] = [identity_with_source(run.recipe, run.contents) for run in runs]
    if len({tuple(stage_names(run.recipe)) for run in runs}) == 1:
        return identities
    return [
        {**identity, STAGES_KEY: None, OWN_STAGES_KEY: stages_that_ran(run.recipe)}
        for run, identity in zip(runs, identities, strict=True)
    ]


def _telling_keys(identities: Sequence[RowIdentity]) -> list[str]:
    """Return the keys of rows, in order, without those of stages that some of them did not run.

    That such a stage was left out says it all, unless rows that ran it differ in nothing else.
    """
    stages = [{key.split(".")[1] for key in one if key.startswith("stages.")} for one in identities]
    common = set.intersection(*stages)
    keys = list(dict.fromkeys(key for identity in identities for key in identity))
    of_all = [key for key in keys if not key.startswith("stages.") or key.split(".")[1] in common]
    is_enough = _count_distinct(identities, of_all) == _count_distinct(identities, keys)
    return of_all if is_enough else [*of_all, *(key for key in keys if key not in of_all)]


def _count_distinct(identities: Sequence[RowIdentity], keys: Sequence[str]) -> int:
    """Return how many rows these keys tell apart."""
    return len({json.dumps([identity.get(key) for key in keys]) for identity in identities})


def _arm_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return short unique names of recipes: the connector and as few other keys as possible."""
    identities = _row_identities(runs)
    if len(runs) == 1:
        return [str(identities[0]["connector.name"])]
    keys = _telling_keys(identities)
    order = sorted(keys, key=lambda key: (_meaning_rank(key), -_count_distinct(identities, [key])))
    chosen: list[str] = []
    for key in order:
        more = _count_distinct(identities, [*chosen, key])
        if more > _count_distinct(identities, chosen):
            chosen.append(key)
    short = shorten_keys(chosen)
    columns = [
        [
            _format_setting(short[key], value) if _has_key(key, identity) else ""
            for identity, value in zip(identities, shown_values(runs, key), strict=True)
        ]
        for key in chosen
    ]
    names = [" ".join(filter(None, words)) for words in zip(*columns, strict=True)]
    seen: Counter[str] = Counter()
    for number, name in enumerate(names):  # texts that are equal, of values that are not
        seen[name] += 1
        names[number] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _has_key(key: str, identity: RowIdentity) -> bool:
    """Tell whether a key is not an option of another connector, nor of a stage that was not run."""
    if key.startswith("stages."):
        return any(own.split(".")[:2] == key.split(".")[:2] for own in identity)
    return key in identity or not key.startswith("connector.")


def _meaning_rank(key: str) -> int:
    """Return how much a key says of what a row is, 0 for the most.

    A connector and its options, adapters, and the models say what is trained; how long, in which
    batches and at which rates is named only where nothing else tells rows apart.
    """
    if key == "connector.name":
        return 0
    if key.startswith("connector."):
        return 1
    if key in (STAGES_KEY, OWN_STAGES_KEY):
        return 2
    if ".lora." in key:
        return 3 if key.endswith(".rank") else 4
    if key.startswith(("vision.", "language.", "size", "init")):
        return 5
    last = key.rsplit(".", 1)[-1]
    return {"lr": 8, **dict.fromkeys(BUDGET_KEYS, 7)}.get(last, 6)


def _format_setting(key: str, value: Any) -> str:
    """Return `qformer` for a connector's name, `lora.rank=4` for any other key."""
    if key == "connector.name":
        return str(value)
    if key == STAGES_KEY and value == "all stages":
        return str(value)
    return f"{key.removeprefix('connector.')}={'null' if value is None else value}"
