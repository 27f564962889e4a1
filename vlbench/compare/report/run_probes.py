"""Reading what the information probes of a finished run found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vlbench.compare.report.finished_runs import FinishedRun
from vlbench.errors import UserError
from vlbench.text_files import read_json
from vlbench.train.run_results_file import INFORMATION_FILE

WITHOUT_PROBES = f"no {INFORMATION_FILE}"
"""Why a run has no probes that was not asked for them."""
PLACE_LABELS = {
    "encoder": "in the encoder",
    "connector": "behind the connector",
    "language": "in the language model",
}
"""Places of the probes, in the order that a picture passes them -> what a table calls them."""


class RunProbes(NamedTuple):
    """The content of a run's information.json."""

    read: dict[str, list[bool]]
    """Question id -> for each place, whether its probes read the evidence right."""
    control: dict[str, list[bool]]
    unsure: frozenset[str]
    """Ids of questions that probes of all tokens at once do not read from the encoder either."""
    not_probed: Mapping[str, str]
    """Id of a question that is not in `read` -> why."""
    neighbours: Mapping[str, float]
    training_pictures: Mapping[str, int]
    """Families of questions -> how many pictures their probes were fitted on."""
    reads_answers: bool


def load_run_probes(run: FinishedRun) -> RunProbes | str:
    """Return the probes of a run, or why it has none."""
    file = run.folder / INFORMATION_FILE
    if not file.is_file():
        return WITHOUT_PROBES
    content = read_json(file)
    try:
        if "left_out" in content:
            return str(content["left_out"])
        return RunProbes(
            read={one["id"]: _read_flags(one["read"]) for one in content["questions"]},
            control={one["id"]: _read_flags(one["control"]) for one in content["questions"]},
            unsure=frozenset(one["id"] for one in content["questions"] if one.get("unsure")),
            not_probed={
                name: str(reason)
                for reason, names in content.get("not_probed", {}).items()
                for name in names
            },
            neighbours={name: float(value) for name, value in content["neighbours"].items()},
            training_pictures={
                name: int(count) for name, count in content["training_pictures"].items()
            },
            reads_answers=bool(content["reads_answers"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: holds no information probes ({error})") from error


def _read_flags(values: list[int]) -> list[bool]:
    """Return a flag for each place; a ValueError where there is another number of them."""
    if len(values) != len(PLACE_LABELS):
        raise ValueError(f"{len(values)} places instead of {len(PLACE_LABELS)}")
    return [bool(value) for value in values]
