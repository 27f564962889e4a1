"""`python -m vlbench plan recipe=... gpu=...`: memory, time and cost of a training, beforehand."""

from __future__ import annotations

from vlbench.command_line.overrides import format_override
from vlbench.config import recipe as recipes
from vlbench.data.reference_image import REFERENCE_NAME
from vlbench.planner.memory_estimate import MEMORY_COMPONENTS, MemoryByComponent, total_bytes
from vlbench.planner.options import PlanOptions
from vlbench.planner.stage_workload import ASSUMED_SUPERVISED_SHARE, StageWorkload
from vlbench.planner.training_plan import TrainingPlan, make_plan
from vlbench.text_tables import format_table
from vlbench.train.compile_choice import ASSUMED_TEXT_TOKENS
from vlbench.train.run_report import format_bytes, format_duration
from vlbench.train.view_report import describe_view_counts

YI_VL_DAYS = {"yi-6b": 3, "yi-34b": 10}
"""Approximate days of training on 128 A800, from Yi-VL's model card."""
YI_VL_GPUS = 128


def run_plan(options: PlanOptions) -> int:
    """Print the plan of a training, with `probe=true` dry-run it too; return the exit code."""
    recipe = options.recipe
    if options.probe:
        recipes.require_data(recipe.size, recipe.selected_data)
    print("\n".join(format_plan(make_plan(options))), flush=True)
    if not options.probe:
        return 0
    from vlbench.train.dry_run import dry_run
    from vlbench.train.stage_runner import StageRunner

    print("\nprobe: one step of every stage, longest batch first", flush=True)
    runner = StageRunner.from_recipe(recipe)
    return dry_run(runner, recipe.model, recipe.selected_data, recipe.last_stage_data)


def format_plan(plan: TrainingPlan) -> list[str]:
    """Return the lines of the whole plan."""
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
    options, recipe = plan.options, plan.options.recipe
    gpu, trainer = options.gpu, recipe.trainer
    nodes = f"{trainer.num_nodes} x " if trainer.num_nodes > 1 else ""
    lines = [
        f"plan of {recipe.recipe}, size {recipe.size}, on {nodes}{trainer.devices} {gpu.name} of "
        f"{format_bytes(gpu.memory_bytes)} and {gpu.flops_per_second / 1e12:.0f} TFLOP/s",
        f"precision {recipe.precision}, strategy {options.strategy}, checkpointing "
        f"{recipe.activation_checkpointing}; mfu={options.mfu:g} is assumed, communication is not "
        "counted",
    ]
    if plan.has_assumed_lengths:
        texts = ", ".join(f"{form} {tokens}" for form, tokens in ASSUMED_TEXT_TOKENS.items())
        image = REFERENCE_NAME if recipe.vision.has_views else "one image"
        lines.append(
            f"assumed: {image} per sample, and text tokens beside it ({texts}; "
            f"{ASSUMED_SUPERVISED_SHARE['chat']:.0%} of a chat supervised), unless text_tokens= "
            "gives others"
        )
    lines += [
        f"stage {name} is left out: its objective is not language" for name in plan.skipped_stages
    ]
    return lines


def _workload_lines(plan: TrainingPlan) -> list[str]:
    options = plan.options
    mode = _checkpointing_mode(plan)
    rows = [("stage", "samples", "tokens each", "steps", "micro-batches", "FLOPs", "time", "GPU h")]
    seconds = 0.0
    for name, work in plan.workloads.items():
        stage = options.recipe.stages[name]
        stage_seconds = _training_seconds(plan, work.total_flops(mode))
        seconds += stage_seconds
        rows.append(
            (
                name,
                f"{work.sample_count:,}",
                f"{work.mean_sample.token_count:.0f}",
                f"{work.steps:,}",
                str(
                    work.count_micro_batches(
                        stage.global_batch_size, options.world_size, plan.max_tokens_per_row[name]
                    )
                ),
                f"{work.total_flops('none'):.3g}",
                format_duration(stage_seconds),
                f"{stage_seconds * options.world_size / 3600:,.1f}",
            )
        )
    gpu_hours = seconds * options.world_size / 3600
    rows.append(("all", "", "", "", "", "", format_duration(seconds), f"{gpu_hours:,.1f}"))
    lines = format_table(rows, "<>")
    with_recompute = sum(work.total_flops(mode) for work in plan.workloads.values())
    without = sum(work.total_flops("none") for work in plan.workloads.values())
    if with_recompute > without:
        lines.append(
            f"checkpointing {mode} repeats {with_recompute / without - 1:.0%} of the FLOPs"
        )
    if options.recipe.vision.has_views:
        lines += [_describe_views(work) for work in plan.workloads.values()]
    price = options.gpu.price_per_hour
    if price is not None:
        lines.append(f"cost: {gpu_hours * price:,.0f} US dollars at {price:g} for a GPU hour")
    return lines


def _describe_views(work: StageWorkload) -> str:
    """Return how many views the images of a stage have, and what they take of a sample."""
    sample, counts = work.mean_sample, work.images_by_views
    views = describe_view_counts(counts) if counts else "no images"
    return (
        f"views of an image in {work.stage_name}: {views}; images, views and image positions of a "
        f"sample: {sample.image_count:.3g}, {sample.view_count:.3g}, {sample.image_positions:.4g}"
    )


