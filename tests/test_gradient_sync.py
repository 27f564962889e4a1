"""When sharded models exchange gradients, and that it changes no number."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from forked_processes import run_in_processes
from random_vlm import make_batch, make_sample, small_vlm
from safetensors.torch import load_file
from test_checkpoint_writing import write_all
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from vlbench.config import recipe as recipes
from vlbench.connector import registry
from vlbench.data.filler_batches import empty_batch
from vlbench.data.optimizer_step import OptimizerStep
from vlbench.data.packing import PackedBatch
from vlbench.distributed.collectives import gather_full_tensor
from vlbench.distributed.process_group import check_neighbours
from vlbench.errors import UserError
from vlbench.model.fsdp_wrapping import apply_fsdp, build_shard_mesh, fsdp_units
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.replicated_parameters import clip_gradients, split_by_sharding
from vlbench.model.weights.tensor_files import LazyTensors
from vlbench.train import gradient_sync, training_module
from vlbench.train.gradient_sync import defer_gradient_sync, reduces_once_per_step
from vlbench.train.optimizer_state import named_optimizer_state, restore_optimizer_state
from vlbench.train.step_report import StepReport

MICRO_BATCHES = 8
EXCHANGES = ("all_reduce", "reduce_scatter", "all_gather")


def open_vlm(dtype: torch.dtype = torch.float64) -> LoadedVLM:
    """Return a small model with frozen parts: the vision encoder, and one decoder layer."""
    torch.manual_seed(0)
    vlm = small_vlm(registry.load_connector("linear")).to(dtype)
    vlm.vision.requires_grad_(False)
    vlm.language.model.layers[0].requires_grad_(False)
    return vlm


def micro_batches(
    vlm: LoadedVLM, rank: int, dtype: torch.dtype, most: int = 4
) -> list[PackedBatch]:
    """Return those of a process: text alone in some, and fewer in the second, so empty ones."""
    count = most - 2 * rank
    samples = [make_sample(1 + 10 * rank + n, images=n % 3) for n in range(count)]
    batches = [make_batch(vlm, [[sample]]).to("cpu", dtype) for sample in samples]
    return [*batches, *(empty_batch() for _ in range(most - count))]


def accumulate(
    vlm: LoadedVLM, batches: list[PackedBatch], scale: float, reduces_once: bool | None
) -> None:
    """Add up gradients; with None every pass exchanges them, as in one process."""
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with (
            contextlib.nullcontext()
            if is_last or reduces_once is None
            else defer_gradient_sync(None, vlm.model, reduces_once)  # type: ignore[arg-type]
        ):
            (vlm.model(batch).loss_sum * scale).backward()


def whole_gradients(vlm: LoadedVLM) -> dict[str, Tensor]:
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in vlm.model.named_parameters()
        if p.grad is not None
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, as a share of its largest number."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max()) / max(1e-9, float(theirs[name].abs().max()))
        for name in ours
        if not name.endswith("k_proj.bias")
    )


def compare_ways(rank: int) -> dict[str, float]:
    """Return how far the gradients of each way are from those of one process, by way."""
    world, dtype = distributed.get_world_size(), torch.float64
    alone = open_vlm()
    for other in range(2):
        accumulate(alone, micro_batches(alone, other, dtype), 1.0, None)
    expected, found = whole_gradients(alone), {}
    for shard_count in {world, world // 2}:
        for way in (None, True, False):
            vlm = open_vlm()
            apply_fsdp(vlm.model, build_shard_mesh("cpu", shard_count))
            batches = micro_batches(vlm, rank % 2, dtype)
            accumulate(vlm, batches, 2.0, way)  # of `world` processes, world / 2 pairs are alike
            found[f"{shard_count} {way}"] = largest_difference(whole_gradients(vlm), expected)
    return found


def test_deferred_gradients_are_those_of_one_process() -> None:
    """In float64, so that nothing but the order of sums is left; with replicas and without."""
    for differences in run_in_processes(compare_ways, 4):
        assert max(differences.values()) < 1e-12, differences


def compare_in_bf16(rank: int) -> float:
    """Return how far the gradients of one reduction are from those of eight, in bfloat16."""
    gradients = []
    for way in (None, True):
        vlm = open_vlm(torch.float32)
        apply_fsdp(vlm.model, build_shard_mesh("cpu", 2), bf16=True)
        accumulate(vlm, micro_batches(vlm, rank, torch.float32), 1.0, way)
        gradients.append(whole_gradients(vlm))
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1].values())
    return largest_difference(gradients[1], gradients[0])


def test_gradients_of_bf16_passes_are_added_up_in_float32() -> None:
    assert max(run_in_processes(compare_in_bf16)) < 2e-6


def stepped(vlm: LoadedVLM) -> tuple[float, torch.optim.AdamW]:
    """Clip the gradients and take a step; return their norm, and the optimizer."""
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    norm = clip_gradients(trained, 0.1)
    groups = [{"params": group} for group in split_by_sharding(trained)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    optimizer.step()
    return norm, optimizer


def step_save_and_load(rank: int, folder: Path) -> float:
    """Step with two replicas of two shards each, write both states and load them again."""
    vlm = open_vlm()
    apply_fsdp(vlm.model, build_shard_mesh("cpu", 2))
    accumulate(vlm, micro_batches(vlm, rank % 2, torch.float64), 2.0, True)
    norm, optimizer = stepped(vlm)
    state = dict(named_optimizer_state(vlm.model, optimizer))
    write_all({**vlm.model.state_dict(), **state}, folder).finish()
    distributed.barrier()
    other = open_vlm()
    apply_fsdp(other.model, build_shard_mesh("cpu", 4))
    trained = [p for p in other.model.parameters() if p.requires_grad]
    fresh = torch.optim.AdamW([{"params": group} for group in split_by_sharding(trained)])
    files = LazyTensors([folder / "model.safetensors"])
    restore_optimizer_state(other.model, fresh, {name: files[name] for name in state})
    for name, value in named_optimizer_state(other.model, fresh):
        assert torch.equal(gather_full_tensor(value), files[name]), name
    return norm


def test_replicas_of_shards_step_save_and_load_as_one_process(tmp_path: Path) -> None:
    alone = open_vlm()
    for other in range(2):
        accumulate(alone, micro_batches(alone, other, torch.float64), 1.0, None)
    norm, optimizer = stepped(alone)
    norms = run_in_processes(lambda rank: step_save_and_load(rank, tmp_path), 4)
    assert norms == pytest.approx([norm] * 4, rel=1e-12)
    found = load_file(tmp_path / "model.safetensors")
    expected = {**alone.model.state_dict(), **dict(named_optimizer_state(alone.model, optimizer))}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("exp_avg"):  # a step of AdamW makes numbers of what is zero in truth
            scale = float(value.abs().max())
            assert float((found[name] - value).abs().max()) <= 1e-9 * scale + 1e-15, name


@contextlib.contextmanager
def fake_processes(world_size: int) -> Iterator[None]:
    """Let this process be the first of many whose exchanges do nothing."""
    distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


class ExchangeCounter(TorchDispatchMode):
    """Counts exchanges between processes by kind, as `CommDebugMode` does.

    That one also follows modules by hooks, which are left behind in torch 2.11.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it makes exchanges of plain tensors first
        if "c10d" in func.namespace:
            name = func.__name__.replace("_", "")
            self.counts.update(kind for kind in EXCHANGES if kind.replace("_", "") in name)
        return func(*args, **(kwargs or {}))


