"""What a plan says, against what a training step really takes, and what it says to people."""

from __future__ import annotations

import functools
import json
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_train_flops import counted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlbench.__main__ import main
from vlbench.config import recipe as recipes
from vlbench.config.schema import Recipe
from vlbench.data.packing import PackedBatch
from vlbench.model.activation_checkpointing import CHECKPOINTING_MODES
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_step_flops
from vlbench.model.vision_config import EMBEDDED_ENCODERS, OPEN_CLIP_CONFIG
from vlbench.planner import plan_command
from vlbench.planner.memory_estimate import (
    ROW_TOKENS_STEP,
    Sharding,
    StageMemory,
    persistent_memory,
    total_bytes,
)
from vlbench.planner.meta_model import ModelDepth, SampleShape, build_meta_vlm
from vlbench.planner.options import parse_plan_options
from vlbench.planner.simulate_step import DepthExtrapolator, StepSimulator
from vlbench.planner.stage_workload import (
    StageWorkload,
    sample_flops,
    stage_samples,
    stage_workload,
)
from vlbench.planner.training_plan import StrategyEstimate, cheapest_strategy, make_plan
from vlbench.text_files import read_json
from vlbench.train.auto_checkpointing import run_micro_batch
from vlbench.train.stage_plan import build_stage_steps, plan_stage_runs
from vlbench.train.trainable_parts import freeze_untrained_parts
from vlbench.train.training_module import VLMTrainingModule

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
STAGES = ("align_448", "chat")


@pytest.fixture(autouse=True)
def one_thread():
    """A CPU with more of them repeats keys for them, as no GPU does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def meta_vlm(recipe: Recipe, stage: str, depth: ModelDepth | None = None) -> LoadedVLM:
    """Return the model of a recipe's stage as `plan` builds it."""
    return build_meta_vlm(recipe.model, stage, recipe.stages[stage], recipe.precision, depth)


@functools.cache
def planned(recipe: str, stage: str, precision: str = "32") -> tuple[StageMemory, StageWorkload]:
    """Return a stage of a recipe as `plan` sees it."""
    resolved = recipes.load_recipe([f"recipe={recipe}"])
    vlm = meta_vlm(resolved, stage)
    samples = stage_samples(resolved.stage_data(stage), vlm.processor, None, None)
    work = stage_workload(stage, resolved.stages[stage], vlm.model, samples)
    rehearsals = DepthExtrapolator(
        vlm.model, functools.partial(meta_vlm, resolved, stage), precision
    )
    number_bytes = 4 if precision == "32" else 2
    return StageMemory(vlm.model, rehearsals, work.mean_sample, number_bytes, Sharding()), work


@functools.cache
def ready(recipe: str, stage: str) -> tuple[LoadedVLM, VLMTrainingModule, list[PackedBatch]]:
    """Return the real model before a stage, and the fullest two micro-batches of its first step."""
    small = [f"stages.{stage}.global_batch_size=40", f"stages.{stage}.max_tokens_per_row=1000"]
    resolved = recipes.load_recipe([f"recipe={recipe}", *small])
    stage_run = next(
        run
        for run in plan_stage_runs(resolved.selected_data, resolved.last_stage_data)
        if run.name == stage
    )
    vlm = build_vlm(resolved.model, stage_run.stage.image_size)
    freeze_untrained_parts(vlm.model, stage_run.stage)
    batches = sorted(
        build_stage_steps(vlm.processor, stage_run)[0].micro_batches,
        key=lambda batch: batch.input_ids.numel(),
    )
    return vlm, VLMTrainingModule(vlm.model, stage_run.stage, 1, 0, 0), batches[-2:]


