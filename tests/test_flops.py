"""The operations that a step needs, against torch's own counter of what a step does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlbench import recipe as recipes
from vlbench.data.batch import Batch
from vlbench.model.compose import compose
from vlbench.model.flops import counter, step_flops
from vlbench.model.vlm import VLM
from vlbench.train.legs import plan, steps_of
from vlbench.train.module import freeze

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")


def ready(recipe: str, stage: str, *words: str) -> tuple[VLM, list[Batch]]:
    """Return the miniature before a stage, and the micro-batches of its first step."""
    resolved = recipes.load([f"recipe={recipe}", f"stages.{stage}.batch=4", *words])
    leg = next(leg for leg in plan(resolved) if leg.name == stage)
    vlm = compose(resolved, leg.stage.image_size)
    freeze(vlm, leg.stage)
    return vlm, steps_of(vlm, leg)[0].batches


def counted(vlm: VLM, batches: list[Batch]) -> float:
    """Return what torch counts in forward and backward of the language loss."""
    counting = counter()
    with counting:
        for batch in batches:
            visual = vlm.visual(batch)
            vlm.loss(vlm.hidden(batch, visual), batch.labels).backward()
    return counting.get_total_flops()


@pytest.mark.parametrize("recipe", CONNECTORS)
@pytest.mark.parametrize("stage", ["align_448", "chat"])
def test_a_step_takes_what_torch_counts(recipe, stage):
    vlm, batches = ready(recipe, stage)
    ours = step_flops(vlm).of(batches, causal=False)
    assert ours == pytest.approx(counted(vlm, batches), rel=0.03)


def test_what_is_frozen_takes_less():
    vlm, batches = ready("yivl_llava", "chat")
    whole = step_flops(vlm)
    vlm.vision.requires_grad_(False)
    frozen_tower = step_flops(vlm)
    assert frozen_tower.image < whole.image and frozen_tower.position == whole.position
    vlm.language.requires_grad_(False)
    aligned = step_flops(vlm)  # gradients pass through, weights have none
    assert aligned.position == pytest.approx(whole.position * 2 / 3)
    vlm.connector.requires_grad_(False)
    assert step_flops(vlm).position == pytest.approx(whole.position / 3)


def test_known_features_spare_the_tower():
    vlm, batches = ready("yivl_llava", "align_448", "stages.align_448.train.vision=null")
    flops = step_flops(vlm)
    kept = [
        dataclasses.replace(batch, features=torch.zeros(len(batch.pixels), 1, 1))
        for batch in batches
    ]
    images = sum(len(batch.pixels) for batch in batches)
    assert flops.of(batches) - flops.of(kept) == pytest.approx(flops.tower * images)


def test_half_of_attention_is_not_needed():
    vlm, batches = ready("yivl_llava", "chat")
    flops = step_flops(vlm)
    lengths = [n for batch in batches for row in batch.lengths for n in row]
    spared = flops.of(batches, causal=False) - flops.of(batches)
    assert spared == pytest.approx(flops.pair * sum(n * (n - 1) // 2 for n in lengths))
