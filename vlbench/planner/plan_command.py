"""`python -m vlbench plan recipe=... gpu=...`: memory, time and cost of a training, beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vlbench.config import recipe as recipes
from vlbench.config.overrides import format_override
from vlbench.planner.memory_estimate import MEMORY_COMPONENTS, MemoryByComponent, total_bytes
from vlbench.planner.options import PlanOptions
from vlbench.planner.stage_workload import ASSUMED_SUPERVISED_SHARE, ASSUMED_TEXT_TOKENS
from vlbench.planner.training_plan import TrainingPlan, make_plan
from vlbench.train.run_report import format_bytes, format_duration

YI_VL_DAYS = {"yi-6b": 3, "yi-34b": 10}
"""Days that Yi-VL's model card says for 128 A800, about."""
YI_VL_GPUS = 128


def run_plan(options: PlanOptions) -> int:
    """Print the plan of a training; with `probe=true` try it here. Return the exit code."""
    if options.probe:
        recipes.require_data(options.recipe)
    print("\n".join(format_plan(make_plan(options))), flush=True)
    if not options.probe:
        return 0
    from vlbench.train.fit import fit

    print("\nprobe: one step of every stage, longest batch first", flush=True)
    return fit(dataclasses.replace(options.recipe, dry_run=True))


def format_plan(plan: TrainingPlan) -> list[str]:
    """Return the whole plan."""
    return [
        *_setup_lines(plan),
        "",
        *_workload_lines(plan),
        "",
        *_memory_lines(plan),
        "",
        *_strategy_lines(plan),
        "",
        *_recommendation_lines(plan),
        *_yi_vl_comparison(plan),
    ]


def _setup_lines(plan: TrainingPlan) -> list[str]:
    asked, recipe = plan.options, plan.options.recipe
    gpu, trainer = asked.gpu, recipe.trainer
    nodes = f"{trainer.num_nodes} x " if trainer.num_nodes > 1 else ""
    found = [
        f"plan of {recipe.recipe}, size {recipe.size}, on {nodes}{trainer.devices} {gpu.name} of "
        f"{format_bytes(gpu.memory_bytes)} and {gpu.flops_per_second / 1e12:.0f} TFLOP/s",
        f"precision {recipe.precision}, strategy {asked.strategy}, checkpointing "
        f"{recipe.activation_checkpointing}; mfu={asked.mfu:g} is assumed, communication is not "
        "counted",
    ]
    if plan.has_assumed_lengths:
        texts = ", ".join(f"{form} {tokens}" for form, tokens in ASSUMED_TEXT_TOKENS.items())
        found.append(
            f"assumed: one picture in a sample, and tokens of text beside it ({texts}; "
            f"{ASSUMED_SUPERVISED_SHARE['chat']:.0%} of a chat learned), unless text_tokens= "
            "says others"
        )
    found += [
        f"stage {name} is left out: its objective is not language" for name in plan.skipped_stages
    ]
    return found


def _workload_lines(plan: TrainingPlan) -> list[str]:
    asked = plan.options
    way = _checkpointing_mode(plan)
    rows = [("stage", "samples", "tokens each", "steps", "micro-batches", "FLOPs", "time", "GPU h")]
    seconds = 0.0
    for name, work in plan.workloads.items():
        batch = asked.recipe.stages[name].global_batch_size
        own = _training_seconds(plan, work.total_flops(way))
        seconds += own
        rows.append(
            (
                name,
                f"{work.sample_count:,}",
                f"{work.mean_sample.token_count:.0f}",
                f"{work.steps:,}",
                str(
                    work.count_micro_batches(batch, asked.world_size, plan.max_tokens_per_row[name])
                ),
                f"{work.total_flops('none'):.3g}",
                format_duration(own),
                f"{own * asked.world_size / 3600:,.1f}",
            )
        )
    rows.append(
        (
            "all",
            "",
            "",
            "",
            "",
            "",
            format_duration(seconds),
            f"{seconds * asked.world_size / 3600:,.1f}",
        )
    )
    found = format_table(rows)
    again = sum(work.total_flops(way) for work in plan.workloads.values())
    once = sum(work.total_flops("none") for work in plan.workloads.values())
    if again > once:
        found.append(f"checkpointing {way} repeats {again / once - 1:.0%} of the operations")
    if asked.gpu.price_per_hour is not None:
        cost = seconds * asked.world_size / 3600 * asked.gpu.price_per_hour
        found.append(f"cost: {cost:,.0f} US dollars at {asked.gpu.price_per_hour:g} for a GPU hour")
    return found


