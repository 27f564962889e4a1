"""How the connector learns: gradients, packing, recomputation, objectives of its own."""

from __future__ import annotations

from vlbench.contract_checks.gradient_comparison import (
    find_differences,
    language_gradients,
    objective_gradients,
    step_loss,
)
from vlbench.contract_checks.small_model import make_double_batch, make_sample
from vlbench.contract_checks.violations import require_none
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
