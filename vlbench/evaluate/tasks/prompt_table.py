"""What a model is asked and shown for a record, by benchmark and protocol."""

from __future__ import annotations

from typing import Any

from vlbench.errors import UserError, suggest_name
from vlbench.evaluate.tasks import cmmmu_prompts, mmmu_prompts
from vlbench.evaluate.tasks.benchmark_types import (
    BenchmarkPrompt,
    BenchmarkRecord,
    GenerationLimits,
    SkippedRecord,
)

PROMPT_MODULES: dict[str, Any] = {"mmmu": mmmu_prompts, "cmmmu": cmmmu_prompts}
"""A module per benchmark: its table PROTOCOLS, and `ask`, which follows one of them."""


def prompt_or_skip(record: BenchmarkRecord, protocol: str) -> BenchmarkPrompt | SkippedRecord:
    """Return what a protocol asks about a record, or why it does not ask."""
    try:
        return PROMPT_MODULES[record.task].build_prompt(
            record, prompt_protocol(record.task, protocol)
        )
    except SkippedRecord as skipped:
        return skipped


def protocol_limits(task: str, protocol: str) -> GenerationLimits:
    """Return how a protocol lets a model answer."""
    return prompt_protocol(task, protocol).generation_limits


def prompt_protocol(task: str, protocol: str) -> Any:
    """Return a protocol of a benchmark; raises a Mistake for a name that it does not have."""
    if task not in PROMPT_MODULES:
        allowed = ", ".join(PROMPT_MODULES)
        raise UserError(
            f"no task '{task}'; there are {allowed}.{suggest_name(task, PROMPT_MODULES)}"
        )
    known = PROMPT_MODULES[task].PROMPT_PROTOCOLS
    if protocol not in known:
        why = NO_PROMPTS_REASONS.get((task, protocol), "") or suggest_name(protocol, known)
        allowed = ", ".join(known)
        raise UserError(
            f"{task} has no prompts by protocol '{protocol}'; there are {allowed}.{why}"
        )
    return known[protocol]


NO_PROMPTS_REASONS = {
    ("cmmmu", "official"): " The benchmark's own code has none: it scores answers, and asks nothing"
}
