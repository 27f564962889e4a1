"""The operations that a step needs, against torch's own counter of what a step does."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from vlbench.compat.torch_internals import make_flop_counter
from vlbench.config import recipe as recipes
from vlbench.data.packing import PackedBatch
from vlbench.model.build_vlm import build_vlm
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.train_flops import count_step_flops
from vlbench.train.stage_plan import build_stage_steps, plan_stage_runs
from vlbench.train.trainable_parts import freeze_untrained_parts

CONNECTORS = ("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva")


def ready(recipe: str, stage: str, *words: str) -> tuple[LoadedVLM, list[PackedBatch]]:
    """Return the miniature before a stage, and the micro-batches of its first step."""
    resolved = recipes.load_recipe(
        [f"recipe={recipe}", f"stages.{stage}.global_batch_size=4", *words]
    )
    leg = next(
        leg
        for leg in plan_stage_runs(resolved.selected_data, resolved.last_stage_data)
        if leg.name == stage
    )
    vlm = build_vlm(resolved.model, leg.stage.image_size)
    freeze_untrained_parts(vlm.model, leg.stage)
    return vlm, build_stage_steps(vlm.processor, leg)[0].micro_batches


def counted(vlm: LoadedVLM, batches: list[PackedBatch]) -> float:
    """Return what torch counts in forward and backward of the language loss."""
    counting = make_flop_counter()
    with counting:
        for batch in batches:
            visual = vlm.visual(batch)
            vlm.model.language_loss(vlm.model.hidden_states(batch, visual), batch.labels).backward()
    return counting.get_total_flops()


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [
        *itertools.product(CONNECTORS, ["align_448", "chat"]),
        ("yivl_deepstack", "chat"),
        ("yivl_cross_attention", "align_448"),
    ],
)
def test_a_step_takes_what_torch_counts(recipe, stage):
    vlm, batches = ready(recipe, stage)
    ours = count_step_flops(vlm.model).count_flops(batches, causal=False)
    assert ours == pytest.approx(counted(vlm, batches), rel=0.03)


def test_what_is_frozen_takes_less():
    vlm, batches = ready("yivl_llava", "chat")
    whole = count_step_flops(vlm.model)
    vlm.vision.requires_grad_(False)
    frozen_encoder = count_step_flops(vlm.model)
    assert (
        frozen_encoder.per_view < whole.per_view
        and frozen_encoder.per_position == whole.per_position
    )
    vlm.language.requires_grad_(False)
    aligned = count_step_flops(vlm.model)  # gradients pass through, weights have none
    assert aligned.per_position == pytest.approx(whole.per_position * 2 / 3)
    vlm.connector.requires_grad_(False)
    assert count_step_flops(vlm.model).per_position == pytest.approx(whole.per_position / 3)


def test_known_features_spare_the_encoder():
    vlm, batches = ready("yivl_llava", "align_448", "stages.align_448.train.vision=null")
    flops = count_step_flops(vlm.model)
    kept = [
        dataclasses.replace(batch, features=torch.zeros(len(batch.pixels), 1, 1))
        for batch in batches
    ]
    images = sum(len(batch.pixels) for batch in batches)
    assert flops.count_flops(batches) - flops.count_flops(kept) == pytest.approx(
        flops.per_view_encoding * images
    )


def test_half_of_attention_is_not_needed():
    vlm, batches = ready("yivl_llava", "chat")
    flops = count_step_flops(vlm.model)
    lengths = [n for batch in batches for row in batch.sample_lengths for n in row]
    spared = flops.count_flops(batches, causal=False) - flops.count_flops(batches)
    assert spared == pytest.approx(flops.per_attended_pair * sum(n * (n - 1) // 2 for n in lengths))