def count_exchanges(shard_count: int, reduces_once: bool | None) -> Counter[str]:
    """Return how many exchanges a step of 8 micro-batches has, by kind."""
    vlm = open_vlm(torch.float32)
    apply_fsdp(vlm.model, build_shard_mesh("cpu", shard_count), bf16=True)
    batches = micro_batches(vlm, 0, torch.float32, MICRO_BATCHES)
    with ExchangeCounter() as counter:
        accumulate(vlm, batches, 1.0, reduces_once)
    return counter.counts


def test_eight_micro_batches_reduce_once() -> None:
    vlm = open_vlm()
    trained_units = sum(
        any(p.requires_grad for p in unit.parameters()) for unit in (*fsdp_units(vlm.model),)
    )
    with fake_processes(8):
        always, once = count_exchanges(8, None), count_exchanges(8, True)
        assert always["reduce_scatter"] == MICRO_BATCHES * (trained_units + 1)
        assert once["reduce_scatter"] == trained_units + 1  # and what is in no unit
        assert always["all_reduce"] == MICRO_BATCHES and once["all_reduce"] == 1  # of norms
        assert once["all_gather"] == always["all_gather"] - (MICRO_BATCHES - 1)
        by_shards = count_exchanges(4, False)  # two replicas, sharded gradients meanwhile
        assert by_shards["reduce_scatter"] == always["reduce_scatter"]
        assert by_shards["all_reduce"] == trained_units + 1 + 1