def _memory_lines(plan: TrainingPlan) -> list[str]:
    asked, way = plan.options, _checkpointing_mode(plan)
    head = f"memory of a GPU at the peak, in GB; {plan.memory_budget / 1e9:.1f} are there"
    rows: list[tuple[str, ...]] = [
        ("stage", "max_tokens_per_row", *MEMORY_COMPONENTS, "sum", "", "fit")
    ]
    for name, stage in plan.stage_memory.items():
        row = plan.max_tokens_per_row[name]
        memory = stage.estimate_memory(asked.strategy, way, row)
        most = stage.max_row_tokens(asked.strategy, way, row, plan.memory_budget)
        rows.append(
            (
                name,
                str(row),
                *_format_components(memory),
                _fit_label(memory, plan.memory_budget),
                str(most),
            )
        )
    return [head, *format_table(rows), "fit: the most max_tokens_per_row that fit"]


def _strategy_lines(plan: TrainingPlan) -> list[str]:
    least = min(one.total_flops for one in plan.strategy_estimates)
    rows: list[tuple[str, ...]] = [("arrangement", "stage", *MEMORY_COMPONENTS, "sum", "", "time")]
    for one in plan.strategy_estimates:
        name = (
            f"{one.strategy} {one.checkpointing_mode}"
            if plan.options.world_size > 1
            else one.checkpointing_mode
        )
        time = f"x {one.total_flops / least:.2f}"
        memory = _format_components(one.peak_memory)
        rows.append(
            (
                name,
                one.largest_stage,
                *memory,
                _fit_label(one.peak_memory, plan.memory_budget),
                time,
            )
        )
    return ["arrangements, each with the stage that needs most", *format_table(rows)]


def _recommendation_lines(plan: TrainingPlan) -> list[str]:
    if plan.cheapest_fit is None:
        return [
            "nothing fits, not even one sample in a row: more GPUs (trainer.devices, "
            "trainer.num_nodes), a larger one (gpu), an adapter "
            "(stages.chat.train.language.lora.rank=64), or fewer parts that train"
        ]
    one, shorter = plan.cheapest_fit
    words = [f"trainer.strategy={one.strategy}"] if plan.options.world_size > 1 else []
    words += [f"activation_checkpointing={one.checkpointing_mode}"]
    words += [
        format_override(f"stages.{name}.max_tokens_per_row", row) for name, row in shorter.items()
    ]
    time = format_duration(_training_seconds(plan, one.total_flops))
    return [f"cheapest that fits, {time}: {' '.join(words)}"]


def _yi_vl_comparison(plan: TrainingPlan) -> list[str]:
    recipe = plan.options.recipe
    days = YI_VL_DAYS.get(recipe.language.name)
    known = recipe.recipe == "yivl_llava" and plan.workloads.keys() == recipe.stages.keys()
    if days is None or not known or plan.options.gpu.name != "A800":
        return []
    work = sum(one.total_flops(_checkpointing_mode(plan)) for one in plan.workloads.values())
    own = _training_seconds(plan, work) * plan.options.world_size / YI_VL_GPUS / 86400
    needed = plan.options.mfu * own / days
    fits = f": mfu={needed:.2f} would give theirs" if needed <= 1 else ""
    return [
        f"Yi-VL's authors reported about {days} days on {YI_VL_GPUS} A800; this plan says "
        f"{own:.1f} days on {YI_VL_GPUS}, at mfu={plan.options.mfu:g}{fits}"
    ]


def _checkpointing_mode(plan: TrainingPlan) -> str:
    """Return the recipe's way of recomputing; `auto` is that of the cheapest arrangement."""
    way = plan.options.recipe.activation_checkpointing
    if way != "auto":
        return way
    fitting = [one for one in plan.strategy_estimates if one.fits_memory]
    own = [one for one in fitting if one.strategy == plan.options.strategy]
    return min(own, key=lambda one: one.total_flops).checkpointing_mode if own else "full"


def _training_seconds(plan: TrainingPlan, total_flops: float) -> float:
    return total_flops / (
        plan.options.gpu.flops_per_second * plan.options.mfu * plan.options.world_size
    )


def _format_components(memory: MemoryByComponent) -> list[str]:
    return [_format_gigabytes(memory[name]) for name in MEMORY_COMPONENTS] + [
        _format_gigabytes(total_bytes(memory))
    ]


def _format_gigabytes(byte_count: float) -> str:
    """Return bytes in GB, with three digits where they are few."""
    gigabytes = byte_count / 1e9
    if gigabytes < 0.0005:
        return "0"
    return f"{gigabytes:.1f}" if gigabytes >= 1 else f"{gigabytes:.3f}"


def _fit_label(memory: MemoryByComponent, memory_budget: float) -> str:
    return "fits" if total_bytes(memory) <= memory_budget else "does not fit"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