class Living(TorchDispatchMode):
    """Counts the bytes of all real tensors that operations read or make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, made)):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self.known:
                self.note(one.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.bytes -= size


def measured(recipe: str, stage: str, way: str, precision: str = "32") -> int:
    """Return the most bytes of tensors that live at a time in a step that is not the first."""
    vlm, training, batches = ready(recipe, stage)
    vlm.model.enable_activation_checkpointing(way)
    (optimizer,), _ = training.configure_optimizers()
    living = Living()
    with living:
        for one in [*vlm.parameters(), *vlm.model.buffers()]:
            one.detach()
        for some in (batches[:1], batches):  # in the second step the optimizer has its moments
            for batch in some:
                run_micro_batch(vlm.model, batch, precision == "bf16")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return living.peak


MEASURED = [
    *(("yivl_llava", stage, way) for stage in STAGES for way in CHECKPOINTING_MODES[::2]),
    ("yivl_qformer", "chat", "selective"),
    ("yivl_flamingo", "align_448", "full"),
    ("yivl_flamingo", "chat", "none"),
    ("yivl_eva", "align_448", "full"),
    ("yivl_deepstack", "chat", "selective"),
]


@pytest.mark.parametrize(("recipe", "stage", "way"), MEASURED)
def test_memory_is_what_a_step_takes(recipe, stage, way):
    row = ready(recipe, stage)[2][-1].input_ids.numel()
    memory = planned(recipe, stage)[0].estimate_memory("ddp", way, row)
    assert total_bytes(memory) == pytest.approx(measured(recipe, stage, way), rel=0.1)


@pytest.mark.parametrize("way", CHECKPOINTING_MODES)
def test_memory_in_mixed_precision_is_what_a_step_takes(way):
    row = ready("yivl_llava", "chat")[2][-1].input_ids.numel()
    memory = planned("yivl_llava", "chat", "bf16")[0].estimate_memory("ddp", way, row)
    found = measured("yivl_llava", "chat", way, "bf16")
    assert total_bytes(memory) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("recipe", CONNECTORS[::2])
@pytest.mark.parametrize("stage", STAGES)
def test_operations_are_those_of_a_counted_step(recipe, stage):
    vlm, _, batches = ready(recipe, stage)
    vlm.model.enable_activation_checkpointing("none")
    lengths = [n for batch in batches for row in batch.sample_lengths for n in row]
    images, learned = (
        sum(len(b.pixels) for b in batches),
        sum(b.supervised_token_count for b in batches),
    )
    places = images * vlm.model.connector.tokens_per_image
    totals = (sum(lengths), images, images, places, learned)
    sample = SampleShape(*(one / len(lengths) for one in totals))
    flops = count_step_flops(meta_vlm(recipes.load_recipe([f"recipe={recipe}"]), stage).model)
    spared = flops.per_attended_pair * sum(
        n * (n - 1) / 2 for n in lengths
    )  # torch counts all pairs
    ours = len(lengths) * sample_flops(flops, sample) + spared
    assert ours == pytest.approx(counted(vlm, batches), rel=0.03)


def test_a_few_layers_tell_what_many_take():
    words = ["recipe=yivl_flamingo", "size=6b", "connector.every=1", "connector.depth=1"]
    resolved = recipes.load_recipe(words)
    many = ModelDepth(8, 8)
    vlm = meta_vlm(resolved, "chat", many)
    rehearsals = DepthExtrapolator(
        vlm.model, lambda few: meta_vlm(resolved, "chat", few or many), "bf16"
    )
    assert len(rehearsals.simulated_depths) == 3
    row = SampleShape(300, 2, 2, 2 * vlm.connector.tokens_per_image, 100)
    shallow = rehearsals.peak_memory(row, "full")
    deep = max(
        StepSimulator(vlm.model, "bf16").simulate_step(row, "full").values(),
        key=lambda one: sum(one.values()),
    )
    assert shallow == pytest.approx(deep, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "mode", "depth", "simulated"),
    [
        (["connector.blocks=[-1,0,1]"], "none", ModelDepth(12, 13), [(4, 4), (5, 4), (4, 5)]),
        ([], "selective", ModelDepth(4, 12), [(4, 4), (4, 5)]),
        (["second"], "full", ModelDepth(4, 12, 12), [(4, 4, 4), (4, 5, 4), (4, 4, 5)]),
    ],
    ids=["blocks by number", "a shallow language model", "two encoders"],
)
def test_a_few_blocks_tell_what_many_take_where_a_connector_names_them(
    words, mode, depth, simulated, tmp_path
):
    known = read_json(EMBEDDED_ENCODERS["tiny"] / OPEN_CLIP_CONFIG)
    known["model_cfg"]["vision_cfg"]["layers"] = 13
    (tmp_path / OPEN_CLIP_CONFIG).write_text(json.dumps(known))
    encoders = [f"vision.name={tmp_path}", "vision.weights=random"]
    if words == ["second"]:
        words = [f"vision.second.name={tmp_path}", "vision.second.weights=random"]
    resolved = recipes.load_recipe(["recipe=yivl_deepstack", *encoders, *words])
    vlm = meta_vlm(resolved, "chat", depth)
    assert {len(set(one.output_blocks)) for one in vlm.model.vision.encoders()} == {4}
    rehearsals = DepthExtrapolator(
        vlm.model, lambda few: meta_vlm(resolved, "chat", few or depth), "bf16"
    )
    assert [tuple(filter(None, one)) for one in rehearsals.simulated_depths] == simulated
    row = SampleShape(300, 2, 2, 2 * vlm.connector.tokens_per_image, 100)
    deep = StepSimulator(vlm.model, "bf16").simulate_step(row, mode).values()
    deepest = max(deep, key=lambda one: sum(one.values()))
    assert rehearsals.peak_memory(row, mode) == pytest.approx(deepest, rel=1e-6)


def test_frozen_weights_of_files_take_two_bytes_unless_they_are_sharded():
    words = ["recipe=yivl_llava", "size=34b", "stages.chat.train.language.lora.rank=16"]
    words += ["stages.chat.train.vision=null"]
    vlm = meta_vlm(recipes.load_recipe(words), "chat", ModelDepth(2, 2)).model
    layers = sum(p.numel() for p in vlm.language.model.layers.parameters() if not p.requires_grad)
    held = persistent_memory(vlm, "ddp", Sharding(2, 2), 2)["weights"]
    sharded = persistent_memory(vlm, "fsdp2", Sharding(2, 2), 2)["weights"]
    assert 2 * sharded - held == pytest.approx(2 * layers + 2 * 64000 * 7168, rel=1e-3)


def test_34b_is_trained_on_128_gpus_in_shards_alone():
    words = ["recipe=yivl_llava", "size=34b", "only=chat", "activation_checkpointing=auto"]
    found = make_plan(parse_plan_options([*words, "trainer.devices=8", "trainer.num_nodes=16"]))
    by_name = {(one.strategy, one.checkpointing_mode): one for one in found.strategy_estimates}
    assert not any(by_name["ddp", way].fits_memory for way in CHECKPOINTING_MODES)
    assert by_name["fsdp2", "full"].fits_memory
    sizes = [total_bytes(by_name["fsdp2", way].peak_memory) for way in CHECKPOINTING_MODES]
    assert sizes == sorted(sizes, reverse=True)
    best = found.cheapest_fit
    assert best is not None and best[0].strategy == "fsdp2" and best[0].fits_memory
    text = "\n".join(plan_command.format_plan(found))
    assert f"trainer.strategy=fsdp2 activation_checkpointing={best[0].checkpointing_mode}" in text


@pytest.fixture
def no_rehearsals(monkeypatch):
    """Every micro-batch takes a megabyte for a token."""
    monkeypatch.setattr(
        DepthExtrapolator,
        "peak_memory",
        lambda self, row, way: {"activations": 1e6 * row.token_count},
    )


@pytest.mark.parametrize(("size", "days"), [("6b", 3), ("34b", 10)])
def test_days_stand_beside_those_that_were_reported(size, days, no_rehearsals, capsys):
    words = ["recipe=yivl_llava", f"size={size}", "trainer.devices=8", "trainer.num_nodes=16"]
    assert main(["plan", *words, "gpu=a800", "price=2"]) == 0
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    assert f"reported about {days} days on 128 A800" in last
    ours = float(last.split("this plan says ")[1].split(" days")[0])
    assert days / 3 < ours < 1.5 * days
    assert "US dollars at 2 for a GPU hour" in out and "assumed" in out


def test_rows_become_shorter_where_nothing_fits_otherwise(no_rehearsals, tmp_path, capsys):
    table = tmp_path / "gpus.yaml"
    table.write_text("Small: {tflops: 100, memory: 1.5, price: 3}\n")
    words = [
        "recipe=yivl_llava",
        "gpu=small",
        f"gpus={table}",
        "stages.chat.max_tokens_per_row=2048",
    ]
    assert main(["plan", *words, "only=chat"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "at 3 for a GPU hour" in out
    last = out.splitlines()[-1]
    assert last.startswith("cheapest that fits") and "stages.chat.max_tokens_per_row=1280" in last
    table.write_text("Small: {tflops: 100, memory: 0.05}\n")
    assert main(["plan", *words, "only=chat"]) == 0
    assert "nothing fits" in capsys.readouterr().out.splitlines()[-1]


def test_the_largest_row_just_fits():
    stage, _ = planned("yivl_llava", "chat")
    room = total_bytes(stage.estimate_memory("ddp", "none", 3000))
    most = stage.max_row_tokens("ddp", "none", 1000, room)
    assert (
        3000 - 2 * ROW_TOKENS_STEP <= most <= 3000
        and total_bytes(stage.estimate_memory("ddp", "none", most)) <= room
    )
    assert stage.max_row_tokens("ddp", "none", 1000, 1e6) == 0


def test_rows_are_searched_only_where_every_stage_may_fit():
    searched: list[int] = []

    def stage(holds_model: bool, rows: int) -> Any:
        return SimpleNamespace(
            holds_model=lambda *_: holds_model,
            max_row_tokens=lambda *_: searched.append(rows) or rows,
        )

    estimate = StrategyEstimate("ddp", "full", {}, "b", 1.0, fits_memory=False)
    short, tokens = stage(True, 1000), {"a": 2000, "b": 2000}

    def cheapest(largest: Any) -> Any:
        return cheapest_strategy([estimate], {"a": short, "b": largest}, tokens, 1.0)

    assert cheapest(stage(False, 9)) is None and searched == []
    assert cheapest(stage(True, 0)) is None and searched == [0]
    assert cheapest(stage(True, 4000)) == (estimate, {"a": 1000})


def test_lengths_and_numbers_can_be_given(no_rehearsals):
    words = ["recipe=yivl_llava", "size=6b", "samples=1e6,2e6,3e6", "text_tokens=100"]
    works = make_plan(parse_plan_options(words)).workloads
    assert [round(works[name].sample_count, -4) for name in works] == [
        1_000_000,
        2_000_000,
        6_000_000,
    ]
    assert [works[name].mean_sample.token_count for name in works] == [356, 1124, 1124]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpu=a801", "Did you mean 'A800'?"),
        ("gpuu=a800", "Did you mean 'gpu'?"),
        ("mfu=40", "mfu must be at most 1, given 40"),
        ("samples=1,2", "one for each of align_224, align_448, chat"),
        ("text_tokens=many", "text_tokens is 'many'"),
        ("price=-1", "price must be at least 0, given -1"),
        ("stages.chatt.steps=1", "Did you mean 'chat'?"),
        ("gpus=none.yaml", "none.yaml"),
    ],
)
def test_a_mistake_is_one_line(word, said, capsys):
    assert main(["plan", "recipe=yivl_llava", word]) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 1 and not out


def test_stages_without_a_step_are_no_part_of_the_plan(no_rehearsals, capsys):
    assert main(["plan", "recipe=yivl_llava", "stages.chat.steps=0"]) == 0
    assert "align_448" in (said := capsys.readouterr().out) and "chat" not in said
    assert main(["plan", "recipe=yivl_llava", "only=chat", "stages.chat.epochs=0"]) == 2
    assert "no stage to plan" in capsys.readouterr().err


@pytest.mark.parametrize("row", ["{tflops: 1}", "{tflops: 0, memory: 1}", "{tflop: 1, memory: 1}"])
def test_a_table_that_cannot_be_used_is_refused(row, tmp_path, capsys):
    table = tmp_path / "gpus.yaml"
    table.write_text(f"Mine: {row}\n")
    assert main(["plan", "recipe=yivl_llava", "gpu=mine", f"gpus={table}"]) == 2
    assert "Mine" in capsys.readouterr().err


def test_a_probe_tries_a_step(no_rehearsals, capsys):
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.global_batch_size=1", "probe=true"]
    assert main(["plan", *words]) == 0
    assert "dry run done" in capsys.readouterr().out


def test_the_plan_knows_what_fsdp2_keeps_whole():
    words = ["recipe=yivl_llava", "size=6b", "only=chat", "trainer.strategy=fsdp2"]
    words += ["trainer.devices=8", "trainer.num_nodes=2"]
    vlm = meta_vlm(recipes.load_recipe(words), "chat").model
    freeze_untrained_parts(vlm, recipes.load_recipe(words).stages["chat"])
    trained = 4 * sum(p.numel() for p in vlm.parameters() if p.requires_grad)

    def gradients(*settings: str) -> float:
        trainer = recipes.load_recipe([*words, *settings]).trainer
        sharding = Sharding(16, trainer.shard_count, trainer.reduce_gradients, 150e9)
        memory = persistent_memory(vlm, "fsdp2", sharding, 2)
        assert memory["optimizer"] == 2 * trained / trainer.shard_count
        return memory["gradients"]

    assert gradients() == trained and 20e9 < trained < 30e9
    assert gradients("trainer.reduce_gradients=micro_batch") == trained / 16
    within = ("trainer.shard_within_node=true", "trainer.reduce_gradients=micro_batch")
    assert gradients(*within) == trained / 8
    assert persistent_memory(vlm, "ddp", Sharding(16, 8), 2)["gradients"] == trained


def test_shards_are_recomputed_in_full_as_training_does_where_it_may_choose(no_rehearsals, capsys):
    words = ["recipe=yivl_llava", "size=6b", "only=chat", "activation_checkpointing=auto"]
    words += ["trainer.devices=8", "gpu=h200"]
    assert main(["plan", *words]) == 0
    assert "repeats" not in capsys.readouterr().out  # replicas are measured, and fit as they are
    assert main(["plan", *words, "trainer.strategy=fsdp2"]) == 0
    assert "checkpointing full repeats" in capsys.readouterr().out
