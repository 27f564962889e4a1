"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlbench.plan.memory import COMPONENTS, Memory, total
from vlbench.plan.work import LEARNED, TEXT
from vlbench.train.report import duration, size_of
from vlbench.words import typed

if TYPE_CHECKING:
    from vlbench.plan.run import Plan

REPORTED = {"yi-6b": 3, "yi-34b": 10}
"""Days that Yi-VL's model card says for 128 A800, about."""
REPORTED_ON = 128


def lines(plan: Plan) -> list[str]:
    """Return the whole plan."""
    return [
        *_what(plan),
        "",
        *_work(plan),
        "",
        *_memory(plan),
        "",
        *_arrangements(plan),
        "",
        *_best(plan),
        *_reported(plan),
    ]


def _what(plan: Plan) -> list[str]:
    asked, recipe = plan.asked, plan.asked.recipe
    gpu, trainer = asked.gpu, recipe.trainer
    nodes = f"{trainer.num_nodes} x " if trainer.num_nodes > 1 else ""
    found = [
        f"plan of {recipe.recipe}, size {recipe.size}, on {nodes}{trainer.devices} {gpu.name} of "
        f"{size_of(gpu.memory)} and {gpu.flops / 1e12:.0f} TFLOP/s",
        f"precision {recipe.precision}, strategy {asked.strategy}, checkpointing "
        f"{recipe.checkpointing}; mfu={asked.mfu:g} is assumed, communication is not counted",
    ]
    if plan.assumed:
        texts = ", ".join(f"{form} {tokens}" for form, tokens in TEXT.items())
        found.append(
            f"assumed: one picture in a sample, and tokens of text beside it ({texts}; "
            f"{LEARNED['chat']:.0%} of a chat learned), unless text_tokens= says others"
        )
    found += [f"stage {name} is left out: its objective is not language" for name in plan.left_out]
    return found


def _work(plan: Plan) -> list[str]:
    asked = plan.asked
    way = _way(plan)
    rows = [("stage", "samples", "tokens each", "steps", "micro-batches", "FLOPs", "time", "GPU h")]
    seconds = 0.0
    for name, work in plan.works.items():
        batch = asked.recipe.stages[name].batch
        own = _seconds(plan, work.operations(way))
        seconds += own
        rows.append(
            (
                name,
                f"{work.samples:,}",
                f"{work.sample.length:.0f}",
                f"{work.steps:,}",
                str(work.micro_batches(batch, asked.world, plan.rows[name])),
                f"{work.operations('none'):.3g}",
                duration(own),
                f"{own * asked.world / 3600:,.1f}",
            )
        )
    rows.append(
        ("all", "", "", "", "", "", duration(seconds), f"{seconds * asked.world / 3600:,.1f}")
    )
    found = table(rows)
    again = sum(work.operations(way) for work in plan.works.values())
    once = sum(work.operations("none") for work in plan.works.values())
    if again > once:
        found.append(f"checkpointing {way} repeats {again / once - 1:.0%} of the operations")
    if asked.gpu.price is not None:
        cost = seconds * asked.world / 3600 * asked.gpu.price
        found.append(f"cost: {cost:,.0f} US dollars at {asked.gpu.price:g} for a GPU hour")
    return found


def _memory(plan: Plan) -> list[str]:
    asked, way = plan.asked, _way(plan)
    head = f"memory of a GPU at the peak, in GB; {plan.room / 1e9:.1f} are there"
    rows: list[tuple[str, ...]] = [("stage", "row_tokens", *COMPONENTS, "sum", "", "fit")]
    for name, stage in plan.stages.items():
        row = plan.rows[name]
        memory = stage.memory(asked.strategy, way, row)
        most = stage.largest(asked.strategy, way, row, plan.room)
        rows.append((name, str(row), *_sizes(memory), _fits(memory, plan.room), str(most)))
    return [head, *table(rows), "fit: the most row_tokens that fit"]


def _arrangements(plan: Plan) -> list[str]:
    least = min(one.operations for one in plan.arrangements)
    rows: list[tuple[str, ...]] = [("arrangement", "stage", *COMPONENTS, "sum", "", "time")]
    for one in plan.arrangements:
        name = f"{one.strategy} {one.way}" if plan.asked.world > 1 else one.way
        time = f"x {one.operations / least:.2f}"
        memory = _sizes(one.memory)
        rows.append((name, one.stage, *memory, _fits(one.memory, plan.room), time))
    return ["arrangements, each with the stage that needs most", *table(rows)]


def _best(plan: Plan) -> list[str]:
    if plan.best is None:
        return [
            "nothing fits, not even one sample in a row: more GPUs (trainer.devices, "
            "trainer.num_nodes), a larger one (gpu), an adapter "
            "(stages.chat.train.language.lora.rank=64), or fewer parts that train"
        ]
    one, shorter = plan.best
    words = [f"trainer.strategy={one.strategy}"] if plan.asked.world > 1 else []
    words += [f"checkpointing={one.way}"]
    words += [typed(f"stages.{name}.row_tokens", row) for name, row in shorter.items()]
    time = duration(_seconds(plan, one.operations))
    return [f"cheapest that fits, {time}: {' '.join(words)}"]


def _reported(plan: Plan) -> list[str]:
    recipe = plan.asked.recipe
    days = REPORTED.get(recipe.language.name)
    known = recipe.recipe == "yivl_llava" and plan.works.keys() == recipe.stages.keys()
    if days is None or not known or plan.asked.gpu.name != "A800":
        return []
    work = sum(one.operations(_way(plan)) for one in plan.works.values())
    own = _seconds(plan, work) * plan.asked.world / REPORTED_ON / 86400
    needed = plan.asked.mfu * own / days
    fits = f": mfu={needed:.2f} would give theirs" if needed <= 1 else ""
    return [
        f"Yi-VL's authors reported about {days} days on {REPORTED_ON} A800; this plan says "
        f"{own:.1f} days on {REPORTED_ON}, at mfu={plan.asked.mfu:g}{fits}"
    ]


def _way(plan: Plan) -> str:
    """Return the recipe's way of recomputing; `auto` is that of the cheapest arrangement."""
    way = plan.asked.recipe.checkpointing
    if way != "auto":
        return way
    fitting = [one for one in plan.arrangements if one.fits]
    own = [one for one in fitting if one.strategy == plan.asked.strategy]
    return min(own, key=lambda one: one.operations).way if own else "full"


def _seconds(plan: Plan, operations: float) -> float:
    return operations / (plan.asked.gpu.flops * plan.asked.mfu * plan.asked.world)


def _sizes(memory: Memory) -> list[str]:
    return [_size(memory[name]) for name in COMPONENTS] + [_size(total(memory))]


def _size(count: float) -> str:
    """Return bytes in GB, with three digits where they are few."""
    gigabytes = count / 1e9
    if gigabytes < 0.0005:
        return "0"
    return f"{gigabytes:.1f}" if gigabytes >= 1 else f"{gigabytes:.3f}"


def _fits(memory: Memory, room: float) -> str:
    return "fits" if total(memory) <= room else "does not fit"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
