"""What a plan says, against what a training step really takes, and what it says to people."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from test_flops import counted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlbench import recipe as recipes
from vlbench.__main__ import main
from vlbench.data.batch import Batch
from vlbench.model.compose import compose
from vlbench.model.flops import step_flops
from vlbench.model.recompute import WAYS
from vlbench.model.vlm import VLM
from vlbench.plan import show
from vlbench.plan.asked import parse
from vlbench.plan.depth import Rehearsals
from vlbench.plan.memory import STEP, StageMemory, total
from vlbench.plan.outline import Depth, Sample, outlined
from vlbench.plan.rehearsal import Rehearsal
from vlbench.plan.run import plan
from vlbench.plan.work import Work, operations_of, work_of
from vlbench.train.legs import plan as legs_of
from vlbench.train.legs import steps_of
from vlbench.train.module import Training, freeze

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")
STAGES = ("align_448", "chat")


@pytest.fixture(autouse=True)
def one_thread():
    """A CPU with more of them repeats keys for them, as no GPU does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def planned(recipe: str, stage: str) -> tuple[StageMemory, Work]:
    """Return a stage of a recipe as `plan` sees it."""
    resolved = recipes.load([f"recipe={recipe}"])
    vlm = outlined(resolved, stage)
    work, _ = work_of(resolved, stage, vlm, None, None)
    rehearsals = Rehearsals(vlm, functools.partial(outlined, resolved, stage), "32")
    return StageMemory(vlm, rehearsals, work.sample, 4, 1), work


@functools.cache
def ready(recipe: str, stage: str) -> tuple[VLM, Training, list[Batch]]:
    """Return the real model before a stage, and the fullest two micro-batches of its first step."""
    small = [f"stages.{stage}.batch=40", f"stages.{stage}.row_tokens=1000"]
    resolved = recipes.load([f"recipe={recipe}", *small])
    leg = next(leg for leg in legs_of(resolved) if leg.name == stage)
    vlm = compose(resolved, leg.stage.image_size)
    freeze(vlm, leg.stage)
    batches = sorted(steps_of(vlm, leg)[0].batches, key=lambda batch: batch.ids.numel())
    return vlm, Training(vlm, leg.stage, 1, 0, 0), batches[-2:]


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


def measured(recipe: str, stage: str, way: str) -> int:
    """Return the most bytes of tensors that live at a time in a step that is not the first."""
    vlm, training, batches = ready(recipe, stage)
    vlm.recompute(way)
    optimizer = training.configure_optimizers()
    living = Living()
    with living:
        for one in [*vlm.parameters(), *vlm.buffers()]:
            one.detach()
        for some in (batches[:1], batches):  # in the second step the optimizer has its moments
            for batch in some:
                out = vlm(batch)
                parts = [out.loss_sum, *(value for value, _ in out.extra.values())]
                torch.stack([part for part in parts if part is not None]).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return living.peak


MEASURED = [
    *(("yivl_llava", stage, way) for stage in STAGES for way in WAYS[::2]),
    ("yivl_qformer", "chat", "selective"),
    ("yivl_flamingo", "align_448", "full"),
    ("yivl_flamingo", "chat", "none"),
    ("yivl_eva", "align_448", "full"),
]


@pytest.mark.parametrize(("recipe", "stage", "way"), MEASURED)
def test_memory_is_what_a_step_takes(recipe, stage, way):
    row = ready(recipe, stage)[2][-1].ids.numel()
    memory = planned(recipe, stage)[0].memory("ddp", way, row)
    assert total(memory) == pytest.approx(measured(recipe, stage, way), rel=0.1)


@pytest.mark.parametrize("recipe", CONNECTORS[::2])
@pytest.mark.parametrize("stage", STAGES)
def test_operations_are_those_of_a_counted_step(recipe, stage):
    vlm, _, batches = ready(recipe, stage)
    vlm.recompute("none")
    lengths = [n for batch in batches for row in batch.lengths for n in row]
    pictures, learned = (sum(len(b.pixels) for b in batches), sum(b.tokens for b in batches))
    sample = Sample(*(one / len(lengths) for one in (sum(lengths), pictures, learned)))
    flops = step_flops(outlined(recipes.load([f"recipe={recipe}"]), stage))
    spared = flops.pair * sum(n * (n - 1) / 2 for n in lengths)  # torch counts all pairs
    ours = len(lengths) * operations_of(flops, sample) + spared
    assert ours == pytest.approx(counted(vlm, batches), rel=0.03)


