"""How the connector learns: gradients, packing, recomputation, objectives of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlbench.contract_checks.gradient_comparison import (
    find_differences,
    language_gradients,
    language_loss,
    objective_gradients,
    step_loss,
)
from vlbench.contract_checks.small_model import join_views, make_double_batch, make_sample
from vlbench.contract_checks.violations import require, require_none
from vlbench.data.packing import PackedBatch
from vlbench.data.sample import Sample
from vlbench.model.loaded_vlm import LoadedVLM


def check_every_parameter_learns(vlm: LoadedVLM) -> None:
    """Every parameter of the connector has a gradient that is not zero."""
    vlm.model.zero_grad()
    rows = [[make_sample(1), make_sample(2, images=2)]]
    step_loss(vlm, make_double_batch(vlm, rows)).backward()
    parameters = vlm.connector.named_parameters()
    still = [name for name, p in parameters if p.grad is None or not p.grad.any()]
    require_none(still, "no gradient for")


def check_neighbours(vlm: LoadedVLM) -> None:
    """Loss and gradients are the same packed, in other order, and alone."""
    samples = [
        make_sample(1),
        make_sample(2, images=2, words=40),
        make_sample(3, images=0),
        make_sample(4, words=1),
    ]
    alone = language_gradients(vlm, [make_double_batch(vlm, [[one]]) for one in samples])
    for rows in ([samples], [samples[::-1]], [[one] for one in samples]):
        packed = language_gradients(vlm, [make_double_batch(vlm, rows)])
        require_none(find_differences(alone, packed), "packing changes")


def check_views(vlm: LoadedVLM) -> None:
    """What is injected depends on each view of an image, and is the same packed and alone."""
    if not vlm.connector.inject_layers:
        return  # to `forward` a view is an image
    samples = [(make_sample(1, images=2), [2]), (make_sample(2, images=3, words=20), [1, 2])]
    alone = [_tiled_batch(vlm, [one]) for one in samples]
    expected = language_gradients(vlm, alone)
    vlm.model.enable_activation_checkpointing("full")
    for rows in (samples, samples[::-1]):
        packed = language_gradients(vlm, [_tiled_batch(vlm, rows)])
        require_none(find_differences(expected, packed), "packing tiled images changes")
    with torch.no_grad():
        before = language_loss(vlm, alone[1])
        for view in range(3):
            pixels = alone[1].pixels.clone()
            pixels[view] = pixels[view].flip(-1)
            changed = language_loss(vlm, replace(alone[1], pixels=pixels))
            require(not changed.equal(before), f"nothing depends on view {view + 1} of 3")


def _tiled_batch(vlm: LoadedVLM, samples: Sequence[tuple[Sample, Sequence[int]]]) -> PackedBatch:
    """Return samples, each with the views of its images, in one row."""
    batch = make_double_batch(vlm, [[sample for sample, _ in samples]])
    counts = [count for _, view_counts in samples for count in view_counts]
    return join_views(batch, counts, vlm.connector.tokens_per_image)


def check_objectives(vlm: LoadedVLM) -> None:
    """The connector's own objectives are the same however a step is packed."""
    samples = [make_sample(number, words=number) for number in range(1, 7)]
    for name in vlm.connector.objectives():
        vlm.model.set_objective(name)
        whole = objective_gradients(vlm, [samples])
        for rows in ([samples[:1], samples[:0:-1]], [[one] for one in samples]):
            different = find_differences(whole, objective_gradients(vlm, rows), 1e-8)
            require_none(different, f"packing changes, of objective {name},")


def check_text_alone(vlm: LoadedVLM) -> None:
    """A batch without images gives every parameter a gradient, zero or not."""
    vlm.model.zero_grad()
    step_loss(vlm, make_double_batch(vlm, [[make_sample(1, images=0)]])).backward()
    missing = [name for name, p in vlm.connector.named_parameters() if p.grad is None]
    require_none(missing, "no gradient for")


def check_recomputation(vlm: LoadedVLM) -> None:
    """Activation checkpointing, which runs layers twice, changes neither loss nor gradients."""
    rows = [[make_sample(1), make_sample(2, images=2)]]
    before = language_gradients(vlm, [make_double_batch(vlm, rows)])
    vlm.model.enable_activation_checkpointing("full")
    after = language_gradients(vlm, [make_double_batch(vlm, rows)])
    require_none(find_differences(before, after, 1e-9), "recomputing activations changes")