def _memory_lines(plan: TrainingPlan) -> list[str]:
    strategy, mode = plan.options.strategy, _checkpointing_mode(plan)
    title = f"memory of a GPU at the peak, in GB; {plan.memory_budget / 1e9:.1f} are available"
    rows: list[tuple[str, ...]] = [
        ("stage", "max_tokens_per_row", *MEMORY_COMPONENTS, "sum", "", "fit")
    ]
    for name, stage in plan.stage_memory.items():
        row_tokens = plan.max_tokens_per_row[name]
        memory = stage.estimate_memory(strategy, mode, row_tokens)
        largest = stage.max_row_tokens(strategy, mode, row_tokens, plan.memory_budget)
        rows.append(
            (
                name,
                str(row_tokens),
                *_format_components(memory),
                _fit_label(memory, plan.memory_budget),
                str(largest),
            )
        )
    return [title, *format_table(rows, "<>"), "fit: the largest max_tokens_per_row that fits"]


def _strategy_lines(plan: TrainingPlan) -> list[str]:
    fewest_flops = min(estimate.total_flops for estimate in plan.strategy_estimates)
    rows: list[tuple[str, ...]] = [("strategy", "stage", *MEMORY_COMPONENTS, "sum", "", "time")]
    for estimate in plan.strategy_estimates:
        mode = estimate.checkpointing_mode
        rows.append(
            (
                f"{estimate.strategy} {mode}" if plan.options.world_size > 1 else mode,
                estimate.largest_stage,
                *_format_components(estimate.peak_memory),
                _fit_label(estimate.peak_memory, plan.memory_budget),
                f"x {estimate.total_flops / fewest_flops:.2f}",
            )
        )
    title = "strategies and checkpointing, at the stage that needs most"
    return [title, *format_table(rows, "<>"), *_sharding_lines(plan)]


def _sharding_lines(plan: TrainingPlan) -> list[str]:
    """Return when FSDP2 reduces the gradients of each stage, where it can be chosen."""
    if plan.options.world_size == 1:
        return []
    once = [name for name, stage in plan.stage_memory.items() if stage.reduces_once]
    often = [name for name in plan.stage_memory if name not in once]
    whens = {"once a step, whole until then": once, "in every micro-batch": often}
    told = "; ".join(f"{when}: {', '.join(names)}" for when, names in whens.items() if names)
    shards = plan.options.recipe.trainer.shard_count
    return [f"fsdp2 divides the model by {shards} and reduces gradients {told}"]


def _recommendation_lines(plan: TrainingPlan) -> list[str]:
    if plan.cheapest_fit is None:
        return [
            "nothing fits, not even one sample in a row: more GPUs (trainer.devices, "
            "trainer.num_nodes), a larger one (gpu), an adapter "
            "(stages.chat.train.language.lora.rank=64), or fewer trained parts"
        ]
    estimate, row_tokens = plan.cheapest_fit
    overrides = [f"trainer.strategy={estimate.strategy}"] if plan.options.world_size > 1 else []
    overrides += [f"activation_checkpointing={estimate.checkpointing_mode}"]
    overrides += [
        format_override(f"stages.{name}.max_tokens_per_row", tokens)
        for name, tokens in row_tokens.items()
    ]
    time = format_duration(_training_seconds(plan, estimate.total_flops))
    return [f"cheapest that fits, {time}: {' '.join(overrides)}"]


def _yi_vl_comparison(plan: TrainingPlan) -> list[str]:
    recipe = plan.options.recipe
    days = YI_VL_DAYS.get(recipe.language.name)
    is_yi_vl = recipe.recipe == "yivl_llava" and plan.workloads.keys() == recipe.stages.keys()
    if days is None or not is_yi_vl or plan.options.gpu.name != "A800":
        return []
    mode = _checkpointing_mode(plan)
    flops = sum(work.total_flops(mode) for work in plan.workloads.values())
    planned_days = _training_seconds(plan, flops) * plan.options.world_size / YI_VL_GPUS / 86400
    needed_mfu = plan.options.mfu * planned_days / days
    hint = f": mfu={needed_mfu:.2f} would give theirs" if needed_mfu <= 1 else ""
    return [
        f"Yi-VL's authors reported about {days} days on {YI_VL_GPUS} A800; this plan says "
        f"{planned_days:.1f} days on {YI_VL_GPUS}, at mfu={plan.options.mfu:g}{hint}"
    ]


def _checkpointing_mode(plan: TrainingPlan) -> str:
    """Return the recipe's checkpointing; for `auto` what training chooses.

    That is the cheapest that fits, and `full` where the model is sharded: it is not measured then
    (`train.auto_checkpointing`).
    """
    options = plan.options
    mode = options.recipe.activation_checkpointing
    if mode != "auto":
        return mode
    if options.strategy == "fsdp2" and options.world_size > 1:
        return "full"
    fitting = [
        estimate
        for estimate in plan.strategy_estimates
        if estimate.fits_memory and estimate.strategy == options.strategy
    ]
    if not fitting:
        return "full"
    return min(fitting, key=lambda estimate: estimate.total_flops).checkpointing_mode


def _training_seconds(plan: TrainingPlan, total_flops: float) -> float:
    return total_flops / (
        plan.options.gpu.flops_per_second * plan.options.mfu * plan.options.world_size
    )


def _format_components(memory: MemoryByComponent) -> list[str]:
    return [_format_gigabytes(memory[name]) for name in MEMORY_COMPONENTS] + [
        _format_gigabytes(total_bytes(memory))
    ]


def _format_gigabytes(byte_count: float) -> str:
    """Return bytes in GB, with three decimals below 1."""
    gigabytes = byte_count / 1e9
    if gigabytes < 0.0005:
        return "0"
    return f"{gigabytes:.1f}" if gigabytes >= 1 else f"{gigabytes:.3f}"


def _fit_label(memory: MemoryByComponent, memory_budget: float) -> str:
    return "fits" if total_bytes(memory) <= memory_budget else "does not fit"