def test_whole_gradients_are_kept_where_they_are_a_quarter_of_the_memory() -> None:
    h200, a100 = 150e9, 85e9
    assert reduces_once_per_step("auto", 26.8e9, h200)
    assert not reduces_once_per_step("auto", 26.8e9, a100)
    assert not reduces_once_per_step("auto", 137e9, h200)
    assert reduces_once_per_step("step", 137e9, h200)
    assert not reduces_once_per_step("micro_batch", 1e6, h200)
    assert reduces_once_per_step("auto", 1e9, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.shard_within_node=true"], "needs strategy=fsdp2"),
        (["trainer.reduce_gradients=step", "trainer.strategy=ddp"], "needs strategy=fsdp2"),
        (["trainer.shard_within_node=true", "trainer.strategy=fsdp2"], "devices=1"),
        (["trainer.reduce_gradients=steps", "trainer.strategy=fsdp2"], "micro_batch"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        recipes.load_recipe(["recipe=yivl_llava", *words])
    assert "\n" not in str(refusal.value)


def test_neighbours_have_to_be_on_one_machine() -> None:
    check_neighbours(["a", "a", "b", "b"], 2)
    with pytest.raises(UserError, match="ranks 0 to 1 are on a, b"):
        check_neighbours(["a", "b", "a", "b"], 2)


def test_a_stage_defers_all_but_the_last_micro_batch(monkeypatch) -> None:
    """The training module asks for it, whatever the strategy is."""
    events: list[str] = []

    @contextlib.contextmanager
    def defer(trainer: pl.Trainer, vlm: Any, reduces_once: bool) -> Iterator[None]:
        events.append("defer")
        yield

    monkeypatch.setattr(training_module, "defer_gradient_sync", defer)
    assert gradient_sync.defer_gradient_sync is not defer
    vlm = open_vlm(torch.float32)
    stage = recipes.load_recipe(["recipe=yivl_llava"]).stages["chat"]
    training = training_module.VLMTrainingModule(vlm.model, stage, 1, 0, seed=3)
    training._trainer = object()  # type: ignore[assignment]
    monkeypatch.setattr(training, "manual_backward", lambda loss: events.append("backward"))
    step = OptimizerStep(0, micro_batches(vlm, 0, torch.float32)[:3])
    training._accumulate_gradients(step, step.counts, StepReport(0), None)
    assert events == ["defer", "backward", "defer", "backward", "backward"]


def first_loss_in_bf16(rank: int) -> tuple[float, float]:
    """Return the loss of one process and that of two that share the model, both in bfloat16."""
    losses = []
    for is_sharded in (False, True):
        vlm = open_vlm(torch.float32)
        if is_sharded:
            apply_fsdp(vlm.model, build_shard_mesh("cpu", 2), bf16=True)
        samples = [make_sample(n, images=1 + n % 2) for n in range(4)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            losses.append(float(vlm.model(make_batch(vlm, [samples])).loss_sum))
    return losses[0], losses[1]


def test_norms_are_float32_so_the_loss_is_that_of_one_process() -> None:
    for alone, together in run_in_processes(first_loss_in_bf16):
        assert together == pytest.approx(alone, rel=1e-6), (alone, together)