def test_a_few_layers_tell_what_many_take():
    words = ["recipe=yivl_flamingo", "size=6b", "connector.every=1", "connector.depth=1"]
    resolved = recipes.load(words)
    many = Depth(8, 8)
    vlm = outlined(resolved, "chat", many)
    rehearsals = Rehearsals(vlm, lambda few: outlined(resolved, "chat", few or many), "bf16")
    assert len(rehearsals.depths) == 3
    row = Sample(300, 2, 100)
    shallow = rehearsals.take(row, "full")
    deep = max(Rehearsal(vlm, "bf16").take(row, "full").values(), key=lambda one: sum(one.values()))
    assert shallow == pytest.approx(deep, rel=1e-6)


def test_34b_is_trained_on_128_gpus_in_shards_alone():
    words = ["recipe=yivl_llava", "size=34b", "only=chat", "checkpointing=auto"]
    found = plan(parse([*words, "trainer.devices=8", "trainer.num_nodes=16"]))
    by_name = {(one.strategy, one.way): one for one in found.arrangements}
    assert not any(by_name["ddp", way].fits for way in WAYS)
    assert by_name["fsdp2", "full"].fits
    sizes = [total(by_name["fsdp2", way].memory) for way in WAYS]
    assert sizes == sorted(sizes, reverse=True)
    best = found.best
    assert best is not None and best[0].strategy == "fsdp2" and best[0].fits
    text = "\n".join(show.lines(found))
    assert f"trainer.strategy=fsdp2 checkpointing={best[0].way}" in text


@pytest.fixture
def no_rehearsals(monkeypatch):
    """Every micro-batch takes a megabyte for a token."""
    monkeypatch.setattr(
        Rehearsals, "take", lambda self, row, way: {"activations": 1e6 * row.length}
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
    words = ["recipe=yivl_llava", "gpu=small", f"gpus={table}", "stages.chat.row_tokens=2048"]
    assert main(["plan", *words, "only=chat"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "at 3 for a GPU hour" in out
    last = out.splitlines()[-1]
    assert last.startswith("cheapest that fits") and "stages.chat.row_tokens=1280" in last
    table.write_text("Small: {tflops: 100, memory: 0.05}\n")
    assert main(["plan", *words, "only=chat"]) == 0
    assert "nothing fits" in capsys.readouterr().out.splitlines()[-1]


def test_the_largest_row_just_fits():
    stage, _ = planned("yivl_llava", "chat")
    room = total(stage.memory("ddp", "none", 3000))
    most = stage.largest("ddp", "none", 1000, room)
    assert 3000 - 2 * STEP <= most <= 3000 and total(stage.memory("ddp", "none", most)) <= room
    assert stage.largest("ddp", "none", 1000, 1e6) == 0


def test_lengths_and_numbers_can_be_given(no_rehearsals):
    words = ["recipe=yivl_llava", "size=6b", "samples=1e6,2e6,3e6", "text_tokens=100"]
    works = plan(parse(words)).works
    assert [round(works[name].samples, -4) for name in works] == [1_000_000, 2_000_000, 6_000_000]
    assert [works[name].sample.length for name in works] == [356, 1124, 1124]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("gpu=a801", "Did you mean 'A800'?"),
        ("gpuu=a800", "Did you mean 'gpu'?"),
        ("mfu=40", "allowed are numbers from 0.001 to 1"),
        ("samples=1,2", "one for each of align_224, align_448, chat"),
        ("text_tokens=many", "text_tokens is 'many'"),
        ("price=-1", "price is '-1'"),
        ("stages.chatt.steps=1", "Did you mean 'chat'?"),
        ("gpus=none.yaml", "none.yaml"),
    ],
)
def test_a_mistake_is_one_line(word, said, capsys):
    assert main(["plan", "recipe=yivl_llava", word]) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize("row", ["{tflops: 1}", "{tflops: 0, memory: 1}", "{tflop: 1, memory: 1}"])
def test_a_table_that_cannot_be_used_is_refused(row, tmp_path, capsys):
    table = tmp_path / "gpus.yaml"
    table.write_text(f"Mine: {row}\n")
    assert main(["plan", "recipe=yivl_llava", "gpu=mine", f"gpus={table}"]) == 2
    assert "Mine" in capsys.readouterr().err


def test_a_probe_tries_a_step(no_rehearsals, capsys):
    words = ["recipe=yivl_llava", "only=chat", "stages.chat.batch=1", "probe=true"]
    assert main(["plan", *words]) == 0
    assert "dry run done" in capsys.readouterr().out
