"""The budget card of a run: what its connector costs, and what was spent to train it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlbench.config.stage_schema import StageConfig
from vlbench.connector.base import Connector
from vlbench.model.connector_cost import count_connector_cost
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.vlm import VLM
from vlbench.text_files import read_csv
from vlbench.train.run_folder import RunFolder
from vlbench.train.trainable_parts import trained_parameters


def build_budget_card(
    stages: Mapping[str, StageConfig],
    run: RunFolder,
    vlm: LoadedVLM,
    spent_by_stage: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Return the fields of `ConnectorCost`, and beside them what was spent.

    The cost of tiled images is that of one of `data.reference_image.REFERENCE_SIZE`.

    - `parts`: of each part the `total` parameters, and those `trained` in any stage
    - `step_seconds`: of each stage the median time of an optimizer step
    - `steps`, `epochs`: of each stage that was run; epochs are passes over its data
    - `samples`, `images`, `views` of these images, `tokens_seen` (image positions included),
      `supervised_tokens`: what was trained on; `truncated_samples`, `lost_supervised_tokens`: what
      was cut off at `language.max_length`. Absent in a run of a version that did not count them
    - `reduced_samples`: samples with fewer tiles than they could have, if there were any
    - `unused_objectives`: those that the connector offers and no stage trained

    `spent_by_stage` are steps and epochs.
    """
    ran = {name: stages[name] for name in spent_by_stage["steps"]}
    seen = dict((run.latest_position.seen if run.latest_position else None) or {})
    if seen:
        seen["tokens_seen"] = seen.pop("tokens")
        if not seen.get("reduced_samples"):
            seen.pop("reduced_samples", None)
    return {
        **count_connector_cost(vlm.model, vlm.processor.view_layout)._asdict(),
        "parts": {
            name: {
                "total": sum(parameter.numel() for parameter in part.parameters()),
                "trained": _count_trained(ran, vlm.model, name),
            }
            for name, part in vlm.model.named_parts()
        },
        "step_seconds": median_step_seconds(run.folder / "metrics.csv"),
        **seen,
        **spent_by_stage,
        "unused_objectives": unused_objectives(vlm.connector, ran.values()),
    }


def unused_objectives(connector: Connector, stages: Iterable[StageConfig]) -> list[str]:
    """Return the objectives that a connector offers and none of the stages trains."""
    trained = {stage.objective for stage in stages}
    return [name for name in connector.objectives() if name not in trained]


def _count_trained(stages: Mapping[str, StageConfig], vlm: VLM, part_name: str) -> int:
    """Return how many parameters of a part are trained in the stage that trains most of them."""
    settings = [
        stage.trained_parts[part_name]
        for stage in stages.values()
        if part_name in stage.trained_parts
    ]
    counts = (
        sum(parameter.numel() for parameter in trained_parameters(vlm, part_name, one))
        for one in settings
    )
    return max(counts, default=0)


def median_step_seconds(metrics_file: Path) -> dict[str, float]:
    """Return the median time of an optimizer step of each stage, from metrics.csv."""
    seconds_by_stage: dict[str, list[float]] = {}
    for row in read_csv(metrics_file):
        if row.get("step_seconds"):
            seconds_by_stage.setdefault(row["stage"], []).append(float(row["step_seconds"]))
    return {stage: round(statistics.median(each), 4) for stage, each in seconds_by_stage.items()}
