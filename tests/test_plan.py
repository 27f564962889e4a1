"""What a plan says, against what a training step really takes, and what it says to people."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlbench import recipe as recipes
from vlbench.data.batch import Batch
from vlbench.model.compose import compose
from vlbench.model.vlm import VLM
from vlbench.plan.depth import Rehearsals
from vlbench.plan.memory import Memory, Stage, total
from vlbench.plan.outline import outlined
from vlbench.plan.work import Work, work_of
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
def planned(recipe: str, stage: str) -> tuple[Stage, Work]:
    """Return a stage of a recipe as `plan` sees it."""
    resolved = recipes.load([f"recipe={recipe}"])
    vlm = outlined(resolved, stage)
    work, _ = work_of(resolved, stage, vlm, None, None)
    rehearsals = Rehearsals(vlm, functools.partial(outlined, resolved, stage), "32")
    return Stage(vlm, rehearsals, work.sample, 4, 1), work


@functools.cache
def ready(recipe: str, stage: str) -> tuple[VLM, Training, list[Batch]]:
    """Return the real model before a stage, and the fullest two micro-batches of its first step."""
    resolved = recipes.load([f"recipe={recipe}", f"stages.{stage}.batch=64"])
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


@pytest.mark.parametrize("recipe", CONNECTORS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["none", "full"])
def test_memory_is_what_a_step_takes(recipe, stage, way):
    stage_, _ = planned(recipe, stage)
    row = ready(recipe, stage)[2][-1].ids.numel()
    memory: Memory = stage_.memory("ddp", way, row)
    real = measured(recipe, stage, way)
    print(
        recipe,
        stage,
        way,
        f"{total(memory) / 1e6:.1f} planned {real / 1e6:.1f} measured",
        f"{total(memory) / real - 1:+.1%}",
    )
    assert total(memory) == pytest.approx(real, rel=0.1)
