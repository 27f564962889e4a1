"""What a model is asked and shown for a record, by benchmark and protocol."""

from __future__ import annotations

from typing import Any

from vlbench.evaluate.tasks import cmmmu_prompts, mmmu_prompts
from vlbench.evaluate.tasks.record import Generation, Prompt, Record, Skipped
from vlbench.mistakes import Mistake, nearest

BENCHMARKS: dict[str, Any] = {"mmmu": mmmu_prompts, "cmmmu": cmmmu_prompts}
"""A module per benchmark: its table PROTOCOLS, and `ask`, which follows one of them."""


def prompt(record: Record, protocol: str) -> Prompt | Skipped:
    """Return what a protocol asks about a record, or why it does not ask."""
    try:
        return BENCHMARKS[record.task].ask(record, protocol_of(record.task, protocol))
    except Skipped as skipped:
        return skipped


def generation(task: str, protocol: str) -> Generation:
    """Return how a protocol lets a model answer."""
    return protocol_of(task, protocol).generation


def protocol_of(task: str, name: str) -> Any:
    """Return a protocol of a benchmark; raises a Mistake for a name that it does not have."""
    if task not in BENCHMARKS:
        allowed = ", ".join(BENCHMARKS)
        raise Mistake(f"no task '{task}'; there are {allowed}.{nearest(task, BENCHMARKS)}")
    known = BENCHMARKS[task].PROTOCOLS
    if name not in known:
        why = UNASKED.get((task, name), "") or nearest(name, known)
        allowed = ", ".join(known)
        raise Mistake(f"{task} has no prompts by protocol '{name}'; there are {allowed}.{why}")
    return known[name]


UNASKED = {
    ("cmmmu", "official"): " The benchmark's own code has none: it scores answers, and asks nothing"
}
